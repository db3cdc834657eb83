"""Keep everything: the reference that every policy is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import CachePolicy
from arkv.store import CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class FullCache(CachePolicy):
    """A slot for every visual token, filled in raster order; nothing is ever given up."""

    in_order: ClassVar[bool] = True
    source: ClassVar[str] = "baseline"

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """A budget of all tokens."""
        return CachePlan(budget=grid.tokens, period=grid.line)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """The next free slots."""
        line = torch.arange(store.plan.period, device=store.position.device)
        next_slots = store.starts[:, None, :, None] + store.condition + step + line
        return next_slots.expand(-1, store.rows, -1, -1)
