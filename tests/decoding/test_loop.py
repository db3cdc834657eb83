"""The loop over heads of unequal size, and what it asks of a policy."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, ClassVar

import numpy
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracle import WORD
from tiny import GRID, Tiny, build, random_tokens, tight
from torch import Tensor

from arkv import (
    ArkvError,
    CachePlan,
    CachePolicy,
    Condition,
    Decoder,
    Grid,
    ModelSpec,
    Observation,
    RankedPolicy,
    Store,
)
from arkv.attention import operators
from arkv.decoding.checks import check_selection
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.errors import NumericalError
from arkv.policies.window import SlidingWindow
from arkv.testing import Oracle
from arkv.testing.oracle import Place
from arkv.testing.stores import positions

few = settings(max_examples=max(1, settings().max_examples // 3))
PROMPTS = [(1, 2, 3), (4,)]
UNEQUAL = ((1, 9), (5, 3))
Kind = Callable[..., RankedPolicy]
Groups = list[tuple[list[Place], int]]


def side_by_side(
    model: Tiny, policy: CachePolicy, guided: bool = True, seed: int = 0
) -> Iterator[tuple[int, Loop, Oracle, Tensor]]:
    """Before each token: its position, loop and lists, prefilled, and the tokens of the rows."""
    condition = model.condition(PROMPTS, guided)
    loop = Loop(model, policy, *condition.mask.shape, "none", guided)
    lists = Oracle(model, condition)
    torch.testing.assert_close(loop.prefill_(condition), lists.prefill(), atol=1e-4, rtol=1e-4)
    tokens = random_tokens(model, len(PROMPTS), seed).repeat(1 + guided, 1)
    for position in range(model.spec.grid.tokens - 1):
        yield position, loop, lists, tokens[:, position]


# Heads of unequal size


def groups_of(plan: CachePlan, spec: ModelSpec, rows: int) -> Groups:
    """Heads that have their slots in common, and how many visual tokens they hold after an eviction."""
    groups: Groups = []
    # Nobody has slots for more than whole periods of tokens, a period of which is free after an eviction.
    most = (spec.grid.tokens - 1) // plan.period * plan.period
    for (layer, budgets), row in ((pair, row) for pair in enumerate(plan.budget) for row in range(rows)):
        heads = [((layer, row, head), min(budget, most)) for head, budget in enumerate(budgets)]
        if plan.shared:
            groups.append(([place for place, _ in heads], sum(limit for _, limit in heads)))
        else:
            groups += [([place], limit) for place, limit in heads]
    return groups


def evict(lists: Oracle, groups: Groups) -> float:
    """Give up what was looked at least, of equal tokens the oldest; the least difference that decided."""
    margin = numpy.inf
    for places, limit in groups:
        tokens = [
            (place, entry) for place in places for entry in lists.heads[place] if entry.position != WORD
        ]
        tokens.sort(key=lambda token: (token[1].score, token[1].position))
        gone = max(0, len(tokens) - limit)
        if 0 < gone < len(tokens):
            margin = min(margin, tokens[gone][1].score - tokens[gone - 1][1].score)
        lost = {id(entry) for _, entry in tokens[:gone]}
        for place in places:
            lists.heads[place] = [entry for entry in lists.heads[place] if id(entry) not in lost]
    return margin


@pytest.mark.parametrize("shared", [False, True])
@few
@given(data=st.data())
@torch.inference_mode()
def test_unequal_heads_hold_and_give_what_lists_do(sums: Kind, shared: bool, data: st.DataObject) -> None:
    draw = data.draw
    grid = draw(st.sampled_from([GRID, Grid(3, 3, newline=True), Grid(6, 2)]))
    layers, (kv_heads, group) = (
        draw(st.integers(1, 2)),
        draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1)])),
    )
    model = Tiny(grid, layers, kv_heads * group, kv_heads, seed=draw(st.integers(0, 50)))
    by_head = st.lists(st.integers(1, grid.tokens + 2), min_size=kv_heads, max_size=kv_heads).map(tuple)
    budgets = tuple(draw(st.lists(by_head, min_size=layers, max_size=layers)))
    period = draw(st.none() | st.integers(1, grid.line + 2))
    policy = sums(budget=1, budgets=budgets, shared=shared, period=period)
    for position, loop, lists, tokens in side_by_side(model, policy, draw(st.booleans())):
        plan, store = loop.store.plan, loop.store
        if position % plan.period == 0:
            assume(evict(lists, groups_of(plan, model.spec, store.rows)) > 1e-5)
        expected = lists.advance(tokens, position)
        torch.testing.assert_close(loop.advance_(tokens, position), expected, atol=1e-4, rtol=1e-4)
        assert positions(store) == {place: lists.visual(*place) for place in lists.heads}
    loop.check()


@pytest.mark.parametrize("shared", [False, True])
def test_unequal_heads_of_the_whole_picture_lose_nothing(sums: Kind, shared: bool) -> None:
    model, n = Tiny(), GRID.tokens
    tokens = random_tokens(model, 2)
    policy = sums(budget=1, budgets=((n, n + 7), (n + 1, n)), shared=shared)
    forced = Decoder(model, policy).teacher_force(PROMPTS, tokens, 1.5)
    with torch.no_grad():
        expected = model.causal_logits(model.condition(PROMPTS, True), tokens.repeat(2, 1))
    torch.testing.assert_close(forced.raw, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
def test_equal_budgets_by_head_are_one_budget(shared: bool) -> None:
    """Whichever attention computes them."""
    model, tokens = Tiny(), random_tokens(Tiny(), 2)

    class ByHead(SlidingWindow):
        def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
            return CachePlan(((8, 8), (8, 8)), grid.line, shared)

    got, expected = (
        Decoder(model, policy(budget=8)).teacher_force(PROMPTS, tokens, 1.5).raw
        for policy in (ByHead, SlidingWindow)
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_a_picture_of_unequal_heads_does_not_depend_on_the_one_before(sums: Kind, shared: bool) -> None:
    policy = sums(budget=1, budgets=UNEQUAL, shared=shared)
    used = Decoder(Tiny(), policy)
    made = [used.generate(PROMPTS, seeds=seeds, temperature=1.5).tokens for seeds in ([0, 1], [5, 6], [0, 1])]
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])
    alone = Decoder(Tiny(), policy).generate(PROMPTS[1:], seeds=[1], temperature=1.5).tokens
    assert torch.equal(alone[0], made[0][1])


def test_heads_that_share_lend_each_other_slots(sums: Kind) -> None:
    """Or sharing would be nothing but a slower way to compute the same."""
    sizes = set()
    with torch.inference_mode():
        for position, loop, _, tokens in side_by_side(Tiny(), sums(budget=1, budgets=UNEQUAL, shared=True)):
            loop.advance_(tokens, position)
            held = positions(loop.store)
            for layer, budget in enumerate((1 + 9, 5 + 3)):
                for row in range(loop.store.rows):
                    assert len(held[layer, row, 0]) + len(held[layer, row, 1]) <= budget + 2 * GRID.line
            sizes |= {len(held[0, row, 0]) for row in range(loop.store.rows)}
    assert max(sizes) > 1 + GRID.line, "no head ever holds more than its own slots"


# What a policy is shown


class Witness(RankedPolicy):
    """A window that is shown everything and keeps it."""

    needs: ClassVar = frozenset({"mass", "scores", "queries"})
    seen: ClassVar[list[Observation]] = []
    budgets: ClassVar[Any] = 8

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(self.budgets, grid.line)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        self.seen.append(seen)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float()


@pytest.mark.parametrize("budgets", [8, ((3, 12), (8, 5)), ((4, 4), (12, 12))], ids=str)
@torch.inference_mode()
def test_a_policy_sees_what_the_newest_token_saw(budgets: Any) -> None:
    policy = type("Seen", (Witness,), {"budgets": budgets, "seen": []})(budget=1)
    model = Tiny()
    for position, loop, lists, tokens in side_by_side(model, policy):
        store = loop.store
        loop.advance_(tokens, position)
        held = positions(store)
        for place, head in lists.heads.items():
            lists.heads[place] = [e for e in head if e.position == WORD or e.position in held[place]]
        lists.advance(tokens, position)
        mass, scores, queries = policy.seen[-1]
        assert mass is not None
        assert scores is not None
        assert mass.dtype == scores.dtype == torch.float32
        assert mass.shape == scores.shape == store.position.shape
        assert torch.equal(mass > 0, store.resident)
        assert not scores[~store.resident].any()
        torch.testing.assert_close(queries, torch.from_numpy(lists.queries).float(), atol=1e-4, rtol=1e-4)
        owner = store.head.expand(mass.shape)
        for layer, row, slot in (store.position >= 0).nonzero().tolist():
            place = layer, row, int(owner[layer, row, slot])
            column = lists.length + int(store.position[layer, row, slot])
            assert mass[layer, row, slot].item() == pytest.approx(lists.mass[place][column], abs=1e-4)
            assert scores[layer, row, slot].item() == pytest.approx(lists.scores[place][column], abs=1e-3)


@pytest.mark.parametrize("need", ["mass", "scores", "queries"])
def test_a_policy_is_shown_what_it_needs_and_nothing_else(need: str) -> None:
    policy = type("Seen", (Witness,), {"needs": frozenset({need}), "seen": []})(budget=1)
    Decoder(Tiny(), policy).generate(PROMPTS, window=1)
    assert len(policy.seen) == GRID.tokens - 1
    for seen in policy.seen:
        assert [name for name, part in seen._asdict().items() if part is not None] == [need]


def test_a_need_that_nobody_can_meet_is_refused() -> None:
    policy = type("Wishful", (Witness,), {"needs": frozenset({"mass", "values"})})(budget=1)
    with pytest.raises(ArkvError, match="Wishful needs 'values'.*mass, scores, queries") as caught:
        Decoder(Tiny(), policy).generate(PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budgets", [8, ((3, 12), (8, 5))], ids=str)
@torch.inference_mode()
def test_a_token_looks_at_what_is_visible_to_it(budgets: Any) -> None:
    """Here: the condition, itself, and the columns of the grid of its own parity."""

    def visible(self: CachePolicy, store: Store, step: Tensor) -> Tensor:
        return (store.position < 0) | ((store.position - step) % 2 == 0)

    policy = type("Narrow", (Witness,), {"visible": visible, "budgets": budgets, "seen": []})(budget=1)
    for position, loop, lists, tokens in side_by_side(Tiny(), policy):
        logits = loop.advance_(tokens, position)
        held, attended = positions(loop.store), {}
        for place, head in lists.heads.items():
            lists.heads[place] = [e for e in head if e.position == WORD or e.position in held[place]]
            words = [e.column for e in head if e.position == WORD]
            attended[place] = words + [lists.length + p for p in held[place] if (p - position) % 2 == 0]
        expected = lists.advance(tokens, position, attended)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        limit = visible(policy, loop.store, torch.tensor(position))
        mass = policy.seen[-1].mass
        assert mass is not None
        assert torch.equal(mass > 0, loop.store.resident & limit)


# What a policy owes


class Selects(RankedPolicy):
    """Names what a test wants instead of what is worth least."""

    answer: Any = None
    budgets: ClassVar[Any] = 8
    shared: ClassVar[bool] = False

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(self.budgets, grid.line, self.shared)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float()

    def select(self, store: Store, step: Tensor) -> Tensor:
        return self.answer(super().select(store, step))


def nothing_wrong(slots: Tensor) -> Tensor:
    return slots


def one_too_few(slots: Tensor) -> Tensor:
    return slots[..., 1:]


def narrow(slots: Tensor) -> Tensor:
    return slots.int()


def beyond(slots: Tensor) -> Tensor:
    return slots + 100


def below(slots: Tensor) -> Tensor:
    return slots - 100


def condition_of_the_first_head(slots: Tensor) -> Tensor:
    return torch.arange(slots[0, 0].numel()).view(slots.shape[2:]).expand_as(slots)


def twice(slots: Tensor) -> Tensor:
    return torch.cat([slots[..., :1], slots[..., :1], slots[..., 2:]], dim=-1)


def one_for_two_heads(slots: Tensor) -> Tensor:
    return slots[:, :, :1].expand_as(slots)


def of_the_other_head(slots: Tensor) -> Tensor:
    return slots.flip(2)


WRONG = {
    one_too_few: r"torch.int64 \[2, 4, 2, 4\]: expected torch.int64 \[2, 4, 2, 5\]",
    narrow: r"torch.int32 \[2, 4, 2, 5\]: expected torch.int64 \[2, 4, 2, 5\]",
    beyond: "a slot outside of 0 to",
    below: "a slot outside of 0 to",
    condition_of_the_first_head: "a condition slot",
    twice: "the same slot twice",
    one_for_two_heads: "the same slot twice",
}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("budgets", [8, UNEQUAL], ids=str)
@pytest.mark.parametrize(("answer", "words"), WRONG.items(), ids=lambda x: getattr(x, "__name__", ""))
def test_a_policy_that_selects_what_it_may_not_is_stopped(
    answer: Callable[[Tensor], Tensor], words: str, budgets: Any, shared: bool
) -> None:
    members = {"answer": staticmethod(answer), "budgets": budgets, "shared": shared}
    policy = type("Careless", (Selects,), members)(budget=8)
    with pytest.raises(ArkvError, match=f"^Careless.select gave.*{words}") as caught:
        Decoder(Tiny(), policy).generate(PROMPTS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budgets", [8, UNEQUAL], ids=str)
def test_heads_take_slots_of_each_other_only_where_they_are_shared(budgets: Any) -> None:
    members = {"answer": staticmethod(of_the_other_head), "budgets": budgets}
    with pytest.raises(ArkvError, match="only where the plan is shared may heads lend slots"):
        Decoder(Tiny(), type("Thief", (Selects,), members)(budget=8)).generate(PROMPTS)
    Decoder(Tiny(), type("Lodger", (Selects,), members | {"shared": True})(budget=8)).generate(PROMPTS)


def test_slots_beyond_a_smaller_pool_are_nobodys() -> None:
    policy = type("Honest", (Selects,), {"answer": staticmethod(nothing_wrong), "budgets": UNEQUAL})(budget=8)
    store = Store(Tiny().spec, policy.plan(GRID, Tiny().spec), 1, 1, {}, torch.float32)
    store.reset_(torch.ones(1, 1, dtype=torch.bool))
    slots = policy.select(store, torch.tensor(0))
    check_selection(policy, store, slots)
    assert store.pools[1] < store.slots
    slots[1, 0, 1, 0] = store.slots - 1
    with pytest.raises(ArkvError, match="only store.recyclable ones"):
        check_selection(policy, store, slots)


# What is read, and what is fed


@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_the_full_cache_reads_no_further_than_the_line_that_is_being_drawn(guided: bool) -> None:
    """Slots beyond it may hold anything."""
    model = Tiny(Grid(6, 3))
    for position, loop, lists, tokens in side_by_side(model, build("full", 18), guided):
        line, store = model.spec.grid.line, loop.store
        unread = store.condition + (position // line + 1) * line
        beyond = [
            leaf.unflatten(1, (store.kv_heads, -1))[:, :, unread:] for leaf in (*store.keys, *store.values)
        ]
        for slots in beyond:
            slots.fill_(torch.nan)
        expected = lists.advance(tokens, position)
        torch.testing.assert_close(loop.advance_(tokens, position), expected, atol=1e-4, rtol=1e-4)
        for slots in beyond:
            slots.zero_()
    loop.check()


@pytest.mark.parametrize("name", ["full", "linear", "adakv", "pyramid"])
@pytest.mark.parametrize("guided_tokens", [0, 1, 2, 5, 8, 19, 20, 100])
def test_after_guidance_only_the_conditional_rows_are_fed(
    name: str, guided_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the greedy token is the likeliest of the guided logits, then of the conditional ones."""
    model = Tiny(GRID)
    policy = build("full", GRID.tokens) if name == "full" else tight(name, model)
    embed, fed = model.embed, []

    def counted(tokens: Tensor, position: Tensor) -> Tensor:
        fed.append(len(tokens))
        return embed(tokens, position)

    monkeypatch.setattr(model, "embed", counted)
    decoder = Decoder(model, policy)
    settings = {"guidance": 2.0, "guided_tokens": guided_tokens, "temperature": 0, "window": 1}
    tokens = decoder.generate(PROMPTS, **settings).tokens
    # The rows of a token are fed if the next one is guided by them.
    assert fed == [4 if step + 1 < guided_tokens else 2 for step in range(GRID.tokens - 1)]
    assert torch.equal(tokens, decoder.generate(PROMPTS, **settings).tokens)
    if name == "full":
        forced = decoder.teacher_force(PROMPTS, tokens, guidance=2.0)
        first = torch.arange(GRID.tokens) < guided_tokens
        logits = torch.where(first[:, None], forced.guided, forced.raw[: len(PROMPTS)])
        assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize("compile", ["none", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["full", "linear", "rkv", "adakv", "pyramid", "snapkv", "diagonal"])
def test_a_loop_with_kernels_draws_what_one_without_does(
    name: str, kv_dtype: Any, compile: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mass and scores are written where the policy reads them, and what is hidden is not read."""
    model = Tiny(GRID)
    policies = [build("full", GRID.tokens) if name == "full" else tight(name, model)]
    if name == "linear":
        policies.append(tight(name, model, scoring="raw"))
    for policy in policies:
        settings: dict[str, Any] = {"guidance": 1.5, "temperature": 1.5, "window": 1}
        drawn = []
        for kernels, mode in ((False, "none"), (True, compile)):
            with monkeypatch.context() as patched:
                patched.setattr(operators, "available", lambda *_, kernels=kernels: kernels)
                decoder = Decoder(model, policy, mode, kv_dtype=kv_dtype)
                drawn.append(decoder.generate(PROMPTS, **settings).tokens)
        assert torch.equal(*drawn)


def test_a_picture_that_went_wrong_after_guidance_does_not_spoil_the_next() -> None:
    model = Tiny(GRID)
    decoder = Decoder(model, build("linear", 12))
    settings: dict[str, Any] = {"guidance": 2.0, "guided_tokens": 6, "window": 1}
    expected = decoder.generate(PROMPTS, **settings).tokens
    embed = model.embed

    def broken(tokens: Tensor, position: Tensor) -> Tensor:
        return embed(tokens, position) + (torch.nan if int(position) == 12 else 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "embed", broken)
        with pytest.raises(NumericalError, match="visual token 13 of 20, first in layer 0"):
            decoder.generate(PROMPTS, **settings)
    assert torch.equal(decoder.generate(PROMPTS, **settings).tokens, expected)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["full", "linear", "h2o", "adakv", "pyramid"])
@pytest.mark.parametrize(("layer", "guided_tokens"), [(0, None), (1, None), (1, 6), (2, None)])
def test_numbers_that_go_wrong_once_are_traced_to_their_layer(
    layer: int, guided_tokens: int | None, name: str, kv_dtype: Any
) -> None:
    """By the end of a line all that came after is wrong, too, and some of it was given up."""
    model, at = Tiny(GRID), 11
    policy = build("full", GRID.tokens) if name == "full" else tight(name, model)
    decoder = Decoder(model, policy, kv_dtype=kv_dtype)
    tokens = decoder.generate(PROMPTS, guidance=1.5).tokens
    embed, head, now = model.embed, model.head, []

    def watched(tokens: Tensor, position: Tensor) -> Tensor:
        now[:] = [int(position)]
        return embed(tokens, position)

    def spoils(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *given: function(*given) + (torch.nan if now == [at] else 0)

    def spoiled_head(hidden: Tensor, position: Tensor) -> Tensor:
        return head(hidden, position) + (torch.nan if int(position) == at + 1 else 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "embed", watched)
        if layer < 2:
            patched.setattr(model.blocks[layer], "merge", spoils(model.blocks[layer].merge))
        else:
            patched.setattr(model, "head", spoiled_head)
            decoder = Decoder(model, policy, kv_dtype=kv_dtype)
        where = f"visual token 12 of 20, first in {'the output head' if layer == 2 else f'layer {layer}'}: "
        with pytest.raises(NumericalError, match=where):
            decoder.generate(PROMPTS, guidance=1.5, guided_tokens=guided_tokens, window=1)
        if guided_tokens is None:
            now.clear()  # the search has fed that token again
            with pytest.raises(NumericalError, match=where):
                decoder.teacher_force(PROMPTS, tokens, guidance=1.5)


def test_guidance_too_large_for_its_numbers_is_told_as_such() -> None:
    """It used to draw token zero from there on."""
    decoder = Decoder(Tiny(GRID), build("linear", 12))
    with pytest.raises(NumericalError, match="visual token 0 of 20, first in the guided logits: take less"):
        decoder.generate(PROMPTS, guidance=3e38)


@pytest.mark.parametrize("guided_tokens", [None, 6])
@torch.inference_mode()
def test_a_line_may_be_launched_before_the_numbers_of_the_last_one_are_looked_at(
    guided_tokens: int | None,
) -> None:
    """As on a GPU, which then never waits; a line is yielded once its own numbers are known to be good."""
    model, sampling = Tiny(GRID), Sampling(1.5, 1.5, guided_tokens=guided_tokens)
    condition = model.condition(PROMPTS, True)
    keys = seed_keys([0, 1])
    embed, fed = model.embed, []

    def counted(tokens: Tensor, position: Tensor) -> Tensor:
        fed.append(int(position))
        return embed(tokens, position) + (torch.nan if broken and int(position) == 12 else 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "embed", counted)
        for broken in (False, True):
            drawn = []
            for ahead in (0, 1):
                loop = Loop(model, tight("linear", model), *condition.mask.shape, "none", True)
                loop._ahead = ahead
                lines: list[tuple[int, int]] = []
                told = pytest.raises(NumericalError, match="visual token 13 of 20, first in layer 0")
                with told if broken else nullcontext():
                    lines.extend((line, fed[-1]) for line in loop.sample_(condition, keys, sampling))
                drawn.append(loop.tokens.clone())
                launched = [min((line + 1 + ahead) * GRID.line, GRID.tokens - 1) - 1 for line, _ in lines]
                assert [last for _, last in lines] == launched
                assert len(lines) == (12 // GRID.line if broken else GRID.rows)
            assert broken or torch.equal(*drawn)


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["full", "linear", "adakv", "snapkv"])
def test_what_is_hidden_cannot_reach_a_sum(name: str, kv_dtype: Any) -> None:
    """NaN in all that a batch before has left, and in the embedding that stands for padding."""
    model = Tiny(GRID)
    policy = build("full", GRID.tokens) if name == "full" else tight(name, model)
    decoder = Decoder(model, policy, kv_dtype=kv_dtype)
    expected = decoder.generate(PROMPTS, guidance=1.5, temperature=1.5).tokens
    store = decoder.store
    assert store is not None
    with torch.inference_mode():
        for leaf in (*store.keys, *store.values, *store.key_scales, *store.value_scales):
            if leaf is not None:
                leaf.copy_(torch.full(leaf.shape, torch.nan) if leaf.is_floating_point() else leaf)
    condition = model.condition

    def damaged(prompts: Any, guided: bool) -> Condition:
        whole = condition(prompts, guided)
        embeddings = whole.embeddings.masked_fill(~whole.mask[..., None], torch.nan)
        return dataclasses.replace(whole, embeddings=embeddings)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "condition", damaged)
        assert torch.equal(decoder.generate(PROMPTS, guidance=1.5, temperature=1.5).tokens, expected)
