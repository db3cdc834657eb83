"""front: who gets a window, and what is left for the others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import saved
from tiny import Tiny

from arkv import Grid
from arkv.errors import ArkvError, BudgetError
from arkv.head_profile import HeadProfile
from arkv.model import ModelSpec
from arkv.policies.front import Front

GRID = Grid(8, 8)


def front(tmp_path: Path, windows: list[int], **parameters) -> tuple[Front, ModelSpec]:
    """The policy and a model of one layer whose heads need these windows."""
    spec = replace(Tiny(GRID).spec, layers=1, kv_heads=len(windows), heads=len(windows), head_profile=None)
    reach = (tuple((64,) + (window,) * 98 for window in windows),)
    profile = HeadProfile("tiny", GRID.tokens, reach, 1, 1.5, "2026-01-01", {})
    path = saved(profile, tmp_path / "heads.json")
    return Front(profile=path, recent=4, **parameters), spec


def budgets(policy: Front, spec: ModelSpec) -> list[int]:
    return list(policy.plan(spec.grid, spec).budgets(spec)[0])


def test_a_head_that_needs_less_than_its_share_leaves_the_rest_to_the_others(tmp_path: Path) -> None:
    policy, spec = front(tmp_path, [2, 60, 60, 60], budget=8)
    assert budgets(policy, spec) == [2, 10, 10, 10]


def test_a_window_takes_three_equal_shares_and_no_more(tmp_path: Path) -> None:
    policy, spec = front(tmp_path, [48, 60, 60, 60, 60], budget=16)
    assert budgets(policy, spec) == [48, 8, 8, 8, 8]
    policy, spec = front(tmp_path, [49, 60, 60, 60, 60], budget=16)
    assert budgets(policy, spec) == [16, 16, 16, 16, 16]


def test_windows_leave_the_others_what_they_never_give_up(tmp_path: Path) -> None:
    assert budgets(*front(tmp_path, [8, 8, 8, 60], budget=5)) == [8, 4, 4, 4]
    assert budgets(*front(tmp_path, [9, 9, 9, 60], budget=5)) == [5, 5, 5, 5]
    with pytest.raises(BudgetError, match="below the 4 that its protected tokens need"):
        budgets(*front(tmp_path, [2, 60], budget=3))


@given(
    windows=st.lists(st.integers(0, 63), min_size=1, max_size=6),
    budget=st.integers(4, 64),
    tau=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_heads_hold_no_more_than_the_budget_together_and_each_what_it_protects(
    tmp_path_factory: pytest.TempPathFactory, windows: list[int], budget: int, tau: float
) -> None:
    policy, spec = front(tmp_path_factory.mktemp("front"), windows, budget=budget, tau=tau)
    given, share = policy.shares(spec)
    assert sum(budgets(policy, spec)) <= budget * len(windows)
    assert share >= 4 or len(given) == len(windows)
    for (_, head), window in given.items():
        assert window >= max(1, windows[head])
        assert window == max(1, windows[head]) or len(given) == len(windows)
    if budget == 64 or tau == 0:
        assert not given
    if tau == 0 or len(given) in (0, len(windows)):
        assert sum(budgets(policy, spec)) == budget * len(windows)


def test_what_the_windows_of_all_heads_leave_makes_them_wider(tmp_path: Path) -> None:
    assert budgets(*front(tmp_path, [2, 3, 60], budget=25)) == [6, 6, 63]
    assert budgets(*front(tmp_path, [2, 3, 63], budget=25)) == [5, 6, 64]


def test_a_budget_of_one_is_one_for_every_head(tmp_path: Path) -> None:
    policy, spec = front(tmp_path, [1, 60], budget=1)
    assert budgets(replace(policy, recent=0), spec) == [1, 1]


def test_a_model_without_a_profile_ranks_in_every_head() -> None:
    spec = replace(Tiny(GRID).spec, head_profile=None)
    plan = Front(budget=14).plan(GRID, spec)
    assert {size for layer in plan.budgets(spec) for size in layer} == {14}


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    policy, spec = front(tmp_path, [2, 60], budget=8)
    with pytest.raises(ArkvError, match="it is of another model"):
        policy.plan(GRID, replace(spec, layers=2))


@pytest.mark.parametrize("wrong", [{"tau": -0.1}, {"tau": 2.0}, {"recent": -1}])
def test_wrong_parameters_are_refused(wrong: dict) -> None:
    with pytest.raises(BudgetError, match="expected"):
        Front(budget=8, **wrong)
