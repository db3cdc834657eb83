from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny

from arkv import CachePlan, Grid, Store
from arkv.errors import ArkvError, BudgetError
from arkv.policies.ssd import SSD
from arkv.study.profile import HeadProfile

SPEC = Tiny(Grid(5, 5), layers=2, kv_heads=3, heads=3).spec
SHARES = ((0.9, 0.2, 0.1), (0.7, 0.6, 0.3))
few = settings(max_examples=max(1, settings().max_examples // 2))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "heads.json"
    HeadProfile("tiny", SHARES, 2, 1, 1.5, "2026-01-01", {}).save(path)
    return path


@few
@given(
    budget=st.integers(3, 25),
    window=st.none() | st.integers(1, 8),
    buffer=st.sampled_from([None, 1, 3, 5]),
    tau=st.sampled_from([0.0, 0.25, 0.65, 1.0]),
    recent=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_it_holds_what_the_algorithm_over_lists_holds(profile: Path, seed: int, **parameters) -> None:
    policy = SSD(profile=str(profile), **parameters)
    plan = policy.plan(SPEC.grid, SPEC)

    def rule(heads: Heads, decoded: int) -> None:
        for (layer, _, h), head in heads.items():
            keep = plan.budgets(SPEC)[layer][h]
            # What fits beside the tokens to come is left alone.
            most = plan.visual_slots(SPEC)[layer][h] - plan.period
            excess = len(head.held) - max(keep, most)
            if SHARES[layer][h] > policy.tau:
                old = [p for p in head.held if p < decoded - policy.recent]
                gone = lowest(old, head.sums("mass"), excess)
            else:
                gone = head.held[: max(0, excess)]
            head.held = [p for p in head.held if p not in gone]

    for _, got, expected, _, _ in drive(policy, SPEC, rule, seed=seed):
        assert got == expected


def test_sizes_use_up_the_budget_and_no_more(profile: Path) -> None:
    # Janus-Pro-1B's shape, a third of the heads semantic.
    spec = replace(SPEC, grid=Grid(24, 24), layers=24, kv_heads=16)
    for budget in (115, 144, 288, 400, 560, 576, 26, 25, 10):
        window, memory = SSD.sizes(budget, 25, 128, spec)
        total = window * 256 + memory * 128
        assert total <= budget * 384 < total + 384
        assert window <= memory <= 576
        if 25 < budget and memory < 576:
            assert window == 25
    assert SSD.sizes(115, 25, 0, spec) == SSD.sizes(115, 25, 384, spec) == (115, 115)
    assert SSD.sizes(115, 60, 128, spec) == (60, 225)


def test_spatial_heads_reach_as_far_as_the_profile_looked(tmp_path: Path) -> None:
    """A head that is called spatial because it looks at two lines back must not lose them."""
    grid = Grid(24, 24)
    spec = replace(SPEC, grid=grid)
    for radius, window in ((1, 25), (2, 50), (3, 75)):
        path = tmp_path / f"{radius}.json"
        HeadProfile("tiny", SHARES, radius, 1, 1.5, "2026-01-01", {}).save(path)
        plan = SSD(budget=150, profile=str(path)).plan(grid, spec)
        assert min(map(min, plan.budgets(spec))) == window
        assert window == radius * grid.line + radius, "the corner of the neighbourhood"


def test_bytes_are_those_of_the_budgets(profile: Path) -> None:
    policy = SSD(budget=10, window=5, profile=str(profile))
    plan = policy.plan(SPEC.grid, SPEC)
    assert plan == CachePlan(((15, 5, 5), (15, 15, 5)), 5)
    store = Store(SPEC, plan, 2, 3, {}, torch.float32)
    slots = 2 * (6 * 3 + 3 * 15 + 3 * 5 + 6 * 5)  # rows; condition, semantic, spatial, buffer
    assert store.kv_bytes == slots * SPEC.head_dim * 2 * 4


def test_without_a_profile_it_says_how_to_get_one() -> None:
    with pytest.raises(ArkvError, match="arkv profile --model tiny --out heads.json"):
        SSD(ratio=0.5).plan(SPEC.grid, SPEC)


def test_a_profile_of_another_model_is_refused(profile: Path) -> None:
    with pytest.raises(ArkvError, match="measured with another model"):
        SSD(ratio=0.5, profile=str(profile)).plan(SPEC.grid, replace(SPEC, layers=3))


@pytest.mark.parametrize("wrong", [{"tau": 2}, {"window": 0}, {"buffer": 0}, {"recent": -1}])
def test_wrong_parameters_are_refused(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}"):
        SSD(budget=8, **wrong)
    with pytest.raises(BudgetError, match="give it as buffer"):
        SSD(budget=8, period=3)
