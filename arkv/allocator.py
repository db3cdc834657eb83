"""The base of policies that say how many slots a head gets and leave to another which tokens it keeps."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arkv.errors import ArkvError
from arkv.grid import Grid
from arkv.policy import Observation, RankedPolicy
from arkv.registry import load_policy
from arkv.store import HeadFields, Store


@dataclass(frozen=True, kw_only=True)
class Allocator(RankedPolicy):
    """Another policy's scores under budgets of one's own.

    Attributes:
        of: the policy whose scores decide within a head: a name, with parameters if any
            ("linear:anchors=24"). Its budget, period and sharing of rows are those given here.
    """

    of: str = "snapkv"

    @functools.cached_property
    def scorer(self) -> RankedPolicy:
        """The policy that `of` names.

        Raises:
            ArkvError: there is none, or it does not rank tokens by a score.
        """
        shared = {"period": self.period, "share_rows": self.share_rows}
        policy = load_policy(self.of, budget=self.budget, ratio=self.ratio, **shared)
        if not isinstance(policy, RankedPolicy) or type(policy).select is not RankedPolicy.select:
            raise ArkvError(
                f"{type(self).__name__}: of is {self.of!r}, which does not rank the tokens of a head by a "
                "score; try 'snapkv', 'h2o' or 'linear'"
            )
        if not policy.allocatable:
            raise ArkvError(
                f"{type(self).__name__}: of is {self.of!r}, which takes no budgets that differ by head; "
                "try 'snapkv', 'h2o' or 'linear'"
            )
        return policy

    @property
    def fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """The scorer's."""
        return self.scorer.fields

    @property
    def head_fields(self) -> HeadFields:  # type: ignore[override]
        """The scorer's."""
        return self.scorer.head_fields

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        """The scorer's."""
        return self.scorer.needs

    def eviction_period(self, grid: Grid) -> int:
        """The scorer's."""
        return self.scorer.eviction_period(grid)

    def least_budget(self, grid: Grid) -> int:
        """The scorer's."""
        return self.scorer.least_budget(grid)

    def begin(self, store: Store) -> None:
        """As the scorer does."""
        self.scorer.begin(store)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """As the scorer does."""
        self.scorer.observe(store, seen, step)

    def protected(self, store: Store, step: Tensor) -> Tensor | None:
        """What the scorer protects."""
        return self.scorer.protected(store, step)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """What the scorer says."""
        return self.scorer.score(store, step)

    def evict(self, store: Store, slots: Tensor) -> None:
        """As the scorer does."""
        self.scorer.evict(store, slots)

    def visible(self, store: Store, step: Tensor) -> Tensor | None:
        """What the scorer shows."""
        return self.scorer.visible(store, step)
