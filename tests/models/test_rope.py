import math

import numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv.models.rope import axis_angles, grid_rotation, rotate, sequence_rotation

places = st.tuples(st.integers(-1, 30), st.integers(-11, 30))


def rotated(x: torch.Tensor, place: tuple[int, int], theta: float = 100.0) -> torch.Tensor:
    row, column = (torch.tensor([value]) for value in place)
    return rotate(x[None, None, None], grid_rotation(row, column, len(x), theta)[None])[0, 0, 0]


def vector(seed: int) -> torch.Tensor:
    return torch.randn(8, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 99), places)
def test_pairs_turn_as_complex_numbers_do(seed: int, place: tuple[int, int]) -> None:
    x = vector(seed)
    angles = [value * 100.0 ** (-pair / 2) for value in place for pair in range(2)]
    pairs = torch.complex(x[:4], x[4:]).numpy() * numpy.exp(1j * numpy.array(angles))
    expected = numpy.concatenate([pairs.real, pairs.imag])
    numpy.testing.assert_allclose(rotated(x, place), expected, atol=1e-5)


@given(st.integers(0, 99), places, places, st.tuples(st.integers(-5, 5), st.integers(-5, 5)))
def test_attention_sees_only_how_far_apart_two_cells_are(
    seed: int, a: tuple[int, int], b: tuple[int, int], shift: tuple[int, int]
) -> None:
    query, key = vector(seed), vector(seed + 100)
    moved = [(row + shift[0], column + shift[1]) for row, column in (a, b)]
    here = rotated(query, a) @ rotated(key, b)
    there = rotated(query, moved[0]) @ rotated(key, moved[1])
    assert math.isclose(here, there, abs_tol=1e-4)


def test_rows_and_columns_are_told_apart_and_lengths_stay() -> None:
    x = vector(0)
    assert torch.equal(rotated(x, (0, 0)), x)
    assert not torch.allclose(rotated(x, (1, 0)), rotated(x, (0, 1)))
    torch.testing.assert_close(rotated(x, (7, 3)).norm(), x.norm())


def test_frequencies_fall_from_one() -> None:
    angles = axis_angles(torch.tensor([0, 1, 5]), pairs=4, theta=10_000.0)
    assert angles.shape == (3, 4)
    assert angles[0].tolist() == [0] * 4
    torch.testing.assert_close(angles[1], torch.tensor([1, 0.1, 0.01, 0.001]))
    torch.testing.assert_close(angles[2], 5 * angles[1])


def test_narrow_types_are_rotated_in_float32_and_come_back_narrow() -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    rotation = grid_rotation(torch.arange(3), torch.arange(3), 8, 100.0)[None]
    narrow = rotate(x.bfloat16(), rotation)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, rotate(x.bfloat16().float(), rotation).bfloat16())


def test_rows_of_a_batch_may_have_rotations_of_their_own() -> None:
    x = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    rotation = torch.stack([grid_rotation(torch.arange(3) + i, torch.arange(3), 8, 100.0) for i in (0, 4)])
    both = rotate(x, rotation)
    for row in range(2):
        assert torch.equal(both[[row]], rotate(x[[row]], rotation[[row]]))


@given(st.integers(0, 99), st.integers(0, 5000))
def test_in_a_sequence_every_pair_turns_with_the_position(seed: int, position: int) -> None:
    x = vector(seed)
    rotation = sequence_rotation(torch.tensor([[position]]), 8, 10_000.0)
    angles = position * 10_000.0 ** (-numpy.arange(4) / 4)
    pairs = torch.complex(x[:4], x[4:]).numpy() * numpy.exp(1j * angles)
    expected = numpy.concatenate([pairs.real, pairs.imag])
    numpy.testing.assert_allclose(rotate(x[None, None, None], rotation)[0, 0, 0], expected, atol=3e-3)


def test_rows_of_a_batch_may_count_from_places_of_their_own() -> None:
    places = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
    rotation = sequence_rotation(places, 6, 10_000.0)
    assert rotation.shape == (2, 4, 6)
    assert torch.equal(rotation[0, 1:], rotation[1, :3])
    assert torch.equal(rotation[0, 0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
