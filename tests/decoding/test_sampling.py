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
from arkv.decoding.sampling import Sampling, guide, picture_uniforms

ALMOST_ONE = 1 - 2**-24

# Whole numbers make ties, and sixteenths make equal cumulative sums where the oracle says so.
finite = st.integers(-40, 40).map(lambda x: x / 16)
rows_of_logits = st.lists(finite | st.just(-math.inf), min_size=2, max_size=9).filter(
    lambda row: any(map(math.isfinite, row))
)


def draw(logits: Tensor, uniforms: Tensor, how: Sampling) -> Tensor:
    return sampling.draw(logits, uniforms, how, torch.tensor(how.temperature))


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    return sampling.probabilities(logits, how, torch.tensor(how.temperature))


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
    return weights


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


@given(rows_of_logits, st.floats(0, 1, exclude_max=True, width=32), st.floats(0.1, 3), st.data())
def test_a_token_is_the_first_whose_cumulative_probability_exceeds_the_uniform_number(
    row: list[float], uniform: float, temperature: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.none() | st.integers(1, len(row)))
    sampling = Sampling(temperature=temperature, top_k=top_k)
    weights = naive_probabilities(row, sampling)
    edges = numpy.cumsum(weights / weights.sum())
    token = int(draw(torch.tensor([row]), torch.tensor([uniform]), sampling))
    assert weights[token] > 0
    low, high = edges[token] - weights[token], edges[token]
    assert low - 1e-6 <= uniform <= high + 1e-6


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, ALMOST_ONE])
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
def test_forbidden_tokens_are_never_drawn(row: list[float], uniform: float, sampling: Sampling) -> None:
    token = int(draw(torch.tensor([row]), torch.tensor([uniform]), sampling))
    assert math.isfinite(row[token])


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_token() -> None:
    logits = torch.zeros(1, 1000)
    assert draw(logits, torch.tensor([0.0]), Sampling()).tolist() == [0]
    assert draw(logits, torch.tensor([ALMOST_ONE]), Sampling()).tolist() == [999]


def test_rounding_never_draws_past_the_end() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 301, generator=generator)
    logits[:, 250:] = -math.inf
    drawn = draw(logits, torch.full((2000,), ALMOST_ONE), Sampling())
    assert drawn.max() < 250


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(temperature=0.5), Sampling(top_k=3), Sampling(top_p=0.8), Sampling(2, 1.5, 5, 0.9)],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_they_are_likely(sampling: Sampling) -> None:
    count = 20_000
    row = [0.3, -1.0, 2.0, 1.1, 0.0, -math.inf, 1.4]
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1))
    drawn = draw(torch.tensor([row]).expand(count, -1), uniforms, sampling)
    seen = numpy.bincount(drawn.numpy(), minlength=len(row))
    weights = naive_probabilities(row, sampling)
    possible = weights > 0
    assert not seen[~possible].any()
    expected = weights[possible] / weights.sum() * count
    assert chisquare(seen[possible], expected).pvalue > 1e-3


@given(rows_of_logits, st.floats(0, 1, exclude_max=True, width=32))
def test_temperature_zero_and_the_single_likeliest_token_are_greedy(row: list[float], uniform: float) -> None:
    logits, u = torch.tensor([row]), torch.tensor([uniform])
    best = max(row)
    assert row[int(draw(logits, u, Sampling(temperature=0)))] == best
    assert row[int(draw(logits, u, Sampling(top_k=1)))] == best
    assert row[int(draw(logits, u, Sampling(top_p=1e-6)))] == best


def test_ties_at_the_edge_of_top_k_stay_together_and_those_of_top_p_go_by_index() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 0.0, 1.0]])
    kept = probabilities(logits, Sampling(top_k=2))[0] > 0
    assert kept.tolist() == [True, True, True, False, True]
    kept = probabilities(torch.zeros(1, 4), Sampling(top_p=0.4))[0] > 0
    assert kept.tolist() == [True, True, False, False]


def test_a_row_is_drawn_the_same_beside_others() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = torch.randn(8, 50, generator=generator), torch.rand(8, generator=generator)
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9)
    alone = [int(draw(logits[[i]], uniforms[[i]], sampling)) for i in range(8)]
    assert draw(logits, uniforms, sampling).tolist() == alone


def test_uniform_numbers_belong_to_a_seed_and_to_nothing_else() -> None:
    both = picture_uniforms([3, 2**63 - 1], 40)
    assert both.shape == (2, 40)
    assert both.min() >= 0
    assert both.max() < 1
    assert torch.equal(both[:1], picture_uniforms([3], 40))
    assert torch.equal(both.flip(0), picture_uniforms([2**63 - 1, 3], 40))
    assert not torch.equal(both[0], both[1])
    state = torch.get_rng_state()
    picture_uniforms([0], 10)
    assert torch.equal(state, torch.get_rng_state())


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
    drawn = sampling.draw(logits, torch.tensor([0.999, 0.0]), Sampling(top_p=top_p), torch.tensor(1.0))
    assert drawn.tolist() == [1, 0]
