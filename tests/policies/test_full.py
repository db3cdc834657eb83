from dataclasses import replace

import oracle
import pytest
import torch
from tiny import GRID, Tiny, random_tokens

from arkv import Grid, load_policy
from arkv.policies.full import FullCache

SPEC = Tiny().spec


@pytest.mark.parametrize("grid", [GRID, Grid(3, 3, newline=True), Grid(1, 7), Grid(7, 1)], ids=str)
@torch.inference_mode()
def test_every_token_stays(grid: Grid) -> None:
    model = Tiny(grid)
    got, expected = oracle.watch(
        model, FullCache(), [(1, 2), (3,)], random_tokens(model, 2), 1.5, oracle.keep_all
    )
    assert got == expected
    for position, heads in got.items():
        assert all(held == list(range(position + 1)) for held in heads.values())


def test_there_is_a_slot_for_every_token_and_none_to_spare() -> None:
    for grid in (GRID, Grid(24, 24), Grid(48, 48, newline=True)):
        plan = FullCache().plan(grid, SPEC)
        spec = replace(SPEC, grid=grid)
        assert plan.budgets(spec) == plan.visual_slots(spec) == [[grid.tokens] * 2] * 2


def test_it_costs_nothing_to_look_at_and_has_nothing_to_set() -> None:
    assert not FullCache.needs
    assert not FullCache.fields
    assert load_policy("full") == FullCache()
