"""A policy whose heads may have any budgets, and lend each other slots."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arkv import CachePlan, Grid, ModelSpec, Observation, RankedPolicy, Store
from arkv.policy import least_of_layer


@dataclass(frozen=True, kw_only=True)
class Sums(RankedPolicy):
    """Keeps what was looked at most since its birth: of a head, or of all heads of a layer that share."""

    fields: ClassVar = {"score": torch.float32}
    needs: ClassVar = frozenset({"mass"})

    budgets: tuple[tuple[int, ...], ...]
    shared: bool = False

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(self.budgets, self.eviction_period(grid), self.shared)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        store["score"].add_(seen.mass)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store["score"]

    def select(self, store: Store, step: Tensor) -> Tensor:
        return least_of_layer(store, self.worth(store, step)) if self.shared else super().select(store, step)
