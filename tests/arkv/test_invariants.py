"""The seven invariants of a cache, for every policy that is registered, on tiny random models."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle
from tiny import LONGEST, POLICIES, WORDS, Tiny, build, legal_budgets, random_tokens
from torch import Tensor

from arkv import CachePolicy, Decoder, Grid, Store
from arkv.loop import Loop, recycle_
from arkv.store import CONDITION, FREE, PADDING

every_policy = pytest.mark.parametrize("name", POLICIES)
# Every example decodes a picture or two.
few = settings(max_examples=max(1, settings().max_examples // 4))

# Parameters worth varying, of the policies that have any.
PARAMETERS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "window": st.fixed_dictionaries({"sinks": st.integers(0, 4)}),
    "linear": st.fixed_dictionaries({"anchors": st.integers(0, 4), "recent": st.none() | st.integers(0, 6)}),
    "often": st.fixed_dictionaries(
        {"anchors": st.integers(0, 4), "recent": st.integers(0, 6), "every": st.integers(1, 9)}
    ),
    "random": st.fixed_dictionaries({"seed": st.integers(0, 9)}),
}


@dataclass
class Case:
    """A model, a policy and a batch."""

    model: Tiny
    policy: CachePolicy
    prompts: list[tuple[int, ...]]
    tokens: Tensor
    guidance: float

    def __repr__(self) -> str:
        return f"Case({self.model.spec}, {self.policy}, {self.prompts}, guidance={self.guidance})"

    @property
    def rows(self) -> Tensor:
        """The given tokens of every row."""
        return self.tokens if self.guidance == 1 else self.tokens.repeat(2, 1)

    def loop(self) -> tuple[Loop, Any]:
        """A loop for the batch, and its condition."""
        condition = self.model.condition(self.prompts, self.guidance != 1)
        return Loop(self.model, self.policy, *condition.mask.shape, "none"), condition


prompts = st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=LONGEST).map(tuple)


@st.composite
def cases(draw: st.DrawFn, name: str, whole: bool = False) -> Case:
    """Anything small; with `whole`, a budget that holds the picture."""
    grid = draw(st.builds(Grid, st.integers(2, 5), st.integers(2, 5), st.booleans()))
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (3, 1)]))
    model = Tiny(grid, draw(st.integers(1, 3)), kv_heads * group, kv_heads, seed=draw(st.integers(0, 99)))
    parameters = draw(PARAMETERS.get(name, st.just({})))
    legal = legal_budgets(name, model, **parameters)
    budget = grid.tokens + draw(st.integers(0, 2)) if whole else draw(st.sampled_from(legal))
    pictures = draw(st.lists(prompts, min_size=1, max_size=3))
    tokens = random_tokens(model, len(pictures), seed=draw(st.integers(0, 99)))
    return Case(model, build(name, budget, **parameters), pictures, tokens, draw(st.sampled_from([1.0, 1.7])))


def for_cases(whole: bool = False) -> Any:
    """Runs a test for every policy on random cases of it."""

    def decorate(test: Any) -> Any:
        @every_policy
        @few
        @given(data=st.data())
        @torch.inference_mode()
        def run(name: str, data: st.DataObject) -> None:
            test(data.draw(cases(name, whole)))

        run.__name__ = test.__name__
        return run

    return decorate


def advance(loop: Loop, case: Case, logits: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Decode the given tokens; yields the position decoded and the logits after it."""
    yield -1, logits
    for position in range(case.model.spec.grid.tokens - 1):
        yield position, loop.advance_(case.rows[:, position], position)


def visual(store: Store) -> Tensor:
    """Visual tokens held by each head."""
    return (store.position >= 0).sum(-1)


class Watched(CachePolicy):
    """A policy, with a look at the store after every eviction and at every mass."""

    def __init__(self, inner: CachePolicy) -> None:
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "fields", inner.fields)
        object.__setattr__(self, "needs_mass", True)
        object.__setattr__(self, "evictions", [])
        object.__setattr__(self, "masses", [])

    def plan(self, grid: Grid, spec: Any) -> Any:
        return self.inner.plan(grid, spec)

    def observe(self, store: Store, mass: Tensor, step: Tensor) -> None:
        self.masses.append((mass, store.resident.clone()))
        if self.inner.needs_mass:
            self.inner.observe(store, mass, step)

    def select(self, store: Store, step: Tensor) -> Tensor:
        before = {leaf: store[leaf].clone() for leaf in store.fields} | {"": store.position.clone()}
        slots = self.inner.select(store, step)
        after = {leaf: store[leaf] for leaf in store.fields} | {"": store.position}
        assert all(torch.equal(before[key], after[key]) for key in before), "select writes to the store"
        assert slots.dtype == torch.int64
        assert slots.shape == (*store.position.shape[:3], store.plan.period)
        return slots

    def evict(self, store: Store, slots: Tensor) -> None:
        before = store.position.clone()
        self.inner.evict(store, slots)
        self.evictions.append((before, slots.clone(), store.position.clone()))


@for_cases()
def test_1_no_head_holds_more_than_its_budget_after_an_eviction(case: Case) -> None:
    watched = Watched(case.policy)
    case.policy = watched
    loop, condition = case.loop()
    store, plan = loop.store, loop.store.plan
    assert store.capacity == store.condition + plan.visual_slots(case.model.spec.grid)
    for position, _ in advance(loop, case, loop.prefill_(condition)):
        assert visual(store).max() <= plan.budget + plan.period
        # What fits is held: a policy has no reason to let slots lie idle.
        assert visual(store).min() >= min(position + 1, plan.budget)
    assert len(watched.evictions) == -(-(case.model.spec.grid.tokens - 1) // plan.period)
    for _, _, after in watched.evictions:
        assert (after >= 0).sum(-1).max() <= plan.budget


@for_cases()
def test_2_the_condition_stays_and_no_token_stands_twice(case: Case) -> None:
    loop, condition = case.loop()
    words, padding = condition.mask.sum(1), (~condition.mask).sum(1)
    for position, _ in advance(loop, case, loop.prefill_(condition)):
        held = loop.store.position
        for marker, count in ((CONDITION, words), (PADDING, padding)):
            assert torch.equal((held == marker).sum(-1), count[None, :, None].expand(held.shape[:3]))
        assert held.max() == position
        assert held.min() >= PADDING
        for head in held.flatten(0, 2).tolist():
            tokens = [p for p in head if p >= 0]
            assert len(tokens) == len(set(tokens))


@for_cases()
def test_3_the_output_is_softmax_attention_over_exactly_what_is_held(case: Case) -> None:
    watched = Watched(case.policy)
    case.policy = watched
    loop, condition = case.loop()
    oracle = Oracle(case.model, condition)
    torch.testing.assert_close(loop.prefill_(condition), oracle.prefill(), atol=1e-4, rtol=1e-4)
    for position in range(case.model.spec.grid.tokens - 1):
        logits = loop.advance_(case.rows[:, position], position)
        held = {
            place: {p for p in loop.store.position[place].tolist() if 0 <= p < position}
            for place in oracle.heads
        }
        for place, head in oracle.heads.items():
            assert held[place] <= set(oracle.visual(*place)), "a token came back, or was never there"
            oracle.heads[place] = [e for e in head if e.position < 0 or e.position in held[place]]
        expected = oracle.advance(case.rows[:, position], position)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)

        mass, resident = watched.masses[-1]
        assert torch.equal(mass > 0, resident), "exactly the free slots get no mass"
        for place, weights in oracle.weights.items():
            order = loop.store.position[place]
            got = {p: m for p, m in zip(order.tolist(), mass[place].tolist(), strict=True) if p >= 0}
            expected_mass = {e.position: w for e, w in zip(oracle.heads[place], weights, strict=True)}
            for p, m in got.items():
                assert m == pytest.approx(expected_mass[p], abs=1e-4)


@for_cases()
def test_4_a_token_lives_until_the_eviction_after_its_birth(case: Case) -> None:
    watched = Watched(case.policy)
    case.policy = watched
    loop, condition = case.loop()
    born: set[int] = set()
    for position, _ in advance(loop, case, loop.prefill_(condition)):
        if position >= 0:
            born = {position} if position % loop.store.plan.period == 0 else born | {position}
            for head in loop.store.position.flatten(0, 2).tolist():
                assert born <= set(head)
    for before, slots, after in watched.evictions:
        chosen = torch.zeros_like(before, dtype=torch.bool).scatter(-1, slots, True)
        assert torch.equal(after == FREE, chosen | (before == FREE))
        assert torch.equal(after[~chosen], before[~chosen])
        assert (chosen.sum(-1) == slots.shape[-1]).all(), "slots are named once"
        # Nothing is given up while a free slot is left.
        gives_up = (chosen & (before >= 0)).any(-1)
        assert not (gives_up & ((before == FREE) & ~chosen).any(-1)).any()


@for_cases(whole=True)
def test_5_a_budget_for_the_whole_picture_gives_the_logits_of_a_causal_pass(case: Case) -> None:
    with torch.no_grad():
        expected = case.model.causal_logits(case.model.condition(case.prompts, case.guidance != 1), case.rows)
    forced = Decoder(case.model, case.policy).teacher_force(case.prompts, case.tokens, case.guidance)
    torch.testing.assert_close(forced.raw, expected, atol=1e-4, rtol=1e-4)


def shuffle_(store: Store, seed: int) -> None:
    """Let the tokens of every head, with all that is known of them, change places."""
    generator = torch.Generator().manual_seed(seed)
    for place in numpy.ndindex(*store.position.shape[:3]):
        layer, row, head = place
        taken = (store.position[place] != FREE).nonzero()[:, 0]
        order = taken[torch.randperm(len(taken), generator=generator)]
        for leaf in (store.position, *(store[field] for field in store.fields)):
            leaf[place][taken] = leaf[place][order]
        for leaf in (store.keys[layer], store.values[layer]):
            slots = leaf.view(store.rows, store.kv_heads, store.capacity, -1)[row, head]
            slots[taken] = slots[order]


@for_cases()
def test_6_the_order_of_the_slots_makes_no_difference(case: Case) -> None:
    (loop, condition), (other, _) = case.loop(), case.loop()
    steps = advance(loop, case, loop.prefill_(condition))
    shuffled = advance(other, case, other.prefill_(condition))
    for (position, logits), (_, same) in zip(steps, shuffled, strict=True):
        torch.testing.assert_close(same, logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(other.store.position.sort(-1).values, loop.store.position.sort(-1).values)
        if (position + 1) % loop.store.plan.period == 0:  # between, the slots to come are named already
            shuffle_(other.store, seed=position + 1)


@for_cases()
def test_6_rows_do_not_know_of_each_other(case: Case) -> None:
    decoder = Decoder(case.model, case.policy)
    together = decoder.teacher_force(case.prompts, case.tokens, case.guidance)
    for index, prompt in enumerate(case.prompts):
        alone = decoder.teacher_force([prompt], case.tokens[[index]], case.guidance)
        torch.testing.assert_close(alone.guided[0], together.guided[index], atol=1e-4, rtol=1e-4)
        rows = [index] if case.guidance == 1 else [index, index + len(case.prompts)]
        torch.testing.assert_close(alone.raw, together.raw[rows], atol=1e-4, rtol=1e-4)


@contextmanager
def nothing_moves(store: Store) -> Iterator[None]:
    """Checks that every leaf stays where it is, and the store locked."""

    def leaves() -> dict[Any, tuple[int, torch.Size]]:
        items = store.tensors.items(include_nested=True, leaves_only=True)
        return {name: (leaf.data_ptr(), leaf.shape) for name, leaf in items}

    before = leaves()
    yield
    assert leaves() == before
    assert store.tensors.is_locked
    held = [store.position, *(store[field] for field in store.fields), *store.keys, *store.values]
    assert {leaf.data_ptr() for leaf in held} == {address for address, _ in before.values()}


@every_policy
@torch.inference_mode()
def test_7_the_verbs_are_one_graph_each_and_leave_the_store_in_place(name: str) -> None:
    model = Tiny()
    case = Case(
        model, build(name, legal_budgets(name, model)[1]), [(1, 2), (3,)], random_tokens(model, 2), 1.5
    )
    (loop, condition), (traced, _) = case.loop(), case.loop()
    torch._dynamo.reset()

    recycle = torch.compile(recycle_, fullgraph=True, backend="aot_eager", dynamic=False)
    observe = torch.compile(case.policy.observe, fullgraph=True, backend="aot_eager", dynamic=False)
    store = loop.store
    loop.prefill_(condition)
    traced.prefill_(condition)
    generator = torch.Generator().manual_seed(0)
    with nothing_moves(traced.store):
        for position in range(model.spec.grid.tokens):
            step = torch.tensor(position)
            if position % store.plan.period == 0:
                slots = recycle_(case.policy, store, step)
                assert torch.equal(recycle(case.policy, traced.store, step), slots)
            chosen = slots[..., position % store.plan.period]
            store.claim_(chosen, step)
            traced.store.claim_(chosen, step)
            if case.policy.needs_mass:
                mass = torch.rand(store.position.shape, generator=generator) * store.resident
                case.policy.observe(store, mass, step)
                observe(traced.store, mass, step)
            assert torch.equal(traced.store.position, store.position)
            assert all(torch.equal(traced.store[f], store[f]) for f in store.fields)


@every_policy
@torch.inference_mode()
def test_7_decoding_leaves_the_store_in_place(name: str) -> None:
    model = Tiny()
    case = Case(
        model, build(name, legal_budgets(name, model)[0]), [(1, 2), (3,)], random_tokens(model, 2), 1.5
    )
    loop, condition = case.loop()
    with nothing_moves(loop.store):
        for _ in range(2):
            for _step in advance(loop, case, loop.prefill_(condition)):
                pass
