import math
from typing import Any

import numpy
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from arkv import ArkvError
from arkv.decoding import sampling
from arkv.decoding.noise import gumbel, seed_keys
from arkv.decoding.sampling import Sampling, guide

# Whole numbers make ties, and sixteenths make equal cumulative sums where the oracle says so.
seeds = st.integers(0, 2**64 - 1)
finite = st.integers(-40, 40).map(lambda x: x / 16)
rows_of_logits = st.lists(finite | st.just(-math.inf), min_size=2, max_size=9).filter(
    lambda row: any(map(math.isfinite, row))
)


def draw(logits: Tensor, seeds: list[int], how: Sampling, place: int = 0) -> Tensor:
    places = torch.full((len(seeds),), place)
    return sampling.draw(logits, seed_keys(seeds), places, how, torch.tensor(how.temperature))


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    return sampling.filtered(logits, how, torch.tensor(how.temperature)).softmax(-1)


def naive_probabilities(row: list[float], sampling: Sampling) -> NDArray[numpy.float64]:
    """Temperature, top-k and top-p as their papers say, in float64, token by token."""
    logits = [x / sampling.temperature for x in row]
    if sampling.top_k is not None:
        least = sorted(logits, reverse=True)[sampling.top_k - 1]
        logits = [x if x >= least else -math.inf for x in logits]
    weights = numpy.exp(numpy.array(logits) - max(logits))
    weights /= weights.sum()
    if sampling.top_p is not None:
        kept, reached = [], 0.0
        for token in sorted(range(len(row)), key=lambda i: (-weights[i], i)):
            if reached >= sampling.top_p:
                break
            kept.append(token)
            reached += weights[token]
        weights = numpy.array([w if i in kept else 0.0 for i, w in enumerate(weights)])
    return weights / weights.sum()


@given(
    st.lists(st.tuples(finite, finite), min_size=1, max_size=6),
    st.floats(0, 8),
    st.sets(st.integers(0, 11)),
)
def test_guidance_moves_from_the_unconditional_logits_through_the_conditional(
    pairs: list[tuple[float, float]], scale: float, forbidden: set[int]
) -> None:
    logits = torch.tensor(pairs).T.contiguous()
    for index in forbidden:
        if index < logits.numel():
            logits.view(-1)[index] = -math.inf
    result = guide(logits, torch.tensor(scale))
    torch.testing.assert_close(result, oracle.guided(logits, scale))


def test_a_scale_of_one_and_of_zero_are_the_rows_themselves() -> None:
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, -8.0, 0.0]])
    assert torch.equal(guide(logits, torch.tensor(1.0)), logits[:1])
    assert torch.equal(guide(logits, torch.tensor(0.0)), logits[1:])


@given(st.data(), rows_of_logits, st.floats(0.05, 5))
def test_filters_agree_with_the_naive_ones(data: st.DataObject, row: list[float], temperature: float) -> None:
    top_k = data.draw(st.none() | st.integers(1, len(row)))
    # Away from the sums themselves, where rounding decides.
    top_p = data.draw(st.none() | st.floats(0.01, 1))
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    whole = naive_probabilities(row, Sampling(temperature=temperature, top_k=top_k))
    sums = numpy.cumsum(sorted(whole, reverse=True))
    if top_p is not None and abs(sums - top_p).min() < 1e-5:
        return
    result = probabilities(torch.tensor([row]), sampling)[0].numpy()
    numpy.testing.assert_allclose(result, naive_probabilities(row, sampling), atol=1e-6)


@given(rows_of_logits, seeds, st.integers(0, 9000), st.floats(0.1, 3), st.data())
def test_a_token_has_the_greatest_sum_of_logit_and_noise(
    row: list[float], seed: int, place: int, temperature: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.none() | st.integers(1, len(row)))
    sampling = Sampling(temperature=temperature, top_k=top_k)
    noise = gumbel(seed_keys([seed]), torch.tensor([place]), len(row))[0].double().numpy()
    with numpy.errstate(divide="ignore"):
        sums = numpy.log(naive_probabilities(row, sampling)) + noise
    token = int(draw(torch.tensor([row]), [seed], sampling, place))
    assert sums[token] > sums.max() - 1e-4


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "row",
    [
        [-math.inf, -math.inf, 0.0, -math.inf],
        [-math.inf, 3.0, -200.0, 1.0, -math.inf],
        [0.0] * 3 + [-math.inf] * 3,
        [-math.inf] * 3 + [0.0] * 3,
    ],
)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(top_k=2), Sampling(top_p=0.4), Sampling(temperature=0)]
)
def test_forbidden_tokens_are_never_drawn(row: list[float], seed: int, sampling: Sampling) -> None:
    token = int(draw(torch.tensor([row]), [seed], sampling))
    assert math.isfinite(row[token])


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.8), Sampling(2, 1.5, 5, 0.9)],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    count = 20_000
    row = [0.3, -1.0, 2.0, 1.1, 0.0, -math.inf, 1.4]
    drawn = draw(torch.tensor([row]).expand(count, -1), list(range(count)), sampling)
    seen = numpy.bincount(drawn.numpy(), minlength=len(row))
    weights = naive_probabilities(row, sampling)
    possible = weights > 0
    assert not seen[~possible].any()
    expected = weights[possible] / weights.sum() * count
    assert chisquare(seen[possible], expected).pvalue > 1e-3


@given(rows_of_logits, seeds, st.floats(1e-300, 1e-6))
def test_temperature_zero_and_the_single_likeliest_token_are_greedy(
    row: list[float], seed: int, least: float
) -> None:
    logits, best = torch.tensor([row]), max(row)
    assert row[int(draw(logits, [seed], Sampling(temperature=0)))] == best
    assert row[int(draw(logits, [seed], Sampling(top_k=1)))] == best
    assert row[int(draw(logits, [seed], Sampling(top_p=least)))] == best


def test_ties_at_the_edge_of_top_k_stay_together_and_those_of_top_p_go_by_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    kept = probabilities(logits, Sampling(top_k=2))[0] > 0
    assert kept.tolist() == [True, True, True, False, True]
    kept = probabilities(torch.zeros(1, 4), Sampling(top_p=0.4))[0] > 0
    assert kept.tolist() == [True, True, False, False]


def test_a_row_is_drawn_the_same_beside_others() -> None:
    logits = torch.randn(8, 50, generator=torch.Generator().manual_seed(2))
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    alone = [int(draw(logits[[i]], [i + 5], sampling)) for i in range(8)]
    assert draw(logits, list(range(5, 13)), sampling).tolist() == alone


def test_a_small_change_of_the_logits_seldom_makes_it_another_token() -> None:
    """What a picture in a narrow dtype, or in another batch, rests on."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(500, 16_384, generator=generator)
    moved = logits + 1e-3 * torch.randn(logits.shape, generator=generator)
    same = draw(logits, list(range(500)), Sampling()) == draw(moved, list(range(500)), Sampling())
    assert same.float().mean() > 0.98


@pytest.mark.parametrize(
    ("wrong", "facts"),
    [
        ({"guidance": math.nan}, ["guidance", "nan"]),
        ({"guidance": math.inf}, ["guidance", "inf"]),
        ({"guidance": -0.5}, ["guidance", "-0.5"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"temperature": math.nan}, ["temperature", "nan"]),
        ({"top_k": 0}, ["top_k", "0", "1 to 17"]),
        ({"top_k": 18}, ["top_k", "18", "1 to 17"]),
        ({"top_k": 2.5}, ["top_k", "2.5", "1 to 17"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": 1.1}, ["top_p", "1.1"]),
        ({"top_p": math.nan}, ["top_p", "nan"]),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(wrong: dict[str, Any], facts: list[str]) -> None:
    with pytest.raises(ArkvError) as caught:
        Sampling(**wrong).check(vocabulary=17)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


@pytest.mark.parametrize("right", [Sampling(), Sampling(0, 0, 1, 1.0), Sampling(30, 5, 17, 1e-9)], ids=str)
def test_values_at_the_edge_are_taken(right: Sampling) -> None:
    right.check(vocabulary=17)


def test_only_a_scale_of_one_needs_no_unconditional_rows() -> None:
    assert [Sampling(scale).guided for scale in (0, 0.5, 1, 1.0, 2)] == [True, True, False, False, True]


@pytest.mark.parametrize("top_p", [1e-300, 5e-324, 1e-45, 1e-38])
def test_a_probability_too_small_for_its_dtype_still_keeps_the_likeliest_token(top_p: float) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, 0.0, -torch.inf]])
    for seed in range(5):
        assert draw(logits, [seed, seed + 5], Sampling(top_p=top_p)).tolist() == [1, 0]
