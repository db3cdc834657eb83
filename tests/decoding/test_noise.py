"""Random numbers that are functions, against plain arithmetic and against what chance would give."""

from __future__ import annotations

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, gumbel_r, kstest
from torch import Tensor

from arkv.decoding.noise import gumbel, random_bits, seed_keys

MASK = 2**32 - 1
seeds = st.integers(0, 2**64 - 1)
places = st.integers(0, 2**31 - 1)


def naive_bits(seed: int, place: int, code: int) -> int:
    """The same in Python's whole numbers, which know no overflow."""

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & MASK
        x ^= x >> 13
        x = x * 0xC2B2AE35 & MASK
        return x ^ x >> 16

    first_key, second_key = map(int, numpy.random.SeedSequence(seed).generate_state(2))
    first = mix((place * 0x9E3779B9 & MASK) ^ first_key)
    second = mix(first ^ second_key)
    return mix(mix((code * 0xBB67AE85 & MASK) ^ first) ^ second)


def bits(seeds: list[int], places: list[int], codes: int) -> Tensor:
    return random_bits(seed_keys(seeds), torch.tensor(places), codes)


@given(st.lists(st.tuples(seeds, places), min_size=1, max_size=3), st.integers(1, 70))
def test_bits_are_those_of_plain_arithmetic(pairs: list[tuple[int, int]], codes: int) -> None:
    found = bits([seed for seed, _ in pairs], [place for _, place in pairs], codes)
    for row, (seed, place) in zip(found.tolist(), pairs, strict=True):
        assert [x & MASK for x in row] == [naive_bits(seed, place, code) for code in range(codes)]


def test_compiled_bits_are_the_same_to_the_last() -> None:
    keys, where = seed_keys([0, 2**64 - 1, 77]), torch.tensor([0, 2**31 - 1, 8189])
    compiled = torch.compile(random_bits, dynamic=False, fullgraph=True)
    assert torch.equal(compiled(keys, where, 16_387), random_bits(keys, where, 16_387))


def test_a_number_depends_on_seed_place_and_code_and_on_nothing_beside_it() -> None:
    keys = seed_keys([3, 9])
    grid = torch.arange(12).view(2, 6)
    together = random_bits(keys[:, None].expand(-1, 6, -1), grid, 40)
    for picture, seed in enumerate([3, 9]):
        for column in range(6):
            alone = bits([seed], [int(grid[picture, column])], 33)[0]
            assert torch.equal(alone, together[picture, column, :33])
    assert together.unique().numel() > 0.99 * together.numel()


SPANS = {"codes": (1, 1, 2**16), "places": (1, 2**16, 1), "seeds": (2**14, 1, 1), "all": (32, 64, 32)}


@pytest.mark.parametrize(("what", "span"), SPANS.items(), ids=SPANS)
def test_numbers_are_uniform_over(what: str, span: tuple[int, int, int]) -> None:
    pictures, places, codes = span
    keys = seed_keys(range(5, 5 + pictures))[:, None].expand(-1, places, -1)
    numbers = random_bits(keys, torch.arange(places).expand(pictures, -1), codes)
    for shift in (0, 8, 16, 24):
        counts = torch.bincount((numbers.flatten().long() >> shift) & 0xFF, minlength=256)
        assert chisquare(counts.numpy()).pvalue > 1e-3, f"bits {shift} to {shift + 7} over {what}"


@pytest.mark.parametrize("apart", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 24, 0), (2**32, 0, 0), (0, 0, 4)])
def test_neighbours_are_independent(apart: tuple[int, int, int]) -> None:
    """A table of 16 x 16 kinds of pairs, each as frequent as any other."""
    seed, place, code = apart
    rows, codes = 64, 512
    first = random_bits(seed_keys(range(100, 100 + rows)), torch.arange(rows) * 3, codes + code)
    keys, where = seed_keys(range(100 + seed, 100 + seed + rows)), torch.arange(rows) * 3 + place
    second = random_bits(keys, where, codes + code)[:, code:]
    pairs = ((first[:, :codes].long() >> 28) & 15) * 16 + ((second.long() >> 28) & 15)
    assert chisquare(torch.bincount(pairs.flatten(), minlength=256).numpy()).pvalue > 1e-3


def test_noise_is_gumbels_and_finite() -> None:
    noise = gumbel(seed_keys(range(8)), torch.arange(8), 2**15)
    assert noise.isfinite().all()
    assert kstest(noise.flatten().numpy(), gumbel_r.cdf).pvalue > 1e-3


def test_no_global_random_number_is_used_or_changed() -> None:
    state = torch.get_rng_state()
    gumbel(seed_keys([0]), torch.zeros(1, dtype=torch.long), 10)
    assert torch.equal(state, torch.get_rng_state())
