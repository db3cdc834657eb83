"""Ada-KV: the heads of a layer compete for its slots (arXiv 2407.11550).

    b   = B - w                              what a head may choose on average, w being protected
    c_h = head h's tokens among the H b best of the layer's unprotected ones
    B_h = w + (1 - alpha) c_h + alpha b      so no head is left with less than alpha b
    keep the B_h best of head h

Budgets are found anew at every eviction, for each picture and guidance row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from arkv.allocator import Allocator
from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import PROTECTED, least_of_layer, rank_in_head, ranking, resolve_budget
from arkv.store import CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class AdaKV(Allocator):
    """Budgets that follow the scores of a layer's heads, at an unchanged sum of the layer.

    The paper compresses a prompt once; here budgets are found at every eviction, because a picture's cache
    is compressed line by line (ours). Scores are compared between heads as they are, so they should be
    attention, as those of "snapkv", "h2o" and "linear" are.

    Attributes:
        alpha: share of the average budget that every head is sure of, the paper's safeguard (0.2 in one
            published code, 0.5 in another).
    """

    source: ClassVar[str] = "Ada-KV, arXiv 2407.11550"

    alpha: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise BudgetError(f"alpha is {self.alpha}: expected a share from 0 to 1")

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """One pool a layer."""
        return replace(super().plan(grid, spec), shared=True)

    def head_budgets(self, store: Store, candidates: Tensor, order: Tensor) -> Tensor:
        """How many unprotected tokens each head is to keep.

        Args:
            store: the layers' pools.
            candidates: bool `[layers, rows, slots]`: the unprotected tokens.
            order: int64, as `candidates`: places by worth in the layer, theirs above all others.

        Returns:
            int64 `[layers, rows, kv_heads]`.
        """
        free = resolve_budget(self.budget, self.ratio, store.grid.tokens) - self.least_budget(store.grid)
        winners = candidates & (order >= store.slots - store.kv_heads * free)
        hits = store.sum_by_head(winners)
        return ((1 - self.alpha) * hits + self.alpha * free).round().long()

    def select(self, store: Store, step: Tensor) -> Tensor:
        """The free slots, then what is over a head's budget, the least first, then the least of the rest."""
        worth = self.worth(store, step)
        candidates = (worth < PROTECTED) & (worth > -torch.inf)
        # Places instead of scores: there is no number that every score can be moved down by.
        least_first = ranking(store, torch.where(candidates, worth, -torch.inf))
        places = torch.arange(store.slots, device=worth.device).expand(worth.shape)
        order = torch.zeros_like(least_first).scatter(-1, least_first, places)
        count = store.sum_by_head(candidates).long()
        excess = count - self.head_budgets(store, candidates, order)
        over = candidates & (
            rank_in_head(store, torch.where(candidates, worth, torch.inf)) < store.of_slots(excess)
        )
        moved = torch.where(over, order - store.slots, order).float()
        return least_of_layer(store, torch.where(candidates, moved, worth))
