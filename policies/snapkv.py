"""SnapKV: the newest queries vote, and neighbours share the votes (arXiv 2404.14469, section 4).

```text
visual tokens of a head:   [ chosen | observation window ]

at an eviction   score_j = pool( mean attention of the last w queries to j ), for each j before them
                 keep the w newest tokens and the B - w of greatest score
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.policy import Observation, RankedPolicy, check_choice
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class SnapKV(RankedPolicy):
    """Pooled attention of an observation window, each head and each guidance row for itself (stated).

    The paper compresses a prompt once; here every eviction does (ours), so part of a token's neighbours may
    have been given up before. Pooling goes by place in the picture and counts them as zero (ours): a token
    that has lost its neighbours gets no votes by way of them, and tokens that are far apart in the picture
    never share any.

    Attributes:
        window: newest queries that vote, the paper's observation window; their tokens are never given up.
            Votes are collected from one eviction to the next, so it is at most `period`. None: a line, or
            the period if that is shorter (ours, after LineAR's finding that neighbouring lines look at the
            same places; 16 to 64 text tokens are common).
        kernel: width of the pooling, an odd number (5 or 7 are common); 1 for none.
        pooling: "avg" or "max" (both are in use).
        dimensions: 1 pools along the raster as the paper does along a text, over line ends; 2 pools over a
            square of `kernel` lines and columns (ours). A newline token is one more column.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"

    window: int | None = None
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"
    dimensions: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        check_window(self.window, self.kernel)
        check_choice(self, "pooling")
        check_choice(self, "dimensions")

    def window_tokens(self, grid: Grid) -> int:
        """Queries that vote on this grid."""
        period = self.eviction_period(grid)
        return window_within(period, self.window, usual=grid.line)

    def least_budget(self, grid: Grid) -> int:
        """The window."""
        return self.window_tokens(grid)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add this token's attention if it is one of the last before the next eviction."""
        period = store.plan.period
        votes = step % period >= period - self.window_tokens(store.grid)
        store["score"].add_(torch.where(votes, seen.mass, 0))

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The window."""
        return store.position >= step - self.window_tokens(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The pooled votes; their sum stands for the mean, which has the same order."""
        votes = torch.where(self.protected(store, step), 0, store["score"])
        return pooled(store, votes, self.kernel, self.pooling, self.dimensions)

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots and forget the votes."""
        super().evict(store, slots)
        store["score"].zero_()


def check_window(window: int | None, kernel: int) -> None:
    """Raise `BudgetError` for an observation window, or a width of pooling, that there cannot be."""
    if window is not None and window < 1:
        raise BudgetError(f"window is {window}: expected at least 1 query")
    if kernel < 1 or kernel % 2 == 0:
        raise BudgetError(f"kernel is {kernel}: expected an odd number of tokens, such as 5")


def window_within(period: int, window: int | None, usual: int) -> int:
    """Queries of an observation window between two evictions.

    Args:
        period: visual tokens between two evictions.
        window: the number asked for; None for the usual one, or the period if that is shorter.
        usual: the usual one.

    Raises:
        BudgetError: more are asked for than there are.
    """
    if window is None:
        return min(usual, period)
    if window > period:
        raise BudgetError(
            f"a window of {window} queries does not fit between two evictions, which are {period} visual "
            f"tokens apart: give a window of at most {period}, or a longer period"
        )
    return window


def pooled(store: Store, x: Tensor, kernel: int, pooling: str, dimensions: int) -> Tensor:
    """Pool a statistic of each head over neighbours in the picture.

    Args:
        store: positions and heads.
        x: float32 `[layers, rows, slots]`, not negative; tokens that a head does not hold count as zero.
        kernel: odd width of the pooling.
        pooling: "avg" or "max".
        dimensions: 1 for neighbours in raster order, 2 for neighbours on the grid.

    Returns:
        float32 `[layers, rows, slots]`; zero where there is no visual token.
    """
    grid, cells = store.grid, store.kv_heads * store.grid.tokens
    # The place of each slot's token in a picture of its head; all other slots go to one place past the end.
    place = torch.where(store.position >= 0, store.head * grid.tokens + store.position, cells)
    pictures = x.new_zeros(*x.shape[:2], cells + 1).scatter(-1, place, x)[..., :-1]
    height, width = (1, grid.tokens) if dimensions == 1 else (grid.rows, grid.line)
    # Wider than this, a window holds the whole picture wherever it lies; a single line is 1 high.
    window = (min(kernel, 2 * height - 1), min(kernel, 2 * width - 1))
    margin = (window[0] // 2, window[1] // 2)
    pool = avg_pool2d if pooling == "avg" else max_pool2d
    smooth = pool(pictures.reshape(-1, 1, height, width), window, stride=1, padding=margin)
    return pad(smooth.view(*x.shape[:2], cells), (0, 1)).gather(-1, place)
