import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, Tiny

from arkv import ArkvError, CachePolicy, Decoder, Grid, RankedPolicy, Store
from arkv.errors import BudgetError
from arkv.policy import resolve_budget

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

    def protected(self, store: Store, step: torch.Tensor) -> torch.Tensor:
        return torch.isin(store.position, torch.tensor([*self.safe, 99]))

    def score(self, store: Store, step: torch.Tensor) -> torch.Tensor:
        return store["score"]


def filled(policy: CachePolicy, tokens: int, padding: int = 1) -> Store:
    """A store of two condition slots in which the first visual tokens lie in raster order."""
    store = Store(SPEC, policy.plan(GRID, SPEC), 1, 2, policy.fields, torch.float32)
    store.reset_(torch.arange(2)[None] >= padding)
    for position in range(tokens):
        store.claim_(torch.full((SPEC.layers, 1, SPEC.kv_heads), 2 + position), torch.tensor(position))
    return store


def given_up(policy: CachePolicy, store: Store, step: int) -> list[int]:
    """Positions evicted from the first head; every head must give up `period` slots of visual tokens."""
    slots = policy.select(store, torch.tensor(step))
    assert slots.shape == (*store.position.shape[:3], store.plan.period)
    assert all(len(set(head)) == store.plan.period for head in slots.flatten(0, 2).tolist())
    assert store.recyclable.gather(-1, slots).all()
    return store.position.gather(-1, slots)[0, 0, 0].tolist()


# NaN is not worth keeping, and nothing is worth more than what is protected.
scores = st.floats(allow_nan=True, allow_infinity=True, width=32) | st.sampled_from([0.0, math.nan, math.inf])


@given(st.data())
def test_the_worst_go_first_whatever_the_scores(data: st.DataObject) -> None:
    policy = Scored(budget=9, safe=tuple(data.draw(st.sets(st.integers(0, 13), max_size=9))))
    store = filled(policy, 14)
    drawn = data.draw(st.lists(scores, min_size=14, max_size=14))
    store["score"][..., 2:16] = torch.tensor(drawn)
    victims = given_up(policy, store, 14)

    def worth(position: int) -> float:
        score = torch.tensor(drawn[position]).item()
        bound = 2.0**100  # scores beyond are equal, as documented
        return -bound if math.isnan(score) else min(max(score, -bound), bound)

    rest = sorted((p for p in range(14) if p not in policy.safe), key=lambda p: (worth(p), p))
    assert sorted(victims) == sorted(rest[:5])


@pytest.mark.parametrize("value", [0.0, 1e30, math.inf, -math.inf, math.nan])
def test_of_equal_scores_the_oldest_goes(value: float) -> None:
    policy = Scored(budget=9, safe=(1, 3))
    store = filled(policy, 14)
    store["score"].fill_(value)
    assert sorted(given_up(policy, store, 14)) == [0, 2, 4, 5, 6]


def test_free_slots_go_first_even_before_the_worst() -> None:
    policy = Scored(budget=9)
    store = filled(policy, 12)
    store["score"].fill_(-math.inf)
    assert given_up(policy, store, 12) == [-1, -1, 0, 1, 2]
    store = filled(policy, 3)
    store["score"].fill_(-math.inf)
    assert given_up(policy, store, 3) == [-1] * 5


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf, math.nan])
def test_pictures_come_out_whatever_the_scores(value: float) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Constant(RankedPolicy):
        source: ClassVar[str] = "test"

        def score(self, store: Store, step: torch.Tensor) -> torch.Tensor:
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


def test_a_policy_that_asks_for_mass_has_to_look_at_it() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Blind(Scored):
        needs_mass: ClassVar[bool] = True

    with pytest.raises(NotImplementedError, match="Blind"):
        Decoder(Tiny(), Blind(budget=4)).generate([(1,)])


def test_a_policy_is_a_value() -> None:
    assert Scored(budget=4) == Scored(budget=4) != Scored(budget=5)
    with pytest.raises(AttributeError):
        Scored(budget=4).budget = 5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Scored(4)  # type: ignore[misc]
    assert issubclass(BudgetError, ArkvError)
