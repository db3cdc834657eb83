"""The interface that a cache policy implements, and the base that most of them want.

A policy is a frozen dataclass of its hyper-parameters. It has no state: what it remembers lies in the
store, one value a slot or a head, in the fields it declares. Everything after `plan` is tensor code on fixed
shapes, so that the loop around it can be compiled and captured.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast, get_args, get_type_hints

import torch
from torch import Tensor

from arkv.errors import ArkvError, BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.ranking import least_of_head as least_of_head
from arkv.ranking import least_of_layer as least_of_layer
from arkv.ranking import rank_in_head as rank_in_head
from arkv.ranking import ranking as ranking
from arkv.scalars import brief
from arkv.store import CachePlan, HeadFields, Store


class Observation(NamedTuple):
    """What the newest token's queries saw, for the policies that look.

    Only what the policy's `needs` names is there; the rest is None.

    Attributes:
        mass: float32 `[layers, rows, slots]`, the attention that each slot received, summed over the query
            heads of its key head; zero exactly where a slot holds nothing or was not attended to.
        scores: float32 `[layers, rows, slots]`, the scaled dot products before the softmax, summed
            likewise; zero where `mass` would be.
        queries: `[layers, rows, heads, head_dim]`, the queries after their rotation.
    """

    mass: Tensor = cast(Tensor, None)
    scores: Tensor = cast(Tensor, None)
    queries: Tensor = cast(Tensor, None)


@dataclass(frozen=True, kw_only=True)
class CachePolicy(ABC):
    """Which tokens stay resident.

    The stores that its methods are given have the rows of a batch, or of one picture of it: with several
    tokens a pass, pictures come to their evictions one by one.

    Class attributes:
        fields: per-slot statistics to allocate, name to dtype; zero when a slot is written.
        head_fields: per-head statistics to allocate, name to dtype, or to a dtype and "tokens" for one
            number for each visual token; zero when a picture is begun.
        needs: which parts of an `Observation` to hand to `observe`. A policy that needs none does not
            look, and costs nothing.
        in_order: whether every head's slots are claimed from its first to its last, each once, so that those
            not reached yet need not be read.
        source: the paper, or where the method is from.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {}
    head_fields: ClassVar[HeadFields] = {}
    needs: ClassVar[frozenset[str]] = frozenset()
    in_order: ClassVar[bool] = False
    source: ClassVar[str] = ""

    def to_dict(self) -> dict[str, Any]:
        """Class and parameters in JSON's own types, for `from_dict`; parameters at their defaults too."""
        kind = type(self)
        parameters = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return {"policy": f"{kind.__module__}:{kind.__qualname__}"} | parameters

    @staticmethod
    def from_dict(description: Mapping[str, Any]) -> CachePolicy:
        """The policy that `to_dict` described, equal to it.

        Raises:
            ArkvError: the class cannot be found, is no policy, or does not take these parameters.
        """
        parameters = {name: _unplain(value) for name, value in description.items()}
        name = str(parameters.pop("policy", ""))
        try:
            kind = pkgutil.resolve_name(name)
        except (ValueError, ImportError, AttributeError) as error:
            raise ArkvError(f"cannot find the policy {name!r}: {error}") from None
        if not (isinstance(kind, type) and issubclass(kind, CachePolicy)):
            raise ArkvError(f"{name!r} is not a cache policy")
        try:
            return kind(**parameters)
        except TypeError as error:
            raise ArkvError(f"{name}: {error}") from None

    @abstractmethod
    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """Budgets and period for this model; pure Python, before anything is allocated.

        Raises:
            BudgetError: the parameters leave no legal budget; the message says which would.
        """

    def files(self, spec: ModelSpec) -> Sequence[Path]:
        """Files whose contents decide on what this policy keeps, beside its parameters; here, none.

        Args:
            spec: of the model that it is for.
        """
        return ()

    def begin(self, store: Store) -> None:  # noqa: B027  # nothing to begin with, for most
        """Write what the statistics are to begin with, after they were zeroed for a new batch.

        Args:
            store: write to its statistics in place only. Called outside of the compiled step.
        """

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Fold one token's attention into the statistics, after each token, if there are `needs`.

        Args:
            store: write to its statistics in place only.
            seen: what `needs` names.
            step: int64 0-d, position of the visual token whose query looked.
        """
        raise NotImplementedError(f"{type(self).__name__} has needs but does not observe")

    @abstractmethod
    def select(self, store: Store, step: Tensor) -> Tensor:
        """Name the slots that the next `period` tokens will be written to.

        Args:
            store: not to be written to.
            step: int64 0-d, position of the next visual token; a multiple of the period.

        Returns:
            int64 `[layers, rows, kv_heads, period]`, indices within the layer's pool, distinct within a
            row, all of them recyclable and, unless the plan is shared, of the head they are named for.
            Free slots first; the tokens in the others are given up.
        """

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up what `select` named.

        Args:
            store: written to in place.
            slots: what `select` returned.
        """
        store.free_(slots)

    def visible(self, store: Store, step: Tensor) -> Tensor | None:
        """The slots that the token at `step` may look at, of those that hold one; None for all.

        Args:
            store: not to be written to; the token's own slot is claimed already.
            step: int64 0-d, position of the token.

        Returns:
            bool, broadcastable to `[layers, rows, slots]`, or None.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class RankedPolicy(CachePolicy):
    """A policy that keeps the protected tokens and, of the rest, those of the best score.

    A subclass gives a `score` and, if some tokens are beyond ranking, a `protected` mask; evictions
    happen at line ends. Every head has the same budget unless `budgets` says otherwise.

    Attributes:
        budget: visual slots a head keeps, `B`. Give this or `ratio`.
        ratio: `B / N` as a number in (0, 1] or a fraction such as "1/6"; the budget is rounded to the
            nearest slot, halves up.
        period: visual tokens between two evictions, `P`; None for a line. The cache holds up to
            `budget + period` visual tokens before an eviction.
        share_rows: whether both guidance rows of a picture keep the same tokens, ranked by the sum of
            their scores, instead of each its own.

    Class attributes:
        allocatable: whether another policy may decide how many slots a head gets (see `arkv.allocator`).
    """

    allocatable: ClassVar[bool] = True

    budget: int | None = None
    ratio: float | str | None = None
    period: int | None = None
    share_rows: bool = False

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """The budget in slots, and the period."""
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        least = min(max(1, self.least_budget(grid)), grid.tokens)
        if budget < least:
            raise BudgetError(
                f"{type(self).__name__}: a budget of {budget} of {grid.tokens} slots is below the {least} "
                f"that its protected tokens need; the smallest ratio that does is {least}/{grid.tokens}"
            )
        return CachePlan(budget=budget, period=self.eviction_period(grid))

    def eviction_period(self, grid: Grid) -> int:
        """Visual tokens between two evictions."""
        return grid.line if self.period is None else self.period

    def least_budget(self, grid: Grid) -> int:
        """The protected visual tokens of a head, which every budget has to hold."""
        return 0

    def protected(self, store: Store, step: Tensor) -> Tensor | None:
        """bool, broadcastable to `[layers, rows, slots]`: tokens not to be given up."""
        return None

    @abstractmethod
    def score(self, store: Store, step: Tensor) -> Tensor:
        """float32 `[layers, rows, slots]`: how much each resident token is worth keeping."""

    def worth(self, store: Store, step: Tensor) -> Tensor:
        """The score on one scale: minus infinity where free, above every score where protected.

        Returns:
            float32 `[layers, rows, slots]`, plus infinity where nothing may be given up.
        """
        # A NaN would sort above everything and make its slot immortal.
        worth = self.score(store, step).float().nan_to_num(nan=-RANKED, posinf=RANKED, neginf=-RANKED)
        worth = self.of_picture(store, worth.clamp(-RANKED, RANKED)).clamp(-RANKED, RANKED)
        protected = self.protected(store, step)
        if protected is not None:
            worth = torch.where(protected, PROTECTED, worth)
        worth = torch.where(store.position < 0, -torch.inf, worth)
        return torch.where(store.recyclable, worth, torch.inf)

    def of_picture(self, store: Store, x: Tensor) -> Tensor:
        """With `share_rows`, the sum over both guidance rows of a picture in both of them; else `x` itself.

        Slots are taken to hold the same tokens in both rows, as they do if both have shared from the first.

        Args:
            store: knows whether there is guidance.
            x: `[layers, rows, ...]`.
        """
        if not (self.share_rows and store.guided):
            return x
        both = x.unflatten(1, (2, -1)).sum(1)
        return torch.cat([both, both], dim=1)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """The free slots, then the unprotected tokens of least score, of equal ones the oldest."""
        return least_of_head(store, self.worth(store, step))


# Above every score, below what is never given up. A power of two far inside float32, so that scores
# up to it keep their order.
RANKED = 2.0**100
PROTECTED = 2.0**101


# A compiled verb is handed the number: Dynamo need not read fractions.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def resolve_budget(budget: int | None, ratio: float | str | None, tokens: int) -> int:
    """Slots from a budget or a ratio; pure Python, computed before a graph and a constant within it.

    Args:
        budget: slots, or None.
        ratio: share of `tokens`, or None. A text may be a fraction ("1/6") or a decimal.
        tokens: visual tokens of an image, `N`.

    Returns:
        The number of slots, rounded to the nearest, halves up; at most `tokens`.

    Raises:
        BudgetError: neither or both are given, or the value is out of range.
    """
    if budget is None and ratio is None:
        raise BudgetError("give a budget in slots or a ratio such as '1/6'")
    if budget is not None and ratio is not None:
        raise BudgetError(
            f"the budget is {brief(budget)} and the ratio {brief(ratio)}: give one of them, not both"
        )
    if ratio is not None:
        try:
            # Fraction alone would write out the digits of 1e-99999999.
            share = Fraction(ratio) if "/" in str(ratio) else Fraction(str(float(ratio)))
        except (ValueError, ZeroDivisionError, OverflowError):
            raise BudgetError(
                f"cannot read the ratio {brief(ratio)}: expected a number such as 0.25 or '1/4'"
            ) from None
        if not 0 < share <= 1:
            raise BudgetError(f"the ratio is {ratio}: expected more than 0 and at most 1")
        return int(share * tokens + Fraction(1, 2))
    assert budget is not None
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise BudgetError(f"the budget is {brief(budget)}: expected a whole number of slots")
    if budget < 1:
        raise BudgetError(f"the budget is {brief(budget)} slots: expected at least 1")
    return min(budget, tokens)


def check_choice(policy: CachePolicy, parameter: str) -> None:
    """Raise `ArkvError` unless a parameter is one of the words that its `Literal` annotation lists."""
    choices = get_args(get_type_hints(type(policy))[parameter])
    value = getattr(policy, parameter)
    if not isinstance(value, (str, int)) or value not in choices:
        raise ArkvError(
            f"{type(policy).__name__}: {parameter} is {brief(value)}, expected "
            f"{' or '.join(map(repr, choices))}"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, CachePolicy):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _unplain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return CachePolicy.from_dict(value)
    return tuple(value) if isinstance(value, list) else value
