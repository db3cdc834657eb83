from collections.abc import Iterator

import numpy
import pytest
import torch
from driver import Place, held
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny

from arkv import Grid, Observation, Store
from arkv.decoding.step import recycle_
from arkv.errors import BudgetError
from arkv.model import ModelSpec
from arkv.policies.diagonal import Diagonal

SPEC = Tiny(Grid(4, 5), layers=2, heads=4, kv_heads=2).spec
few = settings(max_examples=max(1, settings().max_examples // 2))
Seen = dict[Place, list[int]]


def decode(
    policy: Diagonal, spec: ModelSpec, attention: numpy.ndarray, guided: bool = False
) -> Iterator[Seen]:
    """The visual tokens that each token attends to.

    Args:
        policy: what to run.
        spec: the model's shape.
        attention: by token that looks, layer, row, head and token looked at, wherever it may be.
        guided: whether rows are pairs.
    """
    plan, rows = policy.plan(spec.grid, spec), attention.shape[2]
    store = Store(
        spec, plan, rows, 2, policy.fields, torch.float32, head_fields=policy.head_fields, guided=guided
    )
    store.reset_(torch.ones(rows, 2, dtype=torch.bool))
    for step in range(spec.grid.tokens):
        now = torch.tensor(step)
        if step % plan.period == 0:
            slots = recycle_(policy, store, now)
        store.claim_(slots[..., step % plan.period], now)
        visible = store.resident & policy.visible(store, now)
        assert visible[store.position == -2].all(), "the condition is always attended to"
        flat = torch.from_numpy(attention[step]).float().flatten(2)
        index = store.head * spec.grid.tokens + store.position.clamp(min=0)
        mass = flat.gather(-1, index.clamp(max=flat.shape[-1] - 1)) * visible
        policy.observe(store, Observation(mass), now)
        yield held(masked(store, visible))


def masked(store: Store, visible: torch.Tensor) -> Store:
    """A look at the store in which tokens that are not visible are free."""
    view = object.__new__(Store)
    view.__dict__ = store.__dict__ | {"position": torch.where(visible, store.position, -1)}
    return view


def paper(attention: numpy.ndarray, resident: int, attended: int, sinks: int) -> Iterator[list[int]]:
    """The listing of the paper for one head, with a list of positions to skip.

    Args:
        attention: by token that looks and token looked at.
        resident: the window.
        attended: of these at a time.
        sinks: first tokens that are never skipped nor dropped.
    """
    skip: list[int] = []
    for t in range(len(attention)):
        window = [j for j in range(t + 1) if j < sinks or j > t - (resident - sinks)]
        skip = [j + 1 for j in skip]
        attend = [j for j in window if j < sinks or j not in skip]
        yield attend
        if attended - 1 <= t < resident and len(skip) < resident - attended:
            skip.append(min((j for j in attend if j >= sinks), key=lambda j: attention[t, j]))


@few
@given(st.data(), st.integers(0, 99))
def test_what_is_attended_to_is_what_the_paper_lists(data: st.DataObject, seed: int) -> None:
    grid = data.draw(st.sampled_from([Grid(4, 5), Grid(3, 3, newline=True), Grid(1, 9)]))
    kv_heads = data.draw(st.integers(1, 3))
    spec = Tiny(grid, layers=2, heads=kv_heads, kv_heads=kv_heads).spec
    sinks = data.draw(st.integers(0, 3))
    resident = data.draw(st.integers(sinks + 1, grid.tokens))
    attended = data.draw(st.integers(sinks + 1, resident))
    period = data.draw(st.none() | st.integers(1, 7))
    rows = data.draw(st.integers(1, 2))
    shape = (grid.tokens, spec.layers, rows, kv_heads, grid.tokens)
    # Whole numbers: some are equal.
    attention = numpy.random.default_rng(seed).integers(1, 30, size=shape) / 32
    policy = Diagonal(budget=resident, attended=attended, sinks=sinks, period=period)
    expected = {
        (layer, row, head): list(paper(attention[:, layer, row, head], resident, attended, sinks))
        for layer, row, head in numpy.ndindex(spec.layers, rows, kv_heads)
    }
    for step, seen in enumerate(decode(policy, spec, attention)):
        assert seen == {place: steps[step] for place, steps in expected.items()}
        assert all(len(tokens) == min(step + 1, attended) for tokens in seen.values())


def test_what_is_skipped_moves_along_with_the_newest_token() -> None:
    attention = numpy.random.default_rng(0).random((20, 2, 1, 2, 20))
    lags = [
        {place: {step - p for p in tokens} for place, tokens in seen.items()}
        for step, seen in enumerate(decode(Diagonal(budget=10, attended=4), SPEC, attention))
    ]
    assert all(later == lags[9] for later in lags[10:])
    assert len({frozenset(distances) for distances in lags[9].values()}) > 1, "heads differ at all"


def test_both_rows_of_a_picture_skip_the_same_if_they_are_to() -> None:
    attention = numpy.random.default_rng(0).random((20, 2, 2, 2, 20))
    policy = Diagonal(budget=10, attended=4, share_rows=True)
    *_, last = decode(policy, SPEC, attention, guided=True)
    both = attention.sum(axis=2)
    for layer, row, head in numpy.ndindex(2, 2, 2):
        *_, expected = paper(both[:, layer, head], 10, 4, 0)
        assert last[layer, row, head] == expected


def test_half_of_the_window_is_attended_to_unless_all_is_resident() -> None:
    grid = Grid(24, 24)
    assert Diagonal(ratio="1/6").attended_tokens(grid) == 48
    assert Diagonal(budget=5, sinks=4).attended_tokens(grid) == 5
    assert Diagonal(budget=576).attended_tokens(grid) == Diagonal(budget=999).attended_tokens(grid) == 576
    assert Diagonal(budget=576, attended=58).attended_tokens(grid) == 58


def test_parameters_that_cannot_be() -> None:
    with pytest.raises(BudgetError, match="attended is 0: expected at least 1"):
        Diagonal(budget=8, attended=0)
    with pytest.raises(BudgetError, match="attended is 4: expected at least 5"):
        Diagonal(budget=8, attended=4, sinks=4)
    with pytest.raises(BudgetError, match=r"attended is 9, but only 8 of 20 visual tokens are resident"):
        Diagonal(budget=8, attended=9).plan(SPEC.grid, SPEC)
    with pytest.raises(BudgetError, match="4 of 20 slots is below the 5"):
        Diagonal(budget=4, sinks=4).plan(SPEC.grid, SPEC)


def test_attention_that_is_no_number_still_leaves_as_many_to_look_at() -> None:
    attention = numpy.full((20, 2, 1, 2, 20), numpy.nan)
    for step, seen in enumerate(decode(Diagonal(budget=10, attended=4), SPEC, attention)):
        assert all(len(tokens) == min(step + 1, 4) for tokens in seen.values())
