import math
import time

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from arkv.models.scenes.codebook import CODES, GRID, PATCH_VALUES, TOKENS, Codebook
from arkv.models.scenes.drawing import SIDE, sample_picture
from arkv.models.scenes.grammar import BACKGROUNDS, COLORS, Prompt

Samples = list[tuple[Prompt, NDArray[numpy.uint8]]]

PALETTE = [*BACKGROUNDS.values(), *COLORS.values()]


@pytest.fixture
def tiny() -> Codebook:
    """Four codes: black, white, and two that are white on the left and at the top."""
    codes = numpy.zeros((4, 2, 2, 3), numpy.float32)
    codes[1] = codes[2, :, 0] = codes[3, 0] = 1
    return Codebook(codes.reshape(4, PATCH_VALUES))


def test_decoded_pictures_are_close_to_the_true_ones(samples: Samples, decoded: Samples) -> None:
    true = numpy.stack([picture for _, picture in samples]).astype(numpy.float64)
    got = numpy.stack([picture for _, picture in decoded])
    assert got.dtype == numpy.uint8
    assert 10 * math.log10(255**2 / ((got - true) ** 2).mean()) >= 31


def test_plain_colors_come_back_exact(codebook: Codebook) -> None:
    pictures = numpy.empty((len(PALETTE), SIDE, SIDE, 3), numpy.uint8)
    pictures[:] = numpy.array(PALETTE)[:, None, None]
    tokens = codebook.encode(pictures)
    assert tokens.tolist() == [[index] * TOKENS for index in range(len(PALETTE))]
    assert numpy.array_equal(codebook.decode(tokens), pictures)


def test_a_fitted_codebook_has_the_usual_form(codebook: Codebook) -> None:
    assert codebook.vectors.shape == (CODES, PATCH_VALUES)
    assert codebook.vectors.dtype == torch.float32
    assert 0 <= codebook.vectors.min() <= codebook.vectors.max() <= 1


def test_tokens_run_from_left_to_right_then_down(tiny: Codebook) -> None:
    picture = numpy.zeros((1, SIDE, SIDE, 3), numpy.uint8)
    picture[0, 0:2, 2:4] = 255  # the second patch of the first row
    picture[0, 2:4, 0] = 255  # the left half of the first patch of the second row
    picture[0, 46, 46:48] = 255  # the upper half of the last patch
    tokens = tiny.encode(picture)
    assert tokens.shape == (1, TOKENS)
    assert tokens.dtype == torch.int64
    assert {index: int(tokens[0, index]) for index in tokens[0].nonzero().flatten().tolist()} == {
        1: 1,
        GRID: 2,
        TOKENS - 1: 3,
    }
    assert numpy.array_equal(tiny.decode(tokens), picture)


@given(hnp.arrays(numpy.int64, (2, TOKENS), elements=st.integers(0, CODES - 1)))
def test_tokens_survive_the_round_trip(codebook: Codebook, rows: NDArray[numpy.int64]) -> None:
    tokens = torch.from_numpy(rows)
    again = codebook.encode(codebook.decode(tokens))
    # Rounded to 8 bits a code stays nearest to itself, unless another lies within the rounding.
    distance = (codebook.vectors[tokens] - codebook.vectors[again]).abs().max()
    assert float(distance) <= 1 / 255


@given(hnp.arrays(numpy.uint8, (1, SIDE, SIDE, 3)))
def test_every_patch_gets_its_nearest_code(codebook: Codebook, picture: NDArray[numpy.uint8]) -> None:
    tokens = codebook.encode(picture)[0].numpy()
    patches = picture[0].reshape(GRID, 2, GRID, 2, 3).swapaxes(1, 2).reshape(TOKENS, 1, -1) / 255
    distances = ((patches - codebook.vectors.double().numpy()) ** 2).sum(axis=2)
    chosen = distances[numpy.arange(TOKENS), tokens]
    assert chosen == pytest.approx(distances.min(axis=1), abs=1e-5)


def test_rows_and_grids_of_tokens_decode_alike(tiny: Codebook) -> None:
    tokens = torch.randint(4, (3, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = tiny.decode(tokens)
    assert rows.shape == (3, SIDE, SIDE, 3)
    assert numpy.array_equal(rows, tiny.decode(tokens.reshape(3, GRID, GRID)))
    assert numpy.array_equal(rows, tiny.decode(tokens.to(torch.int32)))


def test_no_pictures_are_no_tokens(tiny: Codebook) -> None:
    tokens = tiny.encode(numpy.zeros((0, SIDE, SIDE, 3), numpy.uint8))
    assert tokens.shape == (0, TOKENS)
    assert tiny.decode(tokens).shape == (0, SIDE, SIDE, 3)


def test_a_seed_decides_the_fit(samples: Samples) -> None:
    pictures = numpy.stack([picture for _, picture in samples[:20]])
    one, same, other = (Codebook.fit(pictures, size=40, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.vectors, same.vectors)
    assert not torch.equal(one.vectors, other.vectors)
    assert one.vectors.shape == (40, PATCH_VALUES)


def test_too_few_pictures_to_fit_are_refused(samples: Samples) -> None:
    with pytest.raises(ValueError, match="more pictures"):
        Codebook.fit(samples[0][1][None])


def test_wrong_shapes_and_types_are_refused(tiny: Codebook) -> None:
    with pytest.raises(ValueError, match=r"\[4, 3\]"):
        Codebook(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="float64"):
        tiny.encode(numpy.zeros((1, SIDE, SIDE, 3)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[48, 48, 3\]"):
        tiny.encode(numpy.zeros((SIDE, SIDE, 3), numpy.uint8))
    with pytest.raises(ValueError, match=r"\[1, 10\]"):
        tiny.decode(torch.zeros(1, 10, dtype=torch.int64))


@pytest.mark.parametrize("token", [-1, 4])
def test_tokens_outside_the_codebook_are_refused(tiny: Codebook, token: int) -> None:
    with pytest.raises(IndexError):
        tiny.decode(torch.full((1, TOKENS), token))


def test_encoding_is_quick(codebook: Codebook) -> None:
    rng = numpy.random.default_rng(0)
    pictures = numpy.stack([sample_picture("counting", rng)[1] for _ in range(24)])
    durations = []
    for _ in range(20):
        start = time.perf_counter()
        codebook.encode(pictures)
        durations.append(time.perf_counter() - start)
    # Typically 4 ms; the median and the room above it keep a busy machine from failing this.
    assert sorted(durations)[10] < 0.1
