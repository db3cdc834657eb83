from dataclasses import replace
from itertools import pairwise

import pytest
from driver import Heads, drive, lowest
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny

from arkv import CachePlan, Grid
from arkv.errors import BudgetError
from arkv.policies.pyramid import Pyramid

SPEC = Tiny(Grid(6, 5), layers=3, kv_heads=2, heads=2).spec


def test_budgets_of_a_published_example() -> None:
    # b = 64, beta = 20: from 2 b - 3.2 = 124.8 down to 3.2 over 32 layers, 8 protected on top.
    spec = replace(SPEC, layers=32, kv_heads=1, grid=Grid(24, 24))
    plan = Pyramid(of="linear:anchors=0,recent=8", budget=72).plan(spec.grid, spec)
    by_layer = [layer[0] for layer in plan.budget]
    assert abs(by_layer[0] - 132.8) < 1
    assert abs(by_layer[-1] - 11.2) < 1
    assert sum(by_layer) == 32 * 72
    assert all(a - b in (3, 4, 5) for a, b in pairwise(by_layer))


@given(st.integers(1, 576), st.integers(1, 40), st.floats(1, 100))
def test_the_sum_is_the_uniform_one_and_no_layer_has_more_than_there_is(
    budget: int, layers: int, beta: float
) -> None:
    spec = replace(SPEC, layers=layers, grid=Grid(24, 24))
    plan = Pyramid(of="random", budget=budget, beta=beta).plan(spec.grid, spec)
    by_layer = [layer[0] for layer in plan.budget]
    assert all(len(set(layer)) == 1 for layer in plan.budget)
    assert max(by_layer) <= 577
    assert all(a >= b - 1 for a, b in pairwise(by_layer))
    # A layer has at least one slot, where its share would round to none.
    assert 0 <= sum(by_layer) - layers * budget <= sum(size == 1 for size in by_layer)


def test_a_whole_budget_is_whole_in_every_layer() -> None:
    plan = Pyramid(of="linear", ratio=1).plan(SPEC.grid, SPEC)
    assert plan == CachePlan(((30, 30),) * 3, 5)


@pytest.mark.parametrize("seed", range(5))
def test_every_layer_keeps_its_best(seed: int) -> None:
    policy = Pyramid(of="linear:anchors=1,recent=2", budget=9, beta=4)
    budgets = policy.plan(SPEC.grid, SPEC).budgets(SPEC)
    assert budgets[0] > budgets[1] > budgets[2]

    def rule(heads: Heads, decoded: int) -> None:
        for (layer, _, h), head in heads.items():
            safe = [p for p in head.held if p < 1 or p >= decoded - 2]
            middle = [p for p in head.held if p not in safe]
            score = head.sums("mass", since=decoded - SPEC.grid.line)
            gone = lowest(middle, score, len(head.held) - budgets[layer][h])
            head.held = [p for p in head.held if p not in gone]

    for _, got, expected, _, _ in drive(policy, SPEC, rule, seed=seed):
        assert got == expected


def test_beta_narrows() -> None:
    with pytest.raises(BudgetError, match="beta is 0.5"):
        Pyramid(budget=12, beta=0.5)
