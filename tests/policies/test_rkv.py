import numpy
import pytest
import torch
from driver import Head, Heads, Place, drive
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from arkv import Grid, Observation, Store
from arkv.errors import BudgetError
from arkv.policies.rkv import RKV, redundancy

SPEC = Tiny(Grid(4, 5), layers=2, heads=4, kv_heads=2).spec
few = settings(max_examples=max(1, settings().max_examples // 2))


def keys_of_tokens(spec, rows: int, seed: int) -> numpy.ndarray:
    """Keys by layer, row, head and position, of which many are alike."""
    rng = numpy.random.default_rng(seed)
    shape = (spec.layers, rows, spec.kv_heads)
    kinds = rng.normal(size=(*shape, 3, spec.head_dim))
    kind = rng.integers(3, size=(*shape, spec.grid.tokens))
    alike = numpy.take_along_axis(kinds, kind[..., None], axis=3)
    return alike + rng.normal(size=alike.shape) * 0.6


def with_keys(table: numpy.ndarray) -> type[RKV]:
    """The policy, and a model that writes these keys."""

    class Keyed(RKV):
        def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
            super().observe(store, seen, step)
            for leaf, position, keys in zip(store.keys, store.position, table, strict=True):
                index = (
                    store.by_head(position).clamp(min=0).long()[..., None].expand(-1, -1, -1, leaf.shape[-1])
                )
                leaf.copy_(torch.from_numpy(keys).float().gather(2, index).flatten(1, 2))

    return Keyed


def naive_redundancy(keys: numpy.ndarray, threshold: float = 0.5) -> numpy.ndarray:
    """Redundancy of each of the keys, `[tokens, head_dim]`, in the order of their birth."""
    count = len(keys)
    similar = numpy.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if i != j:
                similar[i, j] = keys[i] @ keys[j] / numpy.linalg.norm(keys[i]) / numpy.linalg.norm(keys[j])
        repeats = [j for j in range(count) if j != i and similar[i, j] > threshold]
        if repeats:
            similar[i, repeats[-1]] = 0
    weights = numpy.exp(similar.mean(0))
    return weights / weights.sum()


def naive_scores(policy: RKV, head: Head, keys: numpy.ndarray, decoded: int, window: int) -> dict[int, float]:
    """Scores of the tokens before the window."""
    old = [p for p in head.held if p < decoded - window]
    importance = numpy.zeros(len(old))
    for query in range(decoded - window, decoded):
        mass = numpy.array([head.mass[query][p] for p in old])
        importance += mass / mass.sum() / window
    reach = policy.kernel // 2
    importance = [importance[max(0, i - reach) : i + reach + 1].max() for i in range(len(old))]
    repeated = naive_redundancy(keys[head.held], policy.threshold)[: len(old)]
    score = policy.lambda_ * numpy.array(importance) - (1 - policy.lambda_) * repeated
    return dict(zip(old, score.tolist(), strict=True))


@few
@given(st.data(), st.integers(0, 99))
def test_importance_and_redundancy_decide(data: st.DataObject, seed: int) -> None:
    grid = data.draw(st.sampled_from([Grid(4, 5), Grid(4, 3, newline=True), Grid(1, 9)]))
    kv_heads = data.draw(st.integers(1, 3))
    spec = Tiny(grid, layers=2, heads=kv_heads, kv_heads=kv_heads).spec
    rows = data.draw(st.integers(1, 3))
    period = data.draw(st.none() | st.integers(1, 9))
    last = grid.line if period is None else period
    window = data.draw(st.none() | st.integers(1, last))
    newest = min(8, last) if window is None else window
    table = keys_of_tokens(spec, rows, seed)
    policy = with_keys(table)(
        budget=data.draw(st.integers(min(newest, grid.tokens), grid.tokens)),
        period=period,
        window=window,
        lambda_=data.draw(st.sampled_from([0.0, 0.07, 0.5, 1.0])),
        kernel=data.draw(st.sampled_from([1, 3, 7])),
        threshold=data.draw(st.sampled_from([-0.2, 0.5, 0.9])),
    )
    assert policy.budget is not None
    budget = policy.budget

    def rule(heads: Heads, decoded: int) -> None:
        for place, head in heads.items():
            excess = len(head.held) - budget
            if excess <= 0:
                continue
            score = naive_scores(policy, head, table[place], decoded, newest)
            ordered = sorted(score, key=lambda p: (round(score[p], 12), p))
            if excess < len(ordered):
                gap = score[ordered[excess]] - score[ordered[excess - 1]]
                assume(gap > 1e-6 or (gap < 1e-12 and policy.lambda_ == 1))
            head.held = [p for p in head.held if p not in ordered[:excess]]

    for _, got, expected, _, _ in drive(policy, spec, rule, rows=rows, seed=seed):
        assert got == expected


def scores_of_all(rows: int, seed: int = 0) -> tuple[dict[Place, dict[int, float]], numpy.ndarray]:
    """Scores of a batch after three lines, by place and position, and the keys."""
    table = keys_of_tokens(SPEC, rows, seed)
    policy = with_keys(table)(budget=20)
    evictions = drive(policy, SPEC, lambda heads, decoded: None, rows=rows, seed=seed)
    decoded, _, _, store, _ = next(eviction for eviction in evictions if eviction[0] == 15)
    score = policy.score(store, torch.tensor(decoded))
    owner = store.head.expand(score.shape)
    found: dict[Place, dict[int, float]] = {}
    for layer, row, slot in numpy.ndindex(*score.shape):
        if (position := store.position[layer, row, slot].item()) >= 0:
            place = (layer, row, owner[layer, row, slot].item())
            found.setdefault(place, {})[position] = score[layer, row, slot].item()
    return found, table


def test_every_row_and_head_has_the_similarities_of_its_own_keys() -> None:
    # Importance is zero again after the eviction, so a score is the redundancy alone.
    found, table = scores_of_all(rows=3)
    for place, scores in found.items():
        expected = -0.9 * naive_redundancy(table[place][sorted(scores)])
        numpy.testing.assert_allclose([scores[p] for p in sorted(scores)], expected, atol=1e-6)
    assert len({round(scores[0], 6) for scores in found.values()}) == len(found), "places differ at all"


def redundancy_of(*keys: list[float], position: list[int] | None = None) -> list[float]:
    held = list(range(len(keys))) if position is None else position
    return redundancy(torch.tensor([[keys]]), torch.tensor([[held]], dtype=torch.int32), 0.5)[0, 0].tolist()


def test_of_those_that_are_alike_the_newest_is_not_redundant() -> None:
    first, second, newest, other = redundancy_of([1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    # 0 and 1 have 2 for their newest repeat, 2 has 1: against 1 stands 0 alone, against 0 stand both.
    assert first > second > newest
    assert newest == pytest.approx(other)
    weights = numpy.exp([2 / 4, 1 / 4, 0, 0])
    assert [first, second, newest, other] == pytest.approx((weights / weights.sum()).tolist())


def test_age_is_that_of_birth_and_free_slots_take_no_part() -> None:
    in_order = redundancy_of([1.0, 0.1], [0.0, 1.0], [1.0, 0.0])
    shuffled = redundancy_of(
        [1.0, 0.0], [5.0, 5.0], [0.0, 1.0], [5.0, 5.0], [1.0, 0.1], position=[9, -1, 7, -2, 3]
    )
    assert shuffled == pytest.approx([in_order[2], 0, in_order[1], 0, in_order[0]])


def test_eight_queries_or_the_period() -> None:
    grid = Grid(24, 24)
    assert RKV(budget=96).least_budget(grid) == 8
    assert RKV(budget=96, period=3).least_budget(grid) == 3
    assert RKV(budget=8).plan(grid, SPEC).budget == 8
    with pytest.raises(BudgetError, match=r"7 of 576 slots is below the 8"):
        RKV(budget=7).plan(grid, SPEC)
    with pytest.raises(BudgetError, match=r"window of 9 queries.*4 visual tokens apart.*at most 4"):
        RKV(budget=96, window=9, period=4).plan(grid, SPEC)


def test_parameters_that_cannot_be() -> None:
    for wrong in ({"window": 0}, {"kernel": 2}, {"lambda_": 1.5}, {"threshold": -2}):
        (name,) = wrong
        with pytest.raises(BudgetError, match=f"{name} is {wrong[name]}"):
            RKV(budget=8, **wrong)


class Blind(RKV):
    """Sees nothing but NaN."""

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        assert seen.mass is not None
        super().observe(store, Observation(torch.full_like(seen.mass, torch.nan)), step)


def test_scores_that_are_no_numbers_leave_the_window_alone() -> None:
    for decoded, got, _, _, _ in drive(Blind(budget=7, window=4), SPEC, lambda heads, decoded: None):
        for held in got.values():
            assert held[-4:] == list(range(decoded))[-4:]
            assert len(held) == min(decoded, 7)
