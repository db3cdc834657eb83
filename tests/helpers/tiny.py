"""Registered policies on the tiny model of `arkv.testing`, at budgets that leave them something to choose."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from arkv import CachePlan, CachePolicy
from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import Model, ModelSpec
from arkv.policies.linear import LineAR
from arkv.registry import load_class, names
from arkv.testing.tiny import GRID as GRID
from arkv.testing.tiny import LONGEST as LONGEST
from arkv.testing.tiny import WORDS as WORDS
from arkv.testing.tiny import Prompt as Prompt
from arkv.testing.tiny import Tiny as Tiny
from arkv.testing.tiny import random_tokens as random_tokens


@dataclass(frozen=True, kw_only=True)
class Often(LineAR):
    """LineAR with evictions every `every` tokens, whether lines end there or not."""

    every: int = 3

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return replace(super().plan(grid, spec), period=self.every)


LOCAL = {"often": Often}
# Defaults that are made for real grids leave nothing to choose on a tiny one.
SMALL = {"linear": {"anchors": 2, "recent": 5}, "often": {"anchors": 2, "recent": 5}}
# SSD has to know the heads of a model, and these tests have models of many shapes; the conformance suite
# measures up profiles for it.
POLICIES = [*(entry.name for entry in names("policy") if entry.name != "ssd"), *LOCAL]


def build(name: str, budget: int, **parameters: Any) -> CachePolicy:
    """A registered policy with this budget, where it takes one."""
    policy_class = LOCAL.get(name) or load_class("policy", name)
    parameters = SMALL.get(name, {}) | parameters
    if "budget" in {field.name for field in fields(policy_class)}:
        parameters["budget"] = budget
    return policy_class(**parameters)  # type: ignore[no-any-return]


def legal_budgets(name: str, model: Model, **parameters: Any) -> list[int]:
    """The budgets that a policy accepts for a model, from the smallest."""
    spec, legal = model.spec, []
    for budget in range(1, spec.grid.tokens + 1):
        try:
            build(name, budget, **parameters).plan(spec.grid, spec)
        except BudgetError:
            continue
        legal.append(budget)
    return legal


def tight(name: str, model: Model, **parameters: Any) -> CachePolicy:
    """A registered policy with little more than the least budget it accepts."""
    return build(name, legal_budgets(name, model, **parameters)[1], **parameters)
