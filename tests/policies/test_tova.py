import torch
from driver import Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from arkv import Grid, Observation, Store
from arkv.policies.tova import TOVA

few = settings(max_examples=max(1, settings().max_examples // 2))


@few
@given(st.data(), st.integers(0, 99))
def test_the_newest_query_decides(data: st.DataObject, seed: int) -> None:
    grid = data.draw(st.sampled_from([Grid(4, 5), Grid(3, 3, newline=True), Grid(1, 9)]))
    kv_heads = data.draw(st.integers(1, 3))
    spec = Tiny(grid, layers=2, heads=kv_heads, kv_heads=kv_heads).spec
    budget = data.draw(st.integers(1, grid.tokens))
    period = data.draw(st.none() | st.integers(1, 7))

    def rule(heads: Heads, decoded: int) -> None:
        for head in heads.values():
            gone = lowest(head.held, head.sums("mass", since=decoded - 1), len(head.held) - budget)
            head.held = [p for p in head.held if p not in gone]

    for _, got, expected, _, _ in drive(TOVA(budget=budget, period=period), spec, rule, seed=seed):
        assert got == expected


class Blind(TOVA):
    """Sees nothing but NaN."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        assert seen.mass is not None
        super().observe(store, Observation(torch.full_like(seen.mass, torch.nan)), step)


def test_without_a_number_to_go_by_the_newest_stay() -> None:
    for decoded, got, _, _, _ in drive(Blind(budget=6), Tiny().spec, lambda heads, decoded: None):
        assert all(held == list(range(decoded))[-6:] for held in got.values())
