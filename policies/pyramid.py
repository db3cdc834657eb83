"""PyramidKV: wide below, narrow above (arXiv 2406.02069).

    b   = B - w                          what a head may choose, w being what its policy protects
    min = b / beta,  max = 2 b - min     the last layer's share and the first one's; their mean is b
    layer i of L keeps                   w + max - i (max - min) / (L - 1)

If `max` is more than there is to keep, it is that, and `min = 2 b - max`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from arkv.allocator import Allocator
from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import resolve_budget
from arkv.store import CachePlan


@dataclass(frozen=True, kw_only=True)
class Pyramid(Allocator):
    """Budgets that fall linearly from the first layer to the last, at an unchanged sum.

    Attributes:
        beta: how much narrower than the mean the last layer is (20 in the paper's code).
    """

    source: ClassVar[str] = "PyramidKV, arXiv 2406.02069"

    beta: float = 20.0

    def __post_init__(self) -> None:
        if not self.beta >= 1:
            raise BudgetError(f"beta is {self.beta}: expected at least 1, which gives all layers the same")

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """A budget a layer."""
        uniform = super().plan(grid, spec)
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        protected = min(self.least_budget(grid), budget)
        free = budget - protected
        narrowest = free / self.beta
        widest = min(2 * free - narrowest, grid.tokens - protected)
        narrowest = 2 * free - widest
        step = (widest - narrowest) / max(1, spec.layers - 1)
        exact = [widest - layer * step for layer in range(spec.layers)] if spec.layers > 1 else [free]
        # Rounded so that the sums up to every layer are right, and with them the sum of all.
        edges = [round(sum(exact[: layer + 1])) for layer in range(spec.layers)]
        shares = [edge - before for edge, before in zip(edges, [0, *edges], strict=False)]
        by_layer = tuple((max(1, protected + share),) * spec.kv_heads for share in shares)
        return replace(uniform, budget=by_layer)
