import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, Tiny, random_tokens
from torch import Tensor

from arkv import ArkvError, CachePlan, CachePolicy, Decoder, Grid, RankedPolicy, Store
from arkv.decoding.checks import check_selection
from arkv.decoding.loop import Loop
from arkv.errors import BudgetError
from arkv.policies.linear import LineAR
from arkv.policy import least_of_head, least_of_layer, rank_in_head, ranking, resolve_budget

SPEC = Tiny().spec


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 5000))
def test_a_ratio_is_rounded_to_the_nearest_slot_halves_up(tokens: int, a: int, b: int) -> None:
    share = Fraction(min(a, b), max(a, b))
    slots = resolve_budget(None, f"{share.numerator}/{share.denominator}", tokens)
    assert abs(slots - share * tokens) <= Fraction(1, 2)
    assert slots - share * tokens != Fraction(-1, 2)
    assert 0 <= slots <= tokens


@pytest.mark.parametrize(
    ("ratio", "slots"),
    [("1/6", 96), (1 / 6, 96), ("0.25", 144), (0.25, 144), (1, 576), ("1", 576), (0.1, 58), ("1/1152", 1)],
)
def test_a_ratio_may_be_a_number_a_fraction_or_a_decimal(ratio: Any, slots: int) -> None:
    assert resolve_budget(None, ratio, 576) == slots


def test_a_budget_is_taken_as_it_is_up_to_the_whole_picture() -> None:
    assert [resolve_budget(budget, None, 20) for budget in (1, 7, 20, 21, 10**9)] == [1, 7, 20, 20, 20]


@pytest.mark.parametrize(
    ("budget", "ratio", "facts"),
    [
        (None, None, ["budget", "ratio"]),
        (8, 0.5, ["budget", "ratio", "not both"]),
        (None, 0, ["ratio is 0"]),
        (None, -0.5, ["ratio is -0.5"]),
        (None, "-1/6", ["ratio is -1/6"]),
        (None, 1.01, ["ratio is 1.01"]),
        (None, "7/6", ["ratio is 7/6"]),
        (None, "1/0", ["'1/0'"]),
        (None, "a sixth", ["'a sixth'", "1/4"]),
        (None, "", ["''"]),
        (None, math.nan, ["nan"]),
        (None, math.inf, ["inf"]),
        (0, None, ["0 slots"]),
        (-3, None, ["-3 slots"]),
        (2.5, None, ["2.5", "whole number"]),
        (True, None, ["True", "whole number"]),
    ],
)
def test_budgets_that_cannot_be_are_refused_in_one_line(budget: Any, ratio: Any, facts: list[str]) -> None:
    with pytest.raises(BudgetError) as caught:
        resolve_budget(budget, ratio, 20)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


@dataclass(frozen=True, kw_only=True)
class Scored(RankedPolicy):
    """Keeps the best by scores that a test writes into the store, and protects some positions."""

    fields: ClassVar = {"score": torch.float32}
    source: ClassVar[str] = "test"

    safe: tuple[int, ...] = ()

    def least_budget(self, grid: Grid) -> int:
        return len(self.safe)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        return torch.isin(store.position, torch.tensor([*self.safe, 99]))

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store["score"]


def filled(policy: CachePolicy, tokens: int, padding: int = 1, rows: int = 1, guided: bool = False) -> Store:
    """A store of two condition slots in which the first visual tokens lie in raster order."""
    plan = policy.plan(GRID, SPEC)
    store = Store(SPEC, plan, rows, 2, policy.fields, torch.float32, guided=guided)
    store.reset_(torch.arange(2).expand(rows, -1) >= padding)
    for position in range(tokens):
        slots = store.starts[:, None] + 2 + position
        store.claim_(slots.expand(-1, rows, -1), torch.tensor(position))
    return store


def write_scores(store: Store, scores: Tensor) -> None:
    """Give the visual tokens, in raster order, these scores, `[..., tokens]`."""
    store.by_head(store["score"])[..., 2 : 2 + scores.shape[-1]] = scores


def given_up(policy: CachePolicy, store: Store, step: int) -> Tensor:
    """Positions evicted, `[layers, rows, kv_heads, period]`, of slots that may be given up."""
    slots = policy.select(store, torch.tensor(step))
    check_selection(policy, store, slots)
    return store.position.gather(-1, slots.flatten(2)).view(slots.shape)


# NaN is not worth keeping, and nothing is worth more than what is protected.
scores = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, math.nan, math.inf])


@given(st.data())
def test_the_worst_go_first_whatever_the_scores(data: st.DataObject) -> None:
    policy = Scored(budget=9, safe=tuple(data.draw(st.sets(st.integers(0, 13), max_size=9))))
    store = filled(policy, 14)
    drawn = data.draw(st.lists(scores, min_size=14, max_size=14))
    write_scores(store, torch.tensor(drawn))
    victims = given_up(policy, store, 14)

    def worth(position: int) -> float:
        score = torch.tensor(drawn[position]).item()
        bound = 2.0**100  # scores beyond are equal, as documented
        return -bound if math.isnan(score) else min(max(score, -bound), bound)

    rest = sorted((p for p in range(14) if p not in policy.safe), key=lambda p: (worth(p), p))
    assert all(head == rest[:5] for head in victims.flatten(0, 2).tolist())


def test_heads_and_rows_choose_for_themselves() -> None:
    policy = Scored(budget=9)
    store = filled(policy, 14, rows=3)
    drawn = torch.rand(2, 3, 2, 14, generator=torch.Generator().manual_seed(0))
    write_scores(store, drawn)
    victims = given_up(policy, store, 14)
    assert torch.equal(victims, drawn.argsort(-1)[..., :5].int())
    assert len({tuple(head) for head in victims.flatten(0, 2).tolist()}) == 12


@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_of_equal_scores_the_oldest_goes(value: float) -> None:
    policy = Scored(budget=9, safe=(1, 3))
    store = filled(policy, 14)
    store["score"].fill_(value)
    assert (given_up(policy, store, 14) == torch.tensor([0, 2, 4, 5, 6])).all()


def test_free_slots_go_first_even_before_the_worst() -> None:
    policy = Scored(budget=9)
    store = filled(policy, 12)
    store["score"].fill_(-math.inf)
    assert (given_up(policy, store, 12) == torch.tensor([-1, -1, 0, 1, 2])).all()
    store = filled(policy, 3)
    store["score"].fill_(-math.inf)
    assert (given_up(policy, store, 3) == -1).all()


# Both rows of a picture


@given(st.data())
def test_rows_that_share_keep_the_same_tokens_ranked_by_the_sum(data: st.DataObject) -> None:
    safe = tuple(data.draw(st.sets(st.integers(0, 13), max_size=5)))
    policy = Scored(budget=9, safe=safe, share_rows=True)
    store = filled(policy, 14, rows=4, guided=True)
    # Small whole numbers: sums are exact, and many of them equal.
    whole = st.lists(st.integers(-3, 3), min_size=14, max_size=14)
    drawn = torch.tensor(data.draw(st.lists(whole, min_size=16, max_size=16))).view(2, 4, 2, 14).float()
    write_scores(store, drawn)
    victims = given_up(policy, store, 14)
    for layer, picture, head in itertools.product(range(2), range(2), range(2)):
        total = (drawn[layer, picture, head] + drawn[layer, 2 + picture, head]).tolist()
        expected = sorted((p for p in range(14) if p not in safe), key=lambda p: (total[p], p))[:5]
        assert victims[layer, picture, head].tolist() == expected
        assert victims[layer, 2 + picture, head].tolist() == expected


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 2.0**100])
def test_a_sum_of_rows_is_a_number_whatever_the_scores(value: float) -> None:
    policy = Scored(budget=9, safe=(2,), share_rows=True)
    store = filled(policy, 14, rows=2, guided=True)
    drawn = torch.zeros(2, 2, 2, 14)
    drawn[:, 0, :, 5] = value
    drawn[:, 1, :, 5] = -value
    write_scores(store, drawn)
    victims = given_up(policy, store, 14)
    assert not (victims == 2).any()
    assert torch.equal(victims[:, 0], victims[:, 1])


def test_rows_without_guidance_have_nothing_to_share() -> None:
    drawn = torch.rand(2, 4, 2, 14, generator=torch.Generator().manual_seed(0))
    victims = []
    for share_rows in (False, True):
        policy = Scored(budget=9, share_rows=share_rows)
        store = filled(policy, 14, rows=4)
        write_scores(store, drawn)
        victims.append(given_up(policy, store, 14))
    assert torch.equal(*victims)


@torch.inference_mode()
def test_rows_that_share_hold_the_same_tokens_to_the_end() -> None:
    """The unconditional rows have a shorter condition, other keys and other statistics."""
    held = {}
    for share_rows in (False, True):
        model, same = Tiny(), []
        condition = model.condition([(1, 2, 3), (4,)], guided=True)
        policy = LineAR(budget=8, anchors=2, recent=2, share_rows=share_rows)
        loop = Loop(model, policy, *condition.mask.shape, "none", guided=True)
        loop.prefill_(condition)
        tokens = random_tokens(model, 2).repeat(2, 1)
        for position in range(GRID.tokens - 1):
            loop.advance_(tokens[:, position], position)
            by_row = loop.store.by_head(loop.store.position).sort(-1).values.unflatten(1, (2, 2))
            by_row = by_row.clamp(min=-1)
            same.append(torch.equal(by_row[:, 0], by_row[:, 1]))
        held[share_rows] = same
    assert all(held[True])
    assert not all(held[False])


# The order of slots

STRANGE = [0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0, 3e38, -3e38, math.inf, -math.inf, math.nan, -math.nan]


@st.composite
def pools(draw: st.DrawFn, shared: bool | None = None) -> tuple[Store, Tensor]:
    """A store with tokens anywhere, and what its slots are worth; many are worth the same."""
    kv_heads, layers, rows = draw(st.integers(1, 4)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    spec = Tiny(GRID, layers, kv_heads, kv_heads).spec
    by_head = st.lists(st.integers(1, 20), min_size=kv_heads, max_size=kv_heads).map(tuple)
    budgets = tuple(draw(st.lists(by_head, min_size=layers, max_size=layers)))
    shared = draw(st.booleans()) if shared is None else shared
    store = Store(spec, CachePlan(budgets, draw(st.integers(1, 7)), shared), rows, 2, {}, torch.float32)
    store.reset_(torch.arange(2).expand(rows, -1) >= 1)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = store.position.shape
    if shared:
        strange = torch.randint(kv_heads, shape, generator=generator)
        store.head.copy_(torch.where(store.recyclable, strange, store.head))
    # Heads hold the same token each, some slots are free, and tokens lie in no order.
    tokens = torch.randint(-1, GRID.tokens, shape, generator=generator, dtype=torch.int32)
    store.position.copy_(torch.where(store.recyclable, tokens, store.position))
    worth = torch.randint(-2, 3, shape, generator=generator).float()
    worth = torch.where(store.position < 0, -torch.inf, worth)
    return store, torch.where(store.recyclable, worth, torch.inf)


def slots_in_order(store: Store, worth: Tensor, layer: int, row: int) -> list[tuple[int, int]]:
    """Slot and head, from the least worth to the greatest; the older of equal ones first."""
    position, owner = store.position[layer, row].tolist(), store.head.expand(worth.shape)[layer, row].tolist()
    value = worth[layer, row].tolist()
    order = sorted(range(store.slots), key=lambda slot: (value[slot], position[slot], owner[slot], slot))
    return [(slot, owner[slot]) for slot in order]


@given(pools(shared=False))
def test_the_least_of_every_head(pool: tuple[Store, Tensor]) -> None:
    store, worth = pool
    got = least_of_head(store, worth)
    assert got.shape == (store.layers, store.rows, store.kv_heads, store.plan.period)
    assert got.dtype == torch.int64
    with pytest.MonkeyPatch.context() as patch:  # as where heads are of many sizes
        patch.setattr(store, "sizes", dict.fromkeys(range(99)))
        assert torch.equal(least_of_head(store, worth), got)
    for layer, row, head in itertools.product(*map(range, got.shape[:3])):
        mine = [slot for slot, owner in slots_in_order(store, worth, layer, row) if owner == head]
        assert got[layer, row, head].tolist() == mine[: store.plan.period]


@given(pools(), st.sampled_from([2**32 - 1, 0]), st.integers(0, 1000))
def test_one_number_ranks_as_two_sorts_do(pool: tuple[Store, Tensor], room: int, seed: int) -> None:
    """Whatever the worth: both zeros are one, NaN is above everything; and where three numbers do not fit."""
    store, _ = pool
    strange = torch.tensor(STRANGE)
    chosen = torch.randint(len(strange), store.position.shape, generator=torch.Generator().manual_seed(seed))
    worth = strange[chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arkv.ranking.LOW", room)
        got = ranking(store, worth)
        least = ranking(store, worth, 3)
    by_head = store.head.expand(worth.shape).argsort(dim=-1, stable=True)
    by_position = by_head.gather(-1, store.position.gather(-1, by_head).argsort(dim=-1, stable=True))
    by_worth = by_position.gather(-1, worth.gather(-1, by_position).argsort(dim=-1, stable=True))
    assert torch.equal(got, by_worth)
    assert torch.equal(least, by_worth[..., :3])


@given(pools())
def test_the_least_of_a_layer(pool: tuple[Store, Tensor]) -> None:
    store, worth = pool
    got = least_of_layer(store, worth)
    assert got.shape == (store.layers, store.rows, store.kv_heads, store.plan.period)
    for layer, row in itertools.product(*map(range, got.shape[:2])):
        order = [slot for slot, _ in slots_in_order(store, worth, layer, row)]
        assert got[layer, row].flatten().tolist() == order[: store.kv_heads * store.plan.period]


@given(pools(), st.integers(0, 1000))
def test_the_rank_of_a_slot_in_its_head(pool: tuple[Store, Tensor], seed: int) -> None:
    """Of all its slots, and of those that are ranked apart and the rest."""
    store, worth = pool
    apart = torch.rand(worth.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    whole, parts = rank_in_head(store, worth), rank_in_head(store, worth, apart)
    assert whole.shape == parts.shape == worth.shape
    for layer, row in itertools.product(*map(range, whole.shape[:2])):
        order = slots_in_order(store, worth, layer, row)
        for head in range(store.kv_heads):
            mine = [slot for slot, owner in order if owner == head]
            assert whole[layer, row, mine].tolist() == list(range(len(mine)))
            for part in (True, False):
                some = [slot for slot in mine if bool(apart[layer, row, slot]) == part]
                assert parts[layer, row, some].tolist() == list(range(len(some)))


@given(pools(), st.integers(0, 1000))
def test_ranks_are_by_worth_whatever_the_number(pool: tuple[Store, Tensor], seed: int) -> None:
    store, _ = pool
    strange = torch.tensor(STRANGE)
    chosen = torch.randint(len(strange), store.position.shape, generator=torch.Generator().manual_seed(seed))
    got = rank_in_head(store, strange[chosen])
    # One zero, NaN above everything; what is worth the same has the same place here.
    places = torch.tensor([2, 2, 3, 1, 4, 0, 5, -1, 6, -2, 7, 7])[chosen].float()
    assert torch.equal(got, rank_in_head(store, places))


# Any policy


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_pictures_come_out_whatever_the_scores(value: float) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Constant(RankedPolicy):
        source: ClassVar[str] = "test"

        def score(self, store: Store, step: Tensor) -> Tensor:
            return torch.full_like(store.position, value, dtype=torch.float32)

    tokens = Decoder(Tiny(), Constant(budget=6)).generate([(1, 2)]).tokens
    # All scores alike: the newest stay, which is a window without sinks.
    from arkv.policies.window import SlidingWindow

    assert torch.equal(tokens, Decoder(Tiny(), SlidingWindow(budget=6, sinks=0)).generate([(1, 2)]).tokens)


@pytest.mark.parametrize("safe", [3, 8, 30])
def test_a_budget_below_the_protected_tokens_names_the_smallest_ratio_that_works(safe: int) -> None:
    with pytest.raises(BudgetError, match=r"smallest ratio that does is \d+/20$") as caught:
        Decoder(Tiny(), Scored(budget=2, safe=tuple(range(safe))))
    assert "\n" not in str(caught.value)
    ratio = str(caught.value).split()[-1]
    least = int(ratio.split("/")[0])
    plan = Scored(ratio=ratio, safe=tuple(range(safe))).plan(GRID, SPEC)
    assert plan.budget == least == min(safe, 20)
    with pytest.raises(BudgetError):
        Scored(budget=least - 1, safe=tuple(range(safe))).plan(GRID, SPEC)


def test_a_ratio_that_rounds_to_nothing_names_one_that_works() -> None:
    with pytest.raises(BudgetError, match=r"the smallest ratio that does is 1/20$"):
        Scored(ratio="1/1000").plan(GRID, SPEC)
    assert Scored(ratio="1/20").plan(GRID, SPEC).budget == 1


@pytest.mark.parametrize("need", ["mass", "scores", "queries"])
def test_a_policy_that_has_needs_has_to_look(need: str) -> None:
    class Blind(Scored):
        needs: ClassVar[frozenset[str]] = frozenset({need})

    with pytest.raises(NotImplementedError, match="Blind"):
        Decoder(Tiny(), Blind(budget=4)).generate([(1,)])


def test_a_policy_is_a_value() -> None:
    assert Scored(budget=4) == Scored(budget=4) != Scored(budget=5)
    with pytest.raises(AttributeError):
        Scored(budget=4).budget = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Scored(4)  # type: ignore[misc]
    assert issubclass(BudgetError, ArkvError)
