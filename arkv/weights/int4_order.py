"""Codes of four bits in the order in which PyTorch's product for the CPU reads them, and back.

That order depends on the processor, and nothing but PyTorch knows it: blocks of rows, in a block column after
column, in a column some permutation of the rows. So size of a block and permutation are found by packing
rows that can be told apart.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from arkv.weights.quantization import ELEMENTS, join_halves, split_halves

SEVERAL = 128
"""Rows that are whole blocks on every processor."""


def pack(codes: Tensor) -> Tensor:
    """Codes of a matrix, uint8 `[rows, columns / 2]`, in the product's order.

    Args:
        codes: as `arkv.weights.quantization` has them, on the CPU, of rows that are a multiple of 16.
    """
    # A part at a time: between the two there are four bytes for every code.
    rows = -(-ELEMENTS // (2 * codes.shape[1] * SEVERAL)) * SEVERAL
    return torch.cat([_packed(split_halves(part)) for part in codes.split(rows)])


def unpack(packed: Tensor) -> Tensor:
    """What was packed, `[rows, columns / 2]`."""
    rows = len(packed)
    whole = rows // _block() * _block()
    return torch.cat([_unpacked(packed[:whole], _block()), _unpacked(packed[whole:], rows - whole)])


def _unpacked(packed: Tensor, block: int) -> Tensor:
    if not len(packed):
        return packed
    by_block = split_halves(packed.reshape(-1, packed.shape[1] * 2, block // 2))
    return join_halves(by_block[..., _order(block)].transpose(1, 2).flatten(0, 1))


def _packed(codes: Tensor) -> Tensor:
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)


@cache
def _block() -> int:
    """Rows of a block."""
    codes = torch.tensor([[0, 15]]).expand(SEVERAL, 2)
    return 2 * int((_packed(codes).flatten() == 0).int().cumprod(0).sum())


@cache
def _order(rows: int) -> Tensor:
    """Where each row of a block is."""
    number = torch.arange(rows)[:, None].expand(rows, 2)
    low, high = (split_halves(_packed(part).view(2, -1))[0].int() for part in (number & 15, number >> 4))
    return (low | high << 4).argsort()
