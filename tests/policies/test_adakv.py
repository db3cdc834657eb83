from dataclasses import replace

import pytest
from driver import Heads, drive
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny

from arkv import CachePlan, Grid
from arkv.errors import ArkvError, BudgetError
from arkv.policies.adakv import AdaKV

SPEC = Tiny(Grid(6, 5), layers=2, kv_heads=3, heads=3).spec
few = settings(max_examples=max(1, settings().max_examples // 2))
PERIOD = SPEC.grid.line


def naive(budget: int, protected: int, alpha: float, since_line: bool):
    """Ada-KV over lists: the newest `protected` tokens are safe, all others compete."""

    def rule(heads: Heads, decoded: int) -> None:
        free = budget - protected
        for layer in range(SPEC.layers):
            for row in range(2):
                group = [heads[layer, row, h] for h in range(SPEC.kv_heads)]
                sums = [head.sums("mass", decoded - PERIOD if since_line else 0) for head in group]
                rivals = [
                    (score, p, h)
                    for h in range(len(group))
                    for p, score in sums[h].items()
                    if p < decoded - protected
                ]
                rivals.sort(reverse=True)
                hits = [sum(h == who for _, _, who in rivals[: len(group) * free]) for h in range(len(group))]
                limits = [round((1 - alpha) * hit + alpha * free) for hit in hits]
                over, within, count = [], [], [0] * len(group)
                for _, p, h in rivals:
                    count[h] += 1
                    (over if count[h] > limits[h] else within).append((p, h))
                excess = sum(len(head.held) for head in group) - len(group) * budget
                first_to_go = over[::-1] + within[::-1]
                for p, h in first_to_go[: max(0, excess)]:
                    group[h].held.remove(p)

    return rule


@few
@given(
    budget=st.integers(6, 25),
    recent=st.integers(0, 6),
    alpha=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_it_holds_what_the_algorithm_over_lists_holds(
    budget: int, recent: int, alpha: float, seed: int
) -> None:
    policy = AdaKV(of=f"linear:anchors=0,recent={recent}", budget=budget, alpha=alpha)
    # A pool that would hold more than the picture is cut, and with it the point of competing.
    if budget + PERIOD > SPEC.grid.tokens:
        return
    sizes = set()
    for _, got, expected, _, _ in drive(policy, SPEC, naive(budget, recent, alpha, True), seed=seed):
        assert got == expected
        sizes |= {len(tokens) for tokens in got.values()}
    assert max(sizes) >= budget


def test_with_alpha_one_every_head_has_the_same() -> None:
    policy = AdaKV(of="linear:anchors=0,recent=2", budget=12, alpha=1)
    for decoded, got, _, _, _ in drive(policy, SPEC, naive(12, 2, 1, True)):
        if decoded > 12:
            assert {len(tokens) for tokens in got.values()} == {12}


def test_budgets_differ_by_head_and_sum_to_the_layers() -> None:
    policy = AdaKV(of="linear:anchors=0,recent=2", budget=12)
    differ = False
    for decoded, got, _, _, _ in drive(policy, SPEC, naive(12, 2, 0.2, True)):
        for layer, row in ((0, 0), (0, 1), (1, 0), (1, 1)):
            sizes = [len(got[layer, row, h]) for h in range(3)]
            assert sum(sizes) == 3 * min(12, decoded)
            assert decoded <= 12 or min(sizes) >= 2 + 2  # the window and alpha of the rest
            differ |= len(set(sizes)) > 1
    assert differ


def test_the_plan_is_the_scorers_as_one_pool() -> None:
    grid = Grid(24, 24)
    assert AdaKV(of="linear", ratio="1/6").plan(grid, SPEC) == CachePlan(96, 24, shared=True)
    with pytest.raises(BudgetError, match="below the 28"):
        AdaKV(of="linear", budget=27).plan(grid, SPEC)


def test_both_rows_can_share_tokens_and_budgets() -> None:
    policy = AdaKV(of="linear:anchors=0,recent=2", budget=12, share_rows=True)
    for _, got, _, _, _ in drive(policy, SPEC, lambda heads, _: None, rows=4, guided=True):
        assert all(got[layer, r, h] == got[layer, r + 2, h] for layer, r, h in got if r < 2)


@pytest.mark.parametrize("of", ["full", "headkv", "adakv", "ssd", "rkv", "diagonal", "front"])
def test_a_scorer_that_does_not_rank_within_heads_is_refused(of: str) -> None:
    policy = AdaKV(of=of, budget=12)
    with pytest.raises(ArkvError):
        policy.plan(SPEC.grid, SPEC)


def test_alpha_is_a_share() -> None:
    with pytest.raises(BudgetError, match="alpha is 1.5"):
        AdaKV(budget=12, alpha=1.5)
    assert replace(AdaKV(budget=12), alpha=0.5) == AdaKV(budget=12, alpha=0.5)
