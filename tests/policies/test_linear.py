import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import Linear
from tiny import GRID, Tiny, random_tokens

from arkv import CachePlan, Grid, Store
from arkv.errors import BudgetError
from arkv.policies.linear import LineAR

SPEC = Tiny().spec
few = settings(max_examples=max(1, settings().max_examples // 2))


@few
@given(st.data(), st.sampled_from([GRID, Grid(3, 3, newline=True), Grid(6, 2)]), st.integers(0, 50))
@torch.inference_mode()
def test_the_middle_is_ranked_by_the_last_lines_attention(data: st.DataObject, grid: Grid, seed: int) -> None:
    model = Tiny(grid, layers=data.draw(st.integers(1, 2)), seed=seed)
    anchors, recent = data.draw(st.integers(0, grid.line)), data.draw(st.integers(0, grid.line + 2))
    budget = data.draw(st.integers(max(1, anchors + recent), grid.tokens))
    rule = Linear(budget, anchors, recent)
    got, expected = oracle.watch(
        model,
        LineAR(budget=budget, anchors=anchors, recent=recent),
        [(1, 2, 3), (4,)],
        random_tokens(model, 2, seed),
        1.5,
        rule,
    )
    assume(rule.margin > 1e-5)
    assert got == expected


def lines_of(policy: LineAR, tokens: int) -> Store:
    """A store of a single head with `tokens` visual tokens decoded, in raster order, line by line."""
    plan: CachePlan = policy.plan(GRID, SPEC)
    store = Store(SPEC, plan, 1, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(1, 1, dtype=torch.bool))
    for position in range(tokens):
        store.claim_(torch.full((SPEC.layers, 1, SPEC.kv_heads), 1 + position), torch.tensor(position))
    return store


def look(policy: LineAR, store: Store, at: dict[int, float], step: int) -> None:
    """One query that pays this much attention to these positions, and the rest to the condition."""
    mass = torch.zeros(store.position.shape)
    for position, share in at.items():
        mass[store.position == position] = share
    policy.observe(store, mass, torch.tensor(step))


def evicted(policy: LineAR, store: Store, step: int) -> list[int]:
    slots = policy.select(store, torch.tensor(step))
    policy.evict(store, slots)
    return sorted(set(range(step)) - set(store.position[0, 0, 0].tolist()))


def test_a_worked_example() -> None:
    # Nine slots kept of fourteen. Token 0 is the anchor, 10 to 13 are recent, 1 to 9 the middle.
    policy = LineAR(budget=9, anchors=1, recent=4)
    store = lines_of(policy, 14)
    look(policy, store, {1: 0.1, 2: 0.2, 3: 0.02, 4: 0.01, 6: 0.09, 9: 0.3}, 10)
    look(policy, store, {4: 0.15, 7: 0.12, 3: 0.07}, 13)
    # 9 has 0.3 in all, 2 has 0.2, 4 has 0.16, 7 has 0.12; of the others 1 has most, and no room is left.
    assert evicted(policy, store, 14) == [1, 3, 5, 6, 8]


def test_each_line_judges_anew() -> None:
    policy = LineAR(budget=8, anchors=0, recent=0)
    store = lines_of(policy, 10)
    look(policy, store, dict.fromkeys(range(5), 0.9), 9)
    assert evicted(policy, store, 10) == [5, 6]
    assert not store["score"].any()


def test_heads_and_rows_choose_for_themselves() -> None:
    policy = LineAR(budget=8, anchors=0, recent=0)
    plan = policy.plan(GRID, SPEC)
    store = Store(SPEC, plan, 2, 1, policy.fields, torch.float32)
    store.reset_(torch.ones(2, 1, dtype=torch.bool))
    for position in range(13):
        store.claim_(torch.full((2, 2, 2), 1 + position), torch.tensor(position))
    mass = torch.rand(store.position.shape, generator=torch.Generator().manual_seed(0))
    policy.observe(store, mass, torch.tensor(12))
    policy.evict(store, policy.select(store, torch.tensor(13)))
    for place in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        layer, row, head = place
        best = mass[layer, row, head, 1:].argsort(descending=True)[:8].sort().values
        assert (store.position[layer, row, head] >= 0).nonzero()[:, 0].sub(1).tolist() == best.tolist()


def test_four_anchors_and_two_recent_lines_unless_given() -> None:
    assert LineAR(budget=8).least_budget(Grid(24, 24)) == 4 + 48
    assert LineAR(budget=8).least_budget(Grid(48, 48, newline=True)) == 4 + 98
    assert LineAR(budget=8, anchors=0, recent=7).least_budget(Grid(24, 24)) == 7


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
        BudgetError, match=r"51 of 576 slots is below the 52.*smallest ratio that does is 52/576"
    ):
        LineAR(budget=51).plan(Grid(24, 24), SPEC)
    assert LineAR(ratio="52/576").plan(Grid(24, 24), SPEC).budget == 52
    for wrong in ({"anchors": -1}, {"recent": -2}):
        (name,) = wrong
        with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}: expected 0 or more"):
            LineAR(budget=8, **wrong)


def test_a_whole_line_of_slots_comes_on_top_of_the_budget() -> None:
    # LlamaGen-XL in arXiv 2512.04857: 168 slots at a budget of 144, 120 at 96.
    for budget, slots in ((144, 168), (96, 120)):
        assert LineAR(budget=budget).plan(Grid(24, 24), SPEC).visual_slots(Grid(24, 24)) == slots
