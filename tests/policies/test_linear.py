from dataclasses import replace

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Linear
from tiny import GRID, Tiny, random_tokens

from arkv import ArkvError, CachePlan, Grid, Observation, Store
from arkv.decoding.loop import Loop
from arkv.errors import BudgetError
from arkv.policies.linear import LineAR
from arkv.testing import Oracle
from arkv.testing.stores import positions

SPEC = Tiny().spec
few = settings(max_examples=max(1, settings().max_examples // 2))


@few
@given(st.data(), st.sampled_from([GRID, Grid(3, 3, newline=True), Grid(6, 2)]), st.integers(0, 50))
@torch.inference_mode()
def test_the_middle_is_ranked_by_the_last_lines_attention(data: st.DataObject, grid: Grid, seed: int) -> None:
    model = Tiny(grid, layers=data.draw(st.integers(1, 2)), seed=seed)
    policy, rule = data.draw(policies(grid))
    tokens = random_tokens(model, 2, seed)
    got, expected = oracle.watch(model, policy, [(1, 2, 3), (4,)], tokens, 1.5, rule)
    assume(rule.margin > 1e-5)
    assert got == expected


@few
@given(st.data(), st.sampled_from([GRID, Grid(3, 3, newline=True)]), st.integers(0, 50))
@torch.inference_mode()
def test_raw_ranks_by_the_dot_products_before_the_softmax(data: st.DataObject, grid: Grid, seed: int) -> None:
    model = Tiny(grid, seed=seed)
    policy, rule = data.draw(policies(grid, scoring="raw"))
    condition = model.condition([(1, 2, 3), (4,)], guided=True)
    tokens = random_tokens(model, 2, seed).repeat(2, 1)
    lists, loop = Oracle(model, condition), Loop(model, policy, *condition.mask.shape, "none", guided=True)
    lists.prefill()
    loop.prefill_(condition)
    for position in range(grid.tokens - 1):
        if position % grid.line == 0:
            lists.evict(rule, position)
        lists.advance(tokens[:, position], position)
        loop.advance_(tokens[:, position], position)
        for place, head in lists.heads.items():
            for entry in head:  # the lists sum up softmax weights of their own accord
                entry.score += lists.scores[place][entry.column] - lists.mass[place][entry.column]
        assume(rule.margin > 1e-4)
        assert positions(loop.store) == {place: lists.visual(*place) for place in lists.heads}


@st.composite
def policies(draw: st.DrawFn, grid: Grid, scoring: str = "softmax") -> tuple[LineAR, Linear]:
    """Any parameters on this grid, and the rule for lists."""
    anchors, recent = draw(st.integers(0, grid.line)), draw(st.integers(0, grid.line + 2))
    budget = draw(st.integers(max(1, anchors + recent), grid.tokens))
    policy = LineAR(budget=budget, anchors=anchors, recent=recent, scoring=scoring)
    return policy, Linear(budget, anchors, recent)


def lines_of(policy: LineAR, tokens: int, rows: int = 1) -> Store:
    """A store with `tokens` visual tokens decoded, in raster order, line by line."""
    store = Store(SPEC, policy.plan(GRID, SPEC), rows, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(rows, 1, dtype=torch.bool))
    for position in range(tokens):
        slots = store.starts[:, None] + 1 + position
        store.claim_(slots.expand(-1, rows, -1), torch.tensor(position))
    return store


def look(policy: LineAR, store: Store, at: dict[int, float], step: int) -> None:
    """One query that pays this much attention to these positions, and the rest to the condition."""
    mass = torch.zeros(store.position.shape)
    for position, share in at.items():
        mass[store.position == position] = share
    policy.observe(store, Observation(mass, -mass), torch.tensor(step))


def evicted(policy: LineAR, store: Store, step: int) -> list[int]:
    slots = policy.select(store, torch.tensor(step))
    policy.evict(store, slots)
    return sorted(set(range(step)) - set(positions(store)[0, 0, 0]))


# Nine slots kept of fourteen. Token 0 is the anchor, 10 to 13 are recent, 1 to 9 the middle.
LOOKS = {10: {1: 0.1, 2: 0.2, 3: 0.02, 4: 0.01, 6: 0.09, 9: 0.3}, 13: {4: 0.15, 7: 0.12, 3: 0.07}}


def test_a_worked_example() -> None:
    policy = LineAR(budget=9, anchors=1, recent=4)
    store = lines_of(policy, 14)
    for step, at in LOOKS.items():
        look(policy, store, at, step)
    # 9 has 0.3 in all, 2 has 0.2, 4 has 0.16, 7 has 0.12; of the others 1 has most, and no room is left.
    assert evicted(policy, store, 14) == [1, 3, 5, 6, 8]


def test_a_worked_example_of_raw_scores() -> None:
    """A dot product may be less than nothing, and then a token that was not looked at is worth more."""
    policy = LineAR(budget=9, anchors=1, recent=4, scoring="raw")
    store = lines_of(policy, 14)
    for step, at in LOOKS.items():
        look(policy, store, at, step)
    # 5 and 8 have 0, 3 has -0.09 as has 6, the older of which goes; 1 has -0.1.
    assert evicted(policy, store, 14) == [1, 2, 4, 7, 9]


def test_each_line_judges_anew() -> None:
    policy = LineAR(budget=8, anchors=0, recent=0)
    store = lines_of(policy, 10)
    look(policy, store, dict.fromkeys(range(5), 0.9), 9)
    assert evicted(policy, store, 10) == [5, 6]
    assert not store["score"].any()


def test_heads_and_rows_choose_for_themselves() -> None:
    policy = LineAR(budget=8, anchors=0, recent=0)
    store = lines_of(policy, 13, rows=2)
    mass = torch.rand(store.position.shape, generator=torch.Generator().manual_seed(0))
    policy.observe(store, Observation(mass), torch.tensor(12))
    policy.evict(store, policy.select(store, torch.tensor(13)))
    best = store.by_head(mass)[..., 1:14].argsort(-1, descending=True)[..., :8].sort(-1).values
    for (layer, row, head), held in positions(store).items():
        assert held == best[layer, row, head].tolist()


def test_two_lines_are_recent_or_one_where_two_do_not_fit() -> None:
    grid = Grid(24, 24)
    for budget, lines in ((4 + 48, 2), (144, 2), (4 + 47, 1), (4 + 24, 1)):
        policy = LineAR(budget=budget)
        assert policy.recent_tokens(grid) == lines * 24
        assert policy.least_budget(grid) == 4 + lines * 24
        assert policy.plan(grid, SPEC).budget == budget
    assert LineAR(budget=48, anchors=0).recent_tokens(grid) == 48
    assert LineAR(ratio="1/6").recent_tokens(Grid(48, 48, newline=True)) == 2 * 49
    assert LineAR(budget=8, recent=7).recent_tokens(grid) == 7


@torch.inference_mode()
@pytest.mark.parametrize(("budget", "recent"), [(13, 10), (11, 5), (7, 5)])
def test_recent_lines_that_are_not_given_are_those_that_fit(budget: int, recent: int) -> None:
    model, rule = Tiny(), Linear(budget, 2, recent)
    got, expected = oracle.watch(
        model, LineAR(budget=budget, anchors=2), [(1, 2, 3), (4,)], random_tokens(model, 2), 1.5, rule
    )
    assert got == expected


def test_a_way_to_score_that_there_is_not() -> None:
    with pytest.raises(ArkvError, match="scoring is 'sigmoid', expected 'softmax' or 'raw'"):
        LineAR(budget=8, scoring="sigmoid")  # type: ignore[arg-type]


def test_protected_tokens_have_to_fit() -> None:
    # The papers' budgets do: 1/6 and 1/4 of 576, 1/8 of 2352 and of 4160.
    for grid, ratio, slots in [
        (Grid(24, 24), "1/6", 96),
        (Grid(24, 24), "1/4", 144),
        (Grid(48, 48, newline=True), "1/8", 294),
        (Grid(64, 64, newline=True), "1/8", 520),
    ]:
        assert LineAR(ratio=ratio).plan(grid, SPEC) == CachePlan(budget=slots, period=grid.line)
    with pytest.raises(
        BudgetError, match=r"27 of 576 slots is below the 28.*smallest ratio that does is 28/576"
    ):
        LineAR(budget=27).plan(Grid(24, 24), SPEC)
    assert LineAR(ratio="28/576").plan(Grid(24, 24), SPEC).budget == 28
    with pytest.raises(BudgetError, match="smallest ratio that does is 52/576"):
        LineAR(budget=51, recent=48).plan(Grid(24, 24), SPEC)
    for wrong in ({"anchors": -1}, {"recent": -2}):
        (name,) = wrong
        with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}: expected 0 or more"):
            LineAR(budget=8, **wrong)


def test_a_whole_line_of_slots_comes_on_top_of_the_budget() -> None:
    # LlamaGen-XL in arXiv 2512.04857: 168 slots at a budget of 144, 120 at 96.
    spec = replace(SPEC, grid=Grid(24, 24))
    for budget, slots in ((144, 168), (96, 120)):
        assert LineAR(budget=budget).plan(spec.grid, spec).visual_slots(spec) == [[slots] * 2] * 2
