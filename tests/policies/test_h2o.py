import pytest
import torch
from driver import Head, Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from arkv import Grid, Observation, Store
from arkv.errors import BudgetError
from arkv.policies.h2o import H2O

SPEC = Tiny(Grid(4, 5), layers=2, heads=4, kv_heads=2).spec
few = settings(max_examples=max(1, settings().max_examples // 2))


def heavy_and_recent(head: Head, sums: dict[int, float], decoded: int, budget: int, recent: int) -> list[int]:
    """What a head keeps by its list."""
    old = [p for p in head.held if p < decoded - recent]
    gone = lowest(old, sums, len(head.held) - budget)
    return [p for p in head.held if p not in gone]


@few
@given(st.data(), st.integers(0, 99))
def test_the_recent_and_the_heavy_stay(data: st.DataObject, seed: int) -> None:
    grid = data.draw(st.sampled_from([Grid(4, 5), Grid(3, 3, newline=True), Grid(1, 9)]))
    kv_heads = data.draw(st.integers(1, 3))
    spec = Tiny(grid, layers=2, heads=kv_heads, kv_heads=kv_heads).spec
    budget = data.draw(st.integers(1, grid.tokens))
    recent = data.draw(st.none() | st.integers(0, budget))
    period = data.draw(st.none() | st.integers(1, 7))
    newest = budget // 2 if recent is None else recent

    def rule(heads: Heads, decoded: int) -> None:
        for head in heads.values():
            head.held = heavy_and_recent(head, head.sums("mass"), decoded, budget, newest)

    for _, got, expected, _, _ in drive(
        H2O(budget=budget, recent=recent, period=period), spec, rule, seed=seed
    ):
        assert got == expected


def test_rows_are_added_up_only_where_they_are_to_be_shared() -> None:
    # Rows 0 and 2 are a picture, as are 1 and 3.
    def rule(heads: Heads, decoded: int) -> None:
        sums = {place: head.sums("mass") for place, head in heads.items()}
        for (layer, row, h), head in heads.items():
            other = sums[layer, (row + 2) % 4, h]
            both = {p: mass + other[p] for p, mass in sums[layer, row, h].items()}
            head.held = heavy_and_recent(head, both, decoded, 8, 3)

    policy = H2O(budget=8, recent=3, share_rows=True)
    for _, got, expected, _, _ in drive(policy, SPEC, rule, rows=4, guided=True):
        assert got == expected
    assert got[0, 0, 0] == got[0, 2, 0] != got[0, 1, 0]


def test_a_sum_lasts_over_evictions_and_goes_with_its_token() -> None:
    policy = H2O(budget=2, recent=0, period=1)
    spec = Tiny(layers=1, heads=1, kv_heads=1).spec
    store = Store(spec, policy.plan(spec.grid, spec), 1, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(1, 1, dtype=torch.bool))
    looks = [{0: 0.3}, {0: 0.1, 1: 0.2}, {1: 0.1, 2: 0.25}, {1: 0.1, 3: 0.35}]
    for step, look in enumerate(looks):
        now = torch.tensor(step)
        slots = policy.select(store, now)
        policy.evict(store, slots)
        store.claim_(slots[..., 0], now)
        mass = torch.zeros(store.position.shape)
        for position, share in look.items():
            mass[store.position == position] = share
        policy.observe(store, Observation(mass), now)
    # 2 went before 3 came, in the same slot: 0.25 against 0.4 and 0.3.
    assert sorted(store.position[0, 0].tolist()) == [-2, 0, 1, 3]
    # 3 has 0.35 of its own, less than what 0 and 1 have from four queries.
    policy.evict(store, policy.select(store, torch.tensor(4)))
    assert sorted(store.position[0, 0].tolist()) == [-2, -1, 0, 1]


def test_half_of_the_budget_is_recent_unless_given() -> None:
    assert H2O(ratio="1/4").least_budget(Grid(24, 24)) == 72
    assert H2O(budget=9).least_budget(Grid(24, 24)) == 4
    assert H2O(budget=7, recent=7).plan(SPEC.grid, SPEC).budget == 7
    with pytest.raises(BudgetError, match=r"7 of 20 slots is below the 8.*smallest ratio that does is 8/20"):
        H2O(budget=7, recent=8).plan(SPEC.grid, SPEC)
    with pytest.raises(BudgetError, match="recent is -1"):
        H2O(budget=7, recent=-1)


class Blind(H2O):
    """Sees nothing but NaN."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        assert seen.mass is not None
        super().observe(store, Observation(torch.full_like(seen.mass, torch.nan)), step)


def test_scores_that_are_no_numbers_leave_the_recent_alone() -> None:
    for decoded, got, _, _, _ in drive(Blind(budget=6, recent=4), SPEC, lambda heads, decoded: None):
        for held in got.values():
            assert held[-4:] == list(range(decoded))[-4:]
            assert len(held) == min(decoded, 6)
