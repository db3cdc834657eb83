"""Attention that fades: what was looked at lately counts, what was looked at long ago does not.

    every token      s_j <- s_j / 2^(1 / half_life) + attention to j
    at a line's end  keep the newest tokens of every head and, of the others, those of the greatest s in
                     the whole layer

Between two methods: with a half-life of nothing the newest query decides alone, as in TOVA
(arXiv 2401.06104), and with an endless one attention is summed up for good, as in H2O (arXiv 2306.14048).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

import arkv
from arkv.errors import BudgetError
from arkv.policy import least_of_layer


@dataclass(frozen=True, kw_only=True)
class Fading(arkv.RankedPolicy):
    """Keep the newest tokens, and of the rest what received most attention of late.

    The heads of a layer compete for its slots, and the first layer has more of them than the others.

    Attributes:
        half_life: visual tokens after which attention counts half.
        recent: newest tokens that are never given up; two lines of a grid of 24 columns.
        first_layer: budget of the first layer in multiples of the mean of all layers. It gets no more than
            the other layers can spare.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"attention": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    source: ClassVar[str] = "the tutorial of arkv"

    half_life: float = 8.0
    recent: int = 48
    first_layer: float = 1.5

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise BudgetError(f"half_life is {self.half_life}: expected more than 0 visual tokens")
        if self.recent < 0:
            raise BudgetError(f"recent is {self.recent}: expected 0 or more visual tokens")
        if not 1 <= self.first_layer < float("inf"):
            raise BudgetError(f"first_layer is {self.first_layer}: expected at least 1, an equal share")

    def plan(self, grid: arkv.Grid, spec: arkv.ModelSpec) -> arkv.CachePlan:
        """A budget for each layer, which its heads share."""
        plan = super().plan(grid, spec)
        assert isinstance(plan.budget, int)  # the same for every head
        return replace(plan, budget=self.by_layer(plan.budget, grid, spec), shared=True)

    def by_layer(self, mean: int, grid: arkv.Grid, spec: arkv.ModelSpec) -> tuple[tuple[int, ...], ...]:
        """The budget of every head, by layer; together no more than if all had the mean."""
        others = spec.layers - 1
        spare = max(0, mean - self.least_budget(grid)) * others
        first = min(int(self.first_layer * mean), mean + spare, grid.tokens)
        rest = (mean * spec.layers - first) // max(1, others)
        return ((first,) * spec.kv_heads, *[(rest,) * spec.kv_heads] * others)

    def observe(self, store: arkv.Store, seen: arkv.Observation, step: Tensor) -> None:
        """Let the old attention fade, and add the new."""
        store["attention"].mul_(0.5 ** (1 / self.half_life)).add_(seen.mass)

    def score(self, store: arkv.Store, step: Tensor) -> Tensor:
        """What is left of the attention that each token received."""
        return store["attention"]

    def least_budget(self, grid: arkv.Grid) -> int:
        """The newest tokens."""
        return min(self.recent, grid.tokens)

    def protected(self, store: arkv.Store, step: Tensor) -> Tensor:
        """The newest tokens."""
        return store.position >= step - self.least_budget(store.grid)

    def select(self, store: arkv.Store, step: Tensor) -> Tensor:
        """The free slots of the layer, then its unprotected tokens of the least score."""
        return least_of_layer(store, self.worth(store, step))
