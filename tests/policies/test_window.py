import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, Tiny, random_tokens

from arkv import Grid
from arkv.errors import BudgetError
from arkv.policies.window import SlidingWindow, StreamingLLM

SPEC = Tiny().spec


@given(st.data(), st.sampled_from([GRID, Grid(3, 3, newline=True), Grid(6, 2)]))
@torch.inference_mode()
def test_the_first_and_the_newest_stay(data: st.DataObject, grid: Grid) -> None:
    model = Tiny(grid, layers=1, heads=2)
    sinks = data.draw(st.integers(0, grid.tokens))
    budget = data.draw(st.integers(max(1, sinks), grid.tokens))
    got, expected = oracle.watch(
        model,
        SlidingWindow(budget=budget, sinks=sinks),
        [(1, 2)],
        random_tokens(model, 1),
        1.0,
        oracle.window(budget, sinks),
    )
    assert got == expected


@torch.inference_mode()
def test_a_worked_example() -> None:
    # Lines of five, eight slots kept, two of them sinks: at the end of the second line there are ten.
    model = Tiny()
    policy = SlidingWindow(budget=8, sinks=2)
    got, _ = oracle.watch(model, policy, [(1,)], random_tokens(model, 1), 1.0, oracle.keep_all)
    line = {position: heads[0, 0, 0] for position, heads in got.items()}
    assert line[9] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert line[10] == [0, 1, 4, 5, 6, 7, 8, 9, 10]
    assert line[14] == [0, 1, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert line[15] == [0, 1, 9, 10, 11, 12, 13, 14, 15]


@torch.inference_mode()
def test_streaming_is_the_window_with_four_sinks() -> None:
    assert SlidingWindow(budget=8).sinks == 0
    model = Tiny()
    watched = [
        oracle.watch(model, policy, [(1,)], random_tokens(model, 1), 1.0, oracle.keep_all)[0]
        for policy in (StreamingLLM(budget=8), SlidingWindow(budget=8, sinks=4))
    ]
    assert watched[0] == watched[1]


def test_sinks_have_to_fit() -> None:
    assert StreamingLLM(budget=4).plan(GRID, SPEC).budget == 4
    with pytest.raises(BudgetError, match=r"3 of 20 slots is below the 4.*smallest ratio that does is 4/20"):
        StreamingLLM(budget=3).plan(GRID, SPEC)
    with pytest.raises(BudgetError, match="sinks is -1"):
        SlidingWindow(budget=3, sinks=-1)


def test_attention_is_not_looked_at() -> None:
    assert not SlidingWindow.needs
    assert not SlidingWindow.fields
