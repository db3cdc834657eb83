from dataclasses import replace

import pytest
import torch
from driver import Heads, drive, lowest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny

from arkv import CachePlan, Grid, Store
from arkv.errors import ArkvError, BudgetError
from arkv.policies.headkv import HeadKV, stratified

SPEC = Tiny(Grid(6, 5), layers=2, kv_heads=3, heads=3).spec
few = settings(max_examples=max(1, settings().max_examples // 2))


def test_the_worked_example_of_the_papers_third_figure() -> None:
    history = [4, 9, 10, 13, 14, 15, 16, 20, *range(25, 39)]
    recent = list(range(39, 47))
    gone = [13, 14, 15, 16, 25, 31, 32, 33, 34, 36]
    spec = replace(SPEC, layers=1, kv_heads=1, heads=1, grid=Grid(8, 8))
    store = Store(spec, CachePlan(30, 8), 1, 0, {}, torch.float32)
    tokens = torch.tensor(recent + history)[torch.randperm(30, generator=torch.Generator().manual_seed(0))]
    store.position[0, 0, :30] = tokens.int()
    # Within a part the evicted tokens are the lowest, but the older part is the better one throughout.
    score = torch.tensor(
        [[[1.0 * (p not in gone) + 10.0 * (p <= 27) for p in store.position[0, 0].tolist()]]]
    )
    dropped = stratified(
        store,
        (store.position >= 0) & (store.position < 39),
        torch.tensor([[[22]]]),
        torch.tensor([[[10]]]),
        score,
        0.5,
    )
    assert sorted(store.position[dropped].tolist()) == gone


def naive(policy: HeadKV, condition: int, kinds: dict, share: bool = False):
    """The algorithm over lists; `kinds` is filled in with the heads that were found to be local."""
    grid = SPEC.grid
    budget, window, period = policy.budget, policy.window, grid.line
    pool = round(budget - (0 if policy.redistribute else policy.local_share * (budget - window)))

    def rule(heads: Heads, decoded: int) -> None:
        warm = decoded + condition >= policy.warmup or decoded > pool
        if warm and decoded and not kinds:
            for place, head in heads.items():
                last = head.mass[decoded - 1]
                whole = sum(last.values()) - (last[-1] if policy.scope == "visual" else 0)
                needed, total = 0, 0.0
                for p in reversed(head.held):
                    if total >= policy.tau * whole:
                        break
                    total += last[p]
                    needed += 1
                kinds[place] = total >= policy.tau * whole and needed < window
        for (layer, row, _), head in heads.items():
            same = [kinds.get((layer, row, h), False) for h in range(SPEC.kv_heads)]
            old = [p for p in head.held if p < decoded - window]
            if kinds.get((layer, row, _), False):
                head.held = head.held[len(old) :]
                continue
            room = (pool * len(same) - window * sum(same)) // max(1, len(same) - sum(same))
            excess = max(0, len(old) - (min(room, budget) - window))
            far = old[: int(len(old) * policy.stratum)]
            near = old[len(far) :]
            from_far = min(excess // 2, len(far))
            from_near = min(excess - from_far, len(near))
            from_far = excess - from_near
            kind = "scores" if policy.scoring == "raw" else "mass"
            score = head.sums(kind, since=decoded - period)
            gone = lowest(far, score, from_far) + lowest(near, score, from_near)
            head.held = [p for p in head.held if p not in gone]

    return rule


@few
@given(
    budget=st.integers(8, 20),
    window=st.integers(2, 8),
    warmup=st.integers(1, 30),
    tau=st.sampled_from([0.2, 0.4, 0.6, 0.9]),
    stratum=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    scope=st.sampled_from(["all", "visual"]),
    scoring=st.sampled_from(["raw", "softmax"]),
    local_share=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 99),
)
def test_it_holds_what_the_algorithm_over_lists_holds(seed: int, **parameters) -> None:
    policy = HeadKV(**parameters)
    kinds: dict = {}
    for _, got, expected, store, _ in drive(policy, SPEC, naive(policy, 3, kinds), seed=seed):
        assert got == expected
        for place, local in kinds.items():
            assert bool(store["local"][place]) == local


@few
@given(
    budget=st.integers(8, 20),
    window=st.integers(2, 8),
    tau=st.sampled_from([0.3, 0.5]),
    seed=st.integers(0, 99),
)
def test_redistribution_fills_the_pool_at_equal_memory(
    budget: int, window: int, tau: float, seed: int
) -> None:
    policy = HeadKV(budget=budget, window=window, tau=tau, warmup=6, redistribute=True)
    plan = policy.plan(SPEC.grid, SPEC)
    assert plan == CachePlan(budget, SPEC.grid.line, shared=True)
    for decoded, got, _, store, _ in drive(policy, SPEC, lambda heads, _: None, seed=seed):
        for layer, row in torch.cartesian_prod(torch.arange(2), torch.arange(2)).tolist():
            sizes = [len(got[layer, row, h]) for h in range(3)]
            local = store["local"][layer, row].tolist()
            assert sum(sizes) == min(decoded, budget) * 3 or sum(sizes) <= budget * 3 <= decoded * 3
            for h in range(3):
                assert got[layer, row, h][-window:] == list(range(max(0, decoded - window), decoded))
                if not local[h]:
                    assert sizes[h] >= min(decoded, budget)


def test_heads_are_grouped_once_and_for_each_row() -> None:
    policy = HeadKV(budget=12, window=6, warmup=9, tau=0.35)
    before, rows_differ = None, False
    for decoded, _, _, store, _ in drive(policy, SPEC, lambda heads, _: None, rows=4):
        if decoded >= policy.grouping_step(store).amax():
            now = store["local"].clone()
            assert before is None or torch.equal(now, before)
            before = now
            rows_differ |= not torch.equal(now[:, 0], now[:, 1])
        else:
            assert not store["local"].any()
    assert before is not None
    assert before.any()
    assert not before.all()
    assert rows_differ


def test_rows_of_a_picture_can_share_their_kinds_and_tokens() -> None:
    policy = HeadKV(budget=12, window=6, warmup=9, tau=0.35, share_rows=True)
    for _, got, _, store, _ in drive(policy, SPEC, lambda heads, _: None, rows=4, guided=True):
        assert torch.equal(store["local"][:, :2], store["local"][:, 2:])
        assert all(got[la, r, h] == got[la, r + 2, h] for la, r, h in got if r < 2)


@pytest.mark.parametrize(
    ("grid", "condition", "ratio", "step"),
    [
        (Grid(24, 24), 1, "1/4", 120),  # 99 visual tokens are warm; the next line end
        (Grid(24, 24), 30, "1/4", 72),
        (Grid(24, 24), 1, "1/8", 72),  # the pool is full before
        (Grid(48, 48, newline=True), 20, "1/6", 294),
        (Grid(64, 64, newline=True), 20, "1/6", 520),
    ],
)
def test_the_papers_warm_up(grid: Grid, condition: int, ratio: str, step: int) -> None:
    spec = replace(SPEC, grid=grid, layers=1)
    policy = HeadKV(ratio=ratio)
    store = Store(spec, policy.plan(grid, spec), 1, condition, {}, torch.float32)
    store.reset_(torch.ones(1, condition, dtype=torch.bool))
    assert policy.grouping_step(store).unique().tolist() == [step]


def test_padding_is_no_condition() -> None:
    """What else is in a batch decides how far a row is padded, and must not decide when it is grouped."""
    policy, spec = HeadKV(ratio="1/4"), replace(SPEC, grid=Grid(24, 24), layers=1)
    store = Store(spec, policy.plan(spec.grid, spec), 2, 30, {}, torch.float32, guided=True)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1, :-1] = False
    store.reset_(mask)
    assert policy.grouping_step(store)[0, :, 0].tolist() == [72, 120]
    together = replace(policy, share_rows=True)  # 15 condition tokens on average, 85 visual ones
    assert together.grouping_step(store)[0, :, 0].tolist() == [96, 96]


def test_the_window_is_two_lines_or_one() -> None:
    grid = Grid(24, 24)
    assert HeadKV(ratio="1/6").recent_tokens(grid) == 48
    assert HeadKV(budget=47).recent_tokens(grid) == 24
    assert HeadKV(ratio=1).recent_tokens(grid) == 576
    assert HeadKV(ratio="1/6", window=30).recent_tokens(grid) == 30
    with pytest.raises(BudgetError, match="below the 24"):
        HeadKV(budget=23).plan(grid, SPEC)


def test_memory_is_planned_for_the_expected_local_heads() -> None:
    grid = Grid(24, 24)
    assert HeadKV(ratio="1/6").plan(grid, SPEC).budget == round(96 - 0.1 * 48)
    assert HeadKV(ratio="1/6", local_share=0).plan(grid, SPEC).budget == 96
    assert HeadKV(ratio="1/6", redistribute=True).plan(grid, SPEC).budget == 96


@pytest.mark.parametrize(
    "wrong",
    [
        {"tau": 1.1},
        {"stratum": -0.1},
        {"local_share": 2},
        {"warmup": 0},
        {"window": 0},
        {"scope": "x"},
        {"scoring": "x"},
    ],
)
def test_wrong_parameters_are_refused(wrong: dict) -> None:
    (name,) = wrong
    with pytest.raises(ArkvError, match=f"{name} is {wrong[name]!r}"):
        HeadKV(budget=8, **wrong)
