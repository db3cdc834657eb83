import pytest
import torch
from driver import Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from arkv import Grid, Observation, Store
from arkv.errors import ArkvError, BudgetError
from arkv.policies.snapkv import SnapKV

SPEC = Tiny(Grid(4, 5), layers=1, heads=1, kv_heads=1).spec
few = settings(max_examples=max(1, settings().max_examples // 2))


def neighbours(grid: Grid, position: int, kernel: int, dimensions: int) -> list[int]:
    """The visual tokens that share votes with one, itself among them."""
    reach = range(-(kernel // 2), kernel // 2 + 1)
    if dimensions == 1:
        return [position + i for i in reach if 0 <= position + i < grid.tokens]
    row, column = grid.row(position), grid.column(position)
    square = [(row + i, column + j) for i in reach for j in reach]
    return [r * grid.line + c for r, c in square if 0 <= r < grid.rows and 0 <= c < grid.line]


@few
@given(st.data(), st.integers(0, 99))
def test_the_pooled_votes_of_the_window_decide(data: st.DataObject, seed: int) -> None:
    grid = data.draw(st.sampled_from([Grid(4, 5), Grid(4, 3, newline=True), Grid(1, 9)]))
    kv_heads = data.draw(st.integers(1, 3))
    spec = Tiny(grid, layers=2, heads=kv_heads, kv_heads=kv_heads).spec
    period = data.draw(st.none() | st.integers(1, 7))
    last = grid.line if period is None else period
    window = data.draw(st.none() | st.integers(1, last))
    newest = min(grid.line, last) if window is None else window
    budget = data.draw(st.integers(min(newest, grid.tokens), grid.tokens))
    kernel = data.draw(st.sampled_from([1, 3, 5]))
    pooling = data.draw(st.sampled_from(["avg", "max"]))
    dimensions = data.draw(st.sampled_from([1, 2]))

    def rule(heads: Heads, decoded: int) -> None:
        for head in heads.values():
            old = [p for p in head.held if p < decoded - newest]
            votes = head.sums("mass", since=decoded - newest)
            shared = {
                p: [votes[q] if q in old else 0.0 for q in neighbours(grid, p, kernel, dimensions)]
                for p in old
            }
            score = {p: max(v) if pooling == "max" else sum(v) for p, v in shared.items()}
            gone = lowest(old, score, len(head.held) - budget)
            head.held = [p for p in head.held if p not in gone]

    policy = SnapKV(
        budget=budget, window=window, period=period, kernel=kernel, pooling=pooling, dimensions=dimensions
    )
    for _, got, expected, _, _ in drive(policy, spec, rule, seed=seed):
        assert got == expected


def kept(policy: SnapKV, votes: dict[int, float]) -> list[int]:
    """What a full head keeps of the tokens before its window, given what the newest token looked at."""
    assert policy.budget is not None
    decoded = policy.budget + 5
    store = Store(SPEC, policy.plan(SPEC.grid, SPEC), 1, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(1, 1, dtype=torch.bool))
    for position in range(decoded):
        store.claim_(torch.full((1, 1, 1), 1 + position), torch.tensor(position))
    mass = torch.zeros(store.position.shape)
    for position, share in votes.items():
        mass[store.position == position] = share
    policy.observe(store, Observation(mass), torch.tensor(decoded - 1))
    policy.evict(store, policy.select(store, torch.tensor(decoded)))
    return sorted(p for p in store.position[0, 0].tolist() if 0 <= p < decoded - 5)


def test_a_vote_is_shared_with_the_neighbours() -> None:
    # Ten tokens to choose from and five slots for them, next to the line in the window.
    votes = {5: 0.5, 2: 0.1}
    assert kept(SnapKV(budget=10, kernel=1), votes) == [2, 5, 7, 8, 9]
    # Along the raster 4 is next to 5.
    assert kept(SnapKV(budget=10, kernel=3), votes) == [2, 3, 4, 5, 6]
    # On the grid 0, 1 and 6 are, and 4 is not: four of nine.
    assert kept(SnapKV(budget=9, kernel=3, dimensions=2), votes) == [0, 1, 5, 6]
    # 1 has two neighbours of 0.3, and 4 and 5 share a greater one.
    votes = {0: 0.3, 2: 0.3, 5: 0.5}
    assert kept(SnapKV(budget=6, kernel=3), votes) == [1]
    assert kept(SnapKV(budget=6, kernel=3, pooling="max"), votes) == [5]


def test_the_window_is_a_line_or_the_period() -> None:
    grid = Grid(24, 24)
    assert SnapKV(budget=96).least_budget(grid) == 24
    assert SnapKV(budget=96, period=6).least_budget(grid) == 6
    assert SnapKV(budget=96, period=48).least_budget(grid) == 24
    assert SnapKV(budget=24).plan(grid, SPEC).budget == 24
    with pytest.raises(BudgetError, match=r"23 of 576 slots is below the 24.*smallest ratio.*is 24/576"):
        SnapKV(budget=23).plan(grid, SPEC)
    with pytest.raises(BudgetError, match=r"window of 32 queries.*24 visual tokens apart.*at most 24"):
        SnapKV(budget=96, window=32).plan(grid, SPEC)


def test_parameters_that_cannot_be() -> None:
    for wrong in ({"window": 0}, {"kernel": 4}, {"kernel": -1}):
        (name,) = wrong
        with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}"):
            SnapKV(budget=8, **wrong)
    with pytest.raises(ArkvError, match="pooling is 'mean', expected 'avg' or 'max'"):
        SnapKV(budget=8, pooling="mean")  # type: ignore[arg-type]
    with pytest.raises(ArkvError, match="dimensions is 3, expected 1 or 2"):
        SnapKV(budget=8, dimensions=3)  # type: ignore[arg-type]


class Blind(SnapKV):
    """Sees nothing but NaN."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        assert seen.mass is not None
        super().observe(store, Observation(torch.full_like(seen.mass, torch.nan)), step)


def test_scores_that_are_no_numbers_leave_the_window_alone() -> None:
    for decoded, got, _, _, _ in drive(Blind(budget=7, window=4), SPEC, lambda heads, decoded: None):
        for held in got.values():
            assert held[-4:] == list(range(decoded))[-4:]
            assert len(held) == min(decoded, 7)
