import itertools

import numpy
import oracle
import torch
from scipy.stats import chisquare
from tiny import GRID, Tiny, random_tokens

from arkv import Grid, Store
from arkv.decoding.step import recycle_
from arkv.policies.random import Random
from arkv.testing.stores import positions

SPEC = Tiny().spec
Samples = dict[tuple[int, ...], set[int]]


def survivors(policy: Random, rows: int = 1, grid: Grid = GRID, layers: int = 2) -> dict[int, Samples]:
    """What each head holds after each eviction: step -> (layer, row, head) -> positions."""
    spec = Tiny(grid, layers=layers).spec
    store = Store(spec, policy.plan(grid, spec), rows, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(rows, 1, dtype=torch.bool))
    history = {}
    for position in range(grid.tokens):
        step = torch.tensor(position)
        if position % store.plan.period == 0:
            slots = recycle_(policy, store, step)
            history[position] = {place: set(held) for place, held in positions(store).items()}
        store.claim_(slots[..., position % store.plan.period], step)
    return history


@torch.inference_mode()
def test_the_sample_is_of_the_whole_past_and_of_the_size_of_the_budget() -> None:
    for step, samples in survivors(Random(budget=7)).items():
        for held in samples.values():
            assert held <= set(range(step))
            assert len(held) == min(step, 7)


def test_a_larger_budget_keeps_what_a_smaller_one_keeps() -> None:
    """So the best of one fixed order are kept, which is what makes the sample uniform at all times."""
    nested = [survivors(Random(budget=budget, seed=3)) for budget in (3, 4, 8, 15)]
    for smaller, larger in itertools.pairwise(nested):
        for step, samples in smaller.items():
            assert all(held <= larger[step][place] for place, held in samples.items())


def test_layers_heads_and_seeds_draw_for_themselves_and_rows_do_not() -> None:
    last = survivors(Random(budget=6), rows=2)[15]
    assert len({frozenset(held) for (_, row, _), held in last.items() if row == 0}) == 4
    assert all(held == last[layer, 0, head] for (layer, _, head), held in last.items())
    assert survivors(Random(budget=6), rows=2) == survivors(Random(budget=6), rows=2)
    assert survivors(Random(budget=6, seed=1), rows=2)[15] != last


def test_every_token_survives_as_often_as_any_other() -> None:
    grid = Grid(6, 4)
    counts = numpy.zeros(20)
    for seed in range(100):
        for held in survivors(Random(budget=5, seed=seed), grid=grid, layers=4)[20].values():
            counts[list(held)] += 1
    assert counts.sum() == 100 * 8 * 5
    assert chisquare(counts).pvalue > 1e-3


def test_any_whole_number_is_a_seed() -> None:
    for seed in (-1, 2**31, 2**63, -(10**30)):
        assert all(len(held) == 7 for held in survivors(Random(budget=7, seed=seed))[15].values())


@torch.inference_mode()
def test_a_picture_loses_some_tokens() -> None:
    model = Tiny()
    got, kept = oracle.watch(model, Random(budget=7), [(1, 2)], random_tokens(model, 1), 1.0, oracle.keep_all)
    assert all(set(held) <= set(kept[18][place]) for place, held in got[18].items())
    assert {len(held) for held in got[18].values()} == {7 + 4}
