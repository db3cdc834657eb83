"""LineAR: a few lines of cached tokens (arXiv 2512.04857).

    visual tokens of a head:   [ anchors | middle survivors | recent lines ]

    while a line is decoded    append every token, evict none
    at the end of a line       every token of the middle has the attention that this line paid to it;
                               keep the best of the middle, as many as the budget leaves room for

The authors have released no code. What the paper leaves open is marked "inferred" below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.policy import Observation, RankedPolicy, check_choice, resolve_budget
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class LineAR(RankedPolicy):
    """Condition, anchors and recent lines are safe; the rest is ranked by the last line's attention.

    Ranking is done by each head and each guidance row for itself (inferred: the paper gives all heads the
    same size and says nothing of sharing). Evictions are a line apart (inferred from its line stages and
    its memory figures), and positions are those of birth (inferred). A token counts the attention since its
    birth only, which matters where `recent` is less than a line.

    Attributes:
        anchors: first visual tokens that are never given up; they carry the global style (section on
            observations; the number is inferred: the handful that attention sinks take).
        recent: newest tokens that are never given up (stated as "recent lines"; the number is inferred: two
            lines, as in HeadKV, arXiv 2605.20600, which builds on it). None: two lines, or one where the
            budget does not hold two. The line that is being decoded comes on top of them.
        scoring: "softmax" ranks by attention, as the paper's words suggest; "raw" by the scaled dot
            products before the softmax, as HeadKV prints the formula that it takes from here (the paper's
            own is unknown).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    source: ClassVar[str] = "LineAR, arXiv 2512.04857"

    anchors: int = 4
    recent: int | None = None
    scoring: Literal["softmax", "raw"] = "softmax"

    def __post_init__(self) -> None:
        for name, value in (("anchors", self.anchors), ("recent", self.recent)):
            if value is not None and value < 0:
                raise BudgetError(f"{name} is {value}: expected 0 or more visual tokens")
        check_choice(self, "scoring")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """Only what is ranked by."""
        return frozenset({"mass" if self.scoring == "softmax" else "scores"})

    def recent_tokens(self, grid: Grid) -> int:
        """Tokens of the recent lines on this grid."""
        if self.recent is not None:
            return min(self.recent, grid.tokens)
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        return 2 * grid.line if budget >= self.anchors + 2 * grid.line else grid.line

    def least_budget(self, grid: Grid) -> int:
        """Anchors and recent tokens."""
        return self.anchors + self.recent_tokens(grid)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Sum up what this line looks at."""
        store["score"].add_(seen.mass if self.scoring == "softmax" else seen.scores)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """Anchors and recent lines."""
        newest = store.position >= step - self.recent_tokens(store.grid)
        return (store.position < min(self.anchors, store.grid.tokens)) | newest

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The attention that the last line paid to each token."""
        return store["score"]

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots and forget the line's attention: the next line judges anew."""
        super().evict(store, slots)
        store["score"].zero_()
