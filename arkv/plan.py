"""What a policy asks for before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass

from arkv.errors import BudgetError
from arkv.model import ModelSpec
from arkv.scalars import plain

MOST_SLOTS = 2**31 - 1
"""Bound of a budget and of a period: slots are counted by tensors."""


@dataclass(frozen=True)
class CachePlan:
    """What a policy asks for before anything is allocated.

    Attributes:
        budget: visual slots of a head right after an eviction, `B`: one number for all, or one for each
            key head of each layer.
        period: visual tokens decoded between two evictions, `P`.
        shared: whether the heads of a layer lend each other slots. Then only the sum of a layer's budgets
            is fixed, and `select` may name any slot of the layer for any head.
    """

    budget: int | tuple[tuple[int, ...], ...]
    period: int
    shared: bool = False

    def __post_init__(self) -> None:
        # As a policy may have computed them with numpy or torch.
        object.__setattr__(self, "budget", plain(self.budget))
        object.__setattr__(self, "period", plain(self.period))
        by_head = self.budget if isinstance(self.budget, tuple) else ((self.budget,),)
        if not all(isinstance(layer, tuple) for layer in by_head):
            raise BudgetError(f"a plan with a budget of {self.budget!r}: expected a tuple of numbers a layer")
        for name, value in [("budget", b) for layer in by_head for b in layer] + [("period", self.period)]:
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_SLOTS:
                raise BudgetError(
                    f"a plan with a {name} of {value!r:.40}: expected a whole number from 1 to {MOST_SLOTS}"
                )

    def budgets(self, spec: ModelSpec) -> list[list[int]]:
        """The budget of every key head, by layer.

        Raises:
            BudgetError: there are not as many as the model has heads.
        """
        if isinstance(self.budget, int):
            return [[self.budget] * spec.kv_heads for _ in range(spec.layers)]
        shape = {len(layer) for layer in self.budget}
        if len(self.budget) != spec.layers or shape != {spec.kv_heads}:
            raise BudgetError(
                f"a plan for {len(self.budget)} layers of {sorted(shape)} heads: {spec.name} has "
                f"{spec.layers} layers of {spec.kv_heads} key heads"
            )
        return [list(layer) for layer in self.budget]

    def mean_budget(self, spec: ModelSpec) -> float:
        """Visual slots of a head right after an eviction, on average over all heads."""
        return sum(map(sum, self.budgets(spec))) / (spec.layers * spec.kv_heads)

    def visual_slots(self, spec: ModelSpec) -> list[list[int]]:
        """Visual slots to allocate for every key head, by layer.

        Budget and period, never more than whole periods of tokens.
        """
        most = -(-spec.grid.tokens // self.period) * self.period
        return [[min(budget + self.period, most) for budget in layer] for layer in self.budgets(spec)]
