"""The interface that a cache policy implements, and the base that most of them want.

A policy is a frozen dataclass of its hyper-parameters. It has no state: what it remembers lies in the
store, one value a slot, in the fields it declares. Everything after `plan` is tensor code on fixed
shapes, so that the loop around it can be compiled and captured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.store import CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Which tokens stay resident.

    Class attributes:
        fields: per-slot statistics to allocate, name to dtype; zero when a slot is written.
        needs_mass: whether `observe` is called with the attention mass. A policy that does not look
            costs nothing.
        source: the paper, or where the method is from.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {}
    needs_mass: ClassVar[bool] = False
    source: ClassVar[str] = ""

    @abstractmethod
    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """Budget and period for this model; pure Python, before anything is allocated.

        Raises:
            BudgetError: the parameters leave no legal budget; the message says which would.
        """

    def observe(self, store: Store, mass: Tensor, step: Tensor) -> None:
        """Fold one token's attention into the statistics, after each token, if `needs_mass`.

        Args:
            store: write to its statistics in place only.
            mass: float32 `[layers, rows, kv_heads, capacity]`, what each slot received; zero exactly
                where a slot holds nothing.
            step: int64 0-d, position of the visual token whose query looked.
        """
        raise NotImplementedError(f"{type(self).__name__} needs mass but does not observe it")

    @abstractmethod
    def select(self, store: Store, step: Tensor) -> Tensor:
        """Name the slots that the next `period` tokens will be written to.

        Args:
            store: not to be written to.
            step: int64 0-d, position of the next visual token; a multiple of the period.

        Returns:
            int64 `[layers, rows, kv_heads, period]`, distinct within a head, all of them recyclable.
            Free slots first; the tokens in the others are given up.
        """

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up what `select` named.

        Args:
            store: written to in place.
            slots: what `select` returned.
        """
        store.free_(slots)


@dataclass(frozen=True, kw_only=True)
class RankedPolicy(CachePolicy):
    """A policy with one budget for every head that keeps the protected tokens and the best of the rest.

    A subclass gives a `score` and, if some tokens are beyond ranking, a `protected` mask; evictions
    happen at line ends.

    Attributes:
        budget: visual slots a head keeps, `B`. Give this or `ratio`.
        ratio: `B / N` as a number in (0, 1] or a fraction such as "1/6"; the budget is rounded to the
            nearest slot, halves up.
        period: visual tokens between two evictions, `P`; None for a line. The cache holds up to
            `budget + period` visual tokens before an eviction.
    """

    budget: int | None = None
    ratio: float | str | None = None
    period: int | None = None

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """The budget in slots, and the period."""
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        least = min(max(1, self.least_budget(grid)), grid.tokens)
        if budget < least:
            raise BudgetError(
                f"{type(self).__name__}: a budget of {budget} of {grid.tokens} slots is below the {least} "
                f"that its protected tokens need; the smallest ratio that does is {least}/{grid.tokens}"
            )
        return CachePlan(budget=budget, period=grid.line if self.period is None else self.period)

    def least_budget(self, grid: Grid) -> int:
        """The protected visual tokens of a head, which every budget has to hold."""
        return 0

    def protected(self, store: Store, step: Tensor) -> Tensor | None:
        """bool, broadcastable to `[layers, rows, kv_heads, capacity]`: tokens not to be given up."""
        return None

    @abstractmethod
    def score(self, store: Store, step: Tensor) -> Tensor:
        """float32 `[layers, rows, kv_heads, capacity]`: how much each resident token is worth keeping."""

    def select(self, store: Store, step: Tensor) -> Tensor:
        """The free slots, then the unprotected tokens of least score, of equal ones the oldest."""
        # A NaN would sort above everything and make its slot immortal.
        worth = self.score(store, step).float().nan_to_num(nan=-RANKED, posinf=RANKED, neginf=-RANKED)
        worth = worth.clamp(-RANKED, RANKED)
        protected = self.protected(store, step)
        if protected is not None:
            worth = torch.where(protected, PROTECTED, worth)
        worth = torch.where(store.position < 0, -torch.inf, worth)
        worth = torch.where(store.recyclable, worth, torch.inf)
        # Two stable sorts: of equal scores the older token goes first, wherever the tokens lie.
        by_age = store.position.argsort(dim=-1, stable=True)
        by_worth = worth.gather(-1, by_age).argsort(dim=-1, stable=True)
        return by_age.gather(-1, by_worth[..., : store.plan.period])


# Above every score, below what is never given up. A power of two far inside float32, so that scores
# up to it keep their order.
RANKED = 2.0**100
PROTECTED = 2.0**101


def resolve_budget(budget: int | None, ratio: float | str | None, tokens: int) -> int:
    """Slots from a budget or a ratio.

    Args:
        budget: slots, or None.
        ratio: share of `tokens`, or None. A text may be a fraction ("1/6") or a decimal.
        tokens: visual tokens of an image, `N`.

    Returns:
        The number of slots, rounded to the nearest, halves up; at most `tokens`.

    Raises:
        BudgetError: neither or both are given, or the value is out of range.
    """
    if (budget is None) == (ratio is None):
        raise BudgetError("give a budget in slots or a ratio such as '1/6', and not both")
    if ratio is not None:
        try:
            # Fraction alone would write out the digits of 1e-99999999.
            share = Fraction(ratio) if "/" in str(ratio) else Fraction(str(float(ratio)))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise BudgetError(
                f"cannot read the ratio {ratio!r}: expected a number such as 0.25 or '1/4'"
            ) from None
        if not 0 < share <= 1:
            raise BudgetError(f"the ratio is {ratio}: expected more than 0 and at most 1")
        return int(share * tokens + Fraction(1, 2))
    assert budget is not None
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"the budget is {budget!r}: expected a whole number of slots")
    if budget < 1:
        raise BudgetError(f"the budget is {budget} slots: expected at least 1")
    return min(budget, tokens)
