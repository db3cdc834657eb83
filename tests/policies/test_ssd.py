from dataclasses import replace
from pathlib import Path

import pytest
import torch
from driver import Head, Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import profile_of, saved
from tiny import Tiny

from arkv import CachePlan, Grid, Store
from arkv.errors import ArkvError, BudgetError
from arkv.head_profile import HeadProfile
from arkv.policies.ssd import SSD

SPEC = Tiny(Grid(5, 5), layers=2, kv_heads=3, heads=3).spec
SHARES = ((0.9, 0.2, 0.1), (0.7, 0.6, 0.3))
few = settings(max_examples=max(1, settings().max_examples // 2))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(profile_of(SPEC, SHARES), tmp_path_factory.mktemp("profile") / "heads.json")


@few
@given(
    budget=st.integers(3, 25),
    window=st.none() | st.integers(1, 8),
    buffer=st.sampled_from([None, 1, 3, 5]),
    tau=st.sampled_from([0.0, 0.25, 0.65, 1.0]),
    recent=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_it_holds_what_the_algorithm_over_lists_holds(profile: str, seed: int, **parameters) -> None:
    policy = SSD(profile=profile, **parameters)
    plan = policy.plan(SPEC.grid, SPEC)

    def rule(heads: Heads, decoded: int) -> None:
        for (layer, _, h), head in heads.items():
            keep = plan.budgets(SPEC)[layer][h]
            # What fits beside the tokens to come is left alone.
            most = plan.visual_slots(SPEC)[layer][h] - plan.period
            excess = len(head.held) - max(keep, most)
            if SHARES[layer][h] >= policy.tau:
                old = [p for p in head.held if p < decoded - policy.recent]
                gone = lowest(old, sums_without_own(head), excess)
            else:
                gone = head.held[: max(0, excess)]
            head.held = [p for p in head.held if p not in gone]

    for _, got, expected, _, _ in drive(policy, SPEC, rule, seed=seed):
        assert got == expected


def sums_without_own(head: Head) -> dict[int, float]:
    """Attention to each token, but for its own, by queries whose softmax leaves out their own token."""
    looks = {t: (seen, sum(seen.values()) - seen[t]) for t, seen in head.mass.items()}
    return {
        p: sum(seen.get(p, 0.0) / others for t, (seen, others) in looks.items() if t != p) for p in head.held
    }


def test_sizes_use_up_the_budget_and_no_more() -> None:
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


def test_a_head_that_looks_within_its_window_is_spatial_wherever_that_is(tmp_path: Path) -> None:
    """A head may look along a diagonal: far by cells, near by tokens, and the window keeps what it needs."""
    grid = Grid(24, 24)
    spec = replace(SPEC, grid=grid, layers=1, kv_heads=2)
    # The first looks 21 tokens back, which is a row up and three columns to the right; the other 80.
    reach = (((21,) * 89 + (3,) * 10, (80,) * 60 + (2,) * 39),)
    profile = HeadProfile("tiny", grid.tokens, reach, 1, 1.5, "2026-01-01", {})
    path = saved(profile, tmp_path / "heads.json")
    kinds = {
        window: SSD(budget=115, profile=path, window=window).semantic_heads(spec) for window in (20, 64, 80)
    }
    assert kinds == {20: ((True, True),), 64: ((False, True),), 80: ((False, False),)}
    assert SSD(budget=115, profile=path, tau=0.61).semantic_heads(spec) == ((False, False),)
    assert SSD(budget=115, profile=path, tau=0.6).semantic_heads(spec) == ((False, True),)
    assert SSD(budget=115, profile=path).plan(grid, spec).budget == ((64, 166),)


@pytest.mark.parametrize(
    ("grid", "window", "recent"),
    [(Grid(24, 24), 64, 32), (Grid(48, 48, newline=True), 131, 65), (Grid(64, 64, newline=True), 173, 87)],
)
def test_window_and_recent_tokens_scale_with_the_line(grid: Grid, window: int, recent: int) -> None:
    policy = SSD(ratio="1/5")
    assert (policy.window_tokens(grid), policy.recent_tokens(grid)) == (window, recent)
    assert SSD(budget=40).recent_tokens(grid) == 20, "at most half of the budget"


def test_a_buffer_within_takes_its_room_from_the_budget(profile: str) -> None:
    beside, within = (SSD(budget=10, window=8, profile=profile, buffer_within=w) for w in (False, True))
    stores = [Store(SPEC, p.plan(SPEC.grid, SPEC), 2, 3, {}, torch.float32) for p in (beside, within)]
    heads = SPEC.layers * SPEC.kv_heads
    slots = stores[0].kv_bytes - stores[1].kv_bytes
    assert slots == 2 * heads * 5 * SPEC.head_dim * 2 * 4, "a line of five less in every head"
    with pytest.raises(
        BudgetError, match="a window of 5 tokens has no room for a buffer of 5 within.*most 4"
    ):
        SSD(budget=10, window=5, profile=profile, buffer_within=True).plan(SPEC.grid, SPEC)
    with pytest.raises(BudgetError, match="below the 8 that its protected tokens need"):
        SSD(budget=7, recent=3, profile=profile, buffer_within=True).plan(SPEC.grid, SPEC)


def test_bytes_are_those_of_the_budgets(profile: str) -> None:
    policy = SSD(budget=10, window=5, tau=0.5, profile=profile)
    plan = policy.plan(SPEC.grid, SPEC)
    assert plan == CachePlan(((15, 5, 5), (15, 15, 5)), 5)
    store = Store(SPEC, plan, 2, 3, {}, torch.float32)
    slots = 2 * (6 * 3 + 3 * 15 + 3 * 5 + 6 * 5)  # rows; condition, semantic, spatial, buffer
    assert store.kv_bytes == slots * SPEC.head_dim * 2 * 4


def test_without_a_profile_it_says_how_to_get_one() -> None:
    with pytest.raises(ArkvError, match="arkv profile --model tiny --out heads.json"):
        SSD(ratio=0.5).plan(SPEC.grid, SPEC)


def test_a_profile_of_another_model_is_refused(profile: str) -> None:
    with pytest.raises(ArkvError, match="it is of another model"):
        SSD(ratio=0.5, profile=profile).plan(SPEC.grid, replace(SPEC, layers=3))
    with pytest.raises(ArkvError, match="25 tokens, tiny 2 of 3 and 20: it is of another model"):
        SSD(ratio=0.5, profile=profile).plan(Grid(4, 5), replace(SPEC, grid=Grid(4, 5)))


@pytest.mark.parametrize("wrong", [{"tau": 2}, {"window": 0}, {"buffer": 0}, {"recent": -1}])
def test_wrong_parameters_are_refused(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}"):
        SSD(budget=8, **wrong)
    with pytest.raises(BudgetError, match="give it as buffer"):
        SSD(budget=8, period=3)
