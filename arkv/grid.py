"""The raster of visual tokens: which row and column a token stands in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Index = TypeVar("Index", int, Tensor)


@dataclass(frozen=True)
class Grid:
    """An image as rows of visual tokens in raster order.

    Attributes:
        rows: lines of the image.
        columns: picture tokens in a line.
        newline: whether every line ends in one more token that marks its end (Lumina-mGPT). It counts
            as a visual token and stands in column `columns`.
    """

    rows: int
    columns: int
    newline: bool = False

    @property
    def line(self) -> int:
        """Visual tokens in a line, its newline token included."""
        return self.columns + int(self.newline)

    @property
    def tokens(self) -> int:
        """Visual tokens in an image, newline tokens included: the `N` of the papers."""
        return self.rows * self.line

    def row(self, position: Index) -> Index:
        """Row of the visual token at `position`, an int or an integer tensor."""
        return position // self.line

    def column(self, position: Index) -> Index:
        """Column of the visual token at `position`, an int or an integer tensor."""
        return position % self.line
