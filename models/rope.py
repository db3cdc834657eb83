"""Rotary position embedding (RoFormer, arXiv 2104.09864) over one or two axes.

A table of cosines and sines is computed once per batch and looked up by index while decoding, so a
key is rotated at birth and never again: what a cache policy does with it later cannot change it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def axis_angles(positions: Tensor, pairs: int, theta: float) -> Tensor:
    """Angles of one axis.

    Args:
        positions: `[...]`, any real dtype; the coordinate of each token on this axis.
        pairs: number of rotated pairs that this axis owns.
        theta: base of the geometric series of frequencies.

    Returns:
        float32 `[..., pairs]`, radians.
    """
    frequencies = theta ** (-torch.arange(pairs, dtype=torch.float32) / pairs)
    return positions.float()[..., None] * frequencies.to(positions.device)


def sequence_rotation(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Rotation of tokens in a sequence: every pair turns with the position.

    Args:
        positions: `[...]` place of each token.
        head_dim: width of a head, even.
        theta: base of the frequencies.

    Returns:
        float32 `[..., head_dim]`: the cosines of the `head_dim / 2` pairs, then their sines.
    """
    angles = axis_angles(positions, head_dim // 2, theta)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def grid_rotation(rows: Tensor, columns: Tensor, head_dim: int, theta: float) -> Tensor:
    """Rotation of tokens on a grid: half of the pairs turn with the row, half with the column.

    Args:
        rows: `[n]` row of each token.
        columns: `[n]` column of each token.
        head_dim: width of a head, divisible by four.
        theta: base of the frequencies of both axes.

    Returns:
        float32 `[n, head_dim]`: the cosines of the `head_dim / 2` pairs, then their sines.
    """
    quarter = head_dim // 4
    angles = torch.cat([axis_angles(p, quarter, theta) for p in (rows, columns)], dim=-1)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the pairs `(i, i + head_dim / 2)` of queries or keys.

    Args:
        x: `[rows, tokens, heads, head_dim]`, any floating dtype.
        rotation: float32 `[rows or 1, tokens, head_dim]`, cosines then sines.

    Returns:
        The rotated tensor, in the dtype of `x`. The rotation itself is done in float32.
    """
    cosine, sine = rotation[:, :, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
