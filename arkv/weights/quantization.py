"""Weights in eight and four bits: how a matrix is rounded, and what its codes stand for.

Only weights are rounded, never what they are multiplied with. Rows of a matrix are rounded independently of
each other, so a matrix may come in parts, as checkpoints have it.

In eight bits a row has one scale, and a code from -127 to 127 times the scale is the weight. In four bits
the neighbours of a group within a row have a scale and a zero; a code from 0 to 15, less 8, times the scale,
plus the zero is the weight. Rounding is to the nearest, between the least and the greatest of the group.
These are the formats that the products of PyTorch for the CPU take.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from arkv.errors import ArkvError

WeightDtype = Literal["int8", "int4"]
"""What weights can be stored as beside the model's own dtype."""

GROUPS = (64, 32)
"""Weights of a row that share scale and zero in four bits: the first that divides the row."""

MULTIPLE = {"int8": (1, 1), "int4": (GROUPS[-1], 16)}
"""What columns and rows of a matrix have to be multiples of."""

ELEMENTS = 2**22
"""Weights that are rounded at a time: in float32 with all that is computed on the way, some 100 MB."""


def check_weight_dtype(weights: str | None) -> WeightDtype | None:
    """Raise `ArkvError` unless weights can be stored so."""
    if weights is not None and weights not in get_args(WeightDtype):
        known = " or ".join(map(repr, get_args(WeightDtype)))
        raise ArkvError(f"weights is {weights!r:.60}: expected {known}, or None for the plain ones")
    return weights  # type: ignore[return-value]


def can_quantize(rows: int, columns: int, weights: WeightDtype) -> bool:
    """Whether a matrix of this shape can be stored so."""
    by_columns, by_rows = MULTIPLE[weights]
    return columns % by_columns == 0 and rows % by_rows == 0


def group_of(columns: int) -> int:
    """The size of a group in four bits, in rows of so many columns."""
    return next(group for group in GROUPS if columns % group == 0)


def codes_shape(rows: int, columns: int, weights: WeightDtype) -> tuple[int, int]:
    """Shape of the codes: int8, or uint8 with two codes a byte, the even column in the lower half."""
    return (rows, columns) if weights == "int8" else (rows, columns // 2)


def scales_shape(rows: int, columns: int, weights: WeightDtype) -> tuple[int, ...]:
    """Shape of the scales: of each row; in four bits of each group and row, scale and zero."""
    return (rows,) if weights == "int8" else (columns // group_of(columns), rows, 2)


def quantize(matrix: Tensor, weights: WeightDtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round a matrix.

    Args:
        matrix: floating point `[rows, columns]`.
        weights: how.
        dtype: of scales and zeros. Codes are chosen for them as they are after rounding to it.

    Returns:
        Codes of `codes_shape` and scales of `scales_shape`.
    """
    wide = matrix.float()
    if weights == "int8":
        scales = (wide.abs().amax(1) / 127).to(dtype)
        codes = (wide / _divisor(scales)[:, None]).round().clamp(-127, 127)
        return codes.to(torch.int8), scales
    grouped = wide.unflatten(1, (-1, group_of(matrix.shape[1])))
    least, greatest = grouped.aminmax(dim=-1)
    scales = ((greatest - least) / 15).to(dtype)
    zeros = (least + 8 * scales.float()).to(dtype)
    codes = ((grouped - zeros.float()[..., None]) / _divisor(scales)[..., None]).round().clamp(-8, 7) + 8
    both = torch.stack([scales, zeros], -1).transpose(0, 1).contiguous()
    return join_halves(codes.to(torch.uint8).flatten(1)), both


def dequantize(codes: Tensor, scales: Tensor, weights: WeightDtype) -> Tensor:
    """The matrix that codes stand for, in the dtype of the scales: `[rows, columns]`."""
    if weights == "int8":
        return codes.to(scales.dtype) * scales[:, None]
    scale, zero = scales.transpose(0, 1)[..., None, :].unbind(-1)
    grouped = split_halves(codes).unflatten(1, (len(scales), -1)).to(scales.dtype) - 8
    return torch.addcmul(zero, grouped, scale).flatten(1)  # rounds once


def parts_of(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """A matrix in parts of about `ELEMENTS`: the first row of each, and its rows."""
    rows = max(1, ELEMENTS // max(1, matrix.shape[1]))
    for first in range(0, len(matrix), rows):
        yield first, matrix[first : first + rows]


def join_halves(codes: Tensor) -> Tensor:
    """Codes of four bits, one a byte, `[..., columns]`, to two a byte, the even column in the lower half."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def split_halves(codes: Tensor) -> Tensor:
    """Codes of four bits, two a byte, to one a byte."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)


def _divisor(scales: Tensor) -> Tensor:
    """Scales in float32; one where a scale is zero, and every weight of the group the same."""
    wide = scales.float()
    return torch.where(wide == 0, 1.0, wide)
