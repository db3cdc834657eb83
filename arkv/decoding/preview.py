"""The upper part of pictures, while they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import overload

from PIL import Image
from torch import Tensor

from arkv.decoding.isolation import isolated
from arkv.model import Model, PictureDecoder


class LinesSoFar(Sequence[Image.Image]):
    """One image a picture, down to a line that is finished; all are drawn when the first is asked for.

    A picture decoder lets every token reach into its neighbourhood, or into the whole picture. Below the line
    it is shown the line itself, again and again: nothing of other pictures, and what any line may hold.

    Args:
        model: draws.
        tokens: int64 `[pictures, N]`; copied.
        line: the last one that is finished.
    """

    def __init__(self, model: Model, tokens: Tensor, line: int) -> None:
        grid = model.spec.grid
        self._model, self._share = model, (line + 1, grid.rows)
        self._tokens = tokens.unflatten(1, (grid.rows, grid.line)).clone()
        self._tokens[:, line + 1 :] = self._tokens[:, line, None]

    def __len__(self) -> int:
        return len(self._tokens)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> list[Image.Image]: ...
    def __getitem__(self, index: int | slice) -> Image.Image | list[Image.Image]:
        return self._images[index]

    @cached_property
    def _images(self) -> list[Image.Image]:
        done, rows = self._share
        whole = images(self._model, self._tokens.flatten(1))
        return [image.crop((0, 0, image.width, image.height * done // rows)) for image in whole]


def images(model: PictureDecoder, tokens: Tensor) -> list[Image.Image]:
    """The pictures that tokens stand for.

    Args:
        model: whose tokens they are, or its picture decoder.
        tokens: int64 `[pictures, N]`.
    """
    if not len(tokens):
        return []
    with isolated(model.device):
        return [Image.fromarray(picture) for picture in model.pixels(tokens).numpy()]
