# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-not-found, import-untyped"
"""Products of few rows with weights of eight and four bits, in Triton.

A decoding step is bound by the bytes of the weights, so they are read once, as codes, and turned into numbers
in registers. A program has some rows of the weight and all columns of them: no sum is formed by several, so
that a row of the input gives the same bits in every run.

Codes are small whole numbers, exact in the dtype of the input. They are multiplied as they are; scale and
zero are applied to the sums of a group, in float32. Two codes of four bits in a byte are of an even column
and the odd one behind it: two products, with the even and the odd columns of the input.

Triton is imported with this module, and this module when the first kernel is launched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkv.launch import Launch, launch_all

LEAST = 16
"""Rows of the input that a matrix unit takes at the least."""
TILE = 32
"""Rows of the weight of a program."""
COLUMNS = 128
"""Columns that a program takes at a time, in eight bits."""
TOGETHER = 4
"""Groups that a program takes at a time, in four bits, where that many divide a row."""


def multiply(input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """Launch the kernel; arguments and result are those of `arkv.weights.products.small_product`."""
    output, launch = launch_of(input, codes, scales)
    launch_all([launch], input)
    return output


def launch_of(input: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Launch]:
    """What `multiply` launches, and the output that will be written.

    No device is asked, so that the tensors may be on the meta device.
    """
    rows, columns = input.shape
    outer = len(codes)
    output = input.new_empty(rows, outer)
    most = 4 * LEAST if codes.dtype == torch.int8 else 2 * LEAST  # more would not fit into registers
    tile = min(max(triton.next_power_of_2(rows), LEAST), most)
    arguments = {
        "input": input.contiguous(),
        "codes": codes,
        "scales": scales,
        "output": output,
        "rows": rows,
        "outer": outer,
        "INNER": columns,
        "TILE_ROWS": tile,
        "TILE": TILE,
    }
    grid = (triton.cdiv(outer, TILE), triton.cdiv(rows, tile), 1)
    if codes.dtype == torch.int8:
        return output, Launch(
            _multiply_bytes, grid, arguments | {"STEP": COLUMNS}, {"num_warps": 4, "num_stages": 5}
        )
    groups = len(scales)
    together = TOGETHER if groups % TOGETHER == 0 else 1
    arguments |= {"GROUP": columns // groups, "TOGETHER": together}
    return output, Launch(_multiply_halves, grid, arguments, {"num_warps": 4, "num_stages": 3})


@triton.jit
def _multiply_bytes(
    input,
    codes,
    scales,
    output,
    rows,
    outer,
    INNER: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Int8 codes with a scale for each row of the weight."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.arange(0, STEP)
    total = tl.zeros((TILE_ROWS, TILE), tl.float32)
    for start in range(0, INNER, STEP):
        inside = start + column < INNER
        weight = tl.load(
            codes + place[:, None].to(tl.int64) * INNER + start + column,
            mask=(place < outer)[:, None] & inside,
            other=0,
        )
        number = tl.load(
            input + row[:, None] * INNER + start + column, mask=(row < rows)[:, None] & inside, other=0.0
        )
        total = tl.dot(number, tl.trans(weight.to(tl.float32).to(number.dtype)), total)
    total *= tl.load(scales + place, mask=place < outer, other=0.0).to(tl.float32)
    tl.store(
        output + row[:, None] * outer + place,
        total.to(output.dtype.element_ty),
        mask=(row < rows)[:, None] & (place < outer),
    )


@triton.jit
def _multiply_halves(
    input,
    codes,
    scales,
    output,
    rows,
    outer,
    INNER: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """Codes of four bits with scale and zero for each group of a row of the weight."""
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    byte = tl.arange(0, GROUP // 2)
    total = tl.zeros((TILE_ROWS, TILE), tl.float32)
    for first in range(0, INNER // GROUP, TOGETHER):
        for step in tl.static_range(TOGETHER):
            group = first + step
            pair = tl.load(
                codes + place[:, None].to(tl.int64) * (INNER // 2) + group * (GROUP // 2) + byte,
                mask=(place < outer)[:, None],
                other=0,
            )
            number = tl.load(
                input + row[:, None] * INNER + group * GROUP + tl.arange(0, GROUP),
                mask=(row < rows)[:, None],
                other=0.0,
            )
            even, odd = tl.split(tl.reshape(number, (TILE_ROWS, GROUP // 2, 2)))
            low = ((pair & 15).to(tl.float32) - 8).to(even.dtype)
            high = ((pair >> 4).to(tl.float32) - 8).to(even.dtype)
            part = tl.dot(even, tl.trans(low))
            part = tl.dot(odd, tl.trans(high), part)
            both = scales + (group * outer + place) * 2
            scale = tl.load(both, mask=place < outer, other=0.0).to(tl.float32)
            zero = tl.load(both + 1, mask=place < outer, other=0.0).to(tl.float32)
            sums = tl.sum(number.to(tl.float32), 1)
            total += part * scale + sums[:, None] * zero
    tl.store(
        output + row[:, None] * outer + place,
        total.to(output.dtype.element_ty),
        mask=(row < rows)[:, None] & (place < outer),
    )
