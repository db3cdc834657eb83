# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-not-found, import-untyped"
"""Attention of one query a head over slots: flash-decoding in Triton.

A first kernel reads the slots, each once, in many programs that do not wait for each other. Every program
leaves a partial output with the greatest score and the sum behind it. A second kernel puts the parts of a
head together and, where somebody observes, turns the scores that the first one left into mass. No sum is
formed by atomics: the same inputs give the same bits.

Decoding is bound by the bytes of keys and values, and from that follows the rest:

- Products are multiplications and sums in float32. A matrix unit wants sixteen queries, and a key head has
  one to eight: multiplying so few one by one takes no longer than the bytes take to arrive.
- A tile is the 16 slots of a block, and a program is one warp: nothing waits at a barrier, and a processor
  hides the latency of memory by holding many programs.
- Keys and values of a hidden slot are not loaded. A program stops at the last slot that may be looked at,
  so the full cache costs what is filled of it.

Triton is imported with this module, and this module when the first kernel is launched.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkv.attention.blocks import BLOCK, Blocks
from arkv.errors import ArkvError

PROGRAMS = 16
"""Programs that every processor gets before one of them takes a second tile: as many as it can hold."""
MOST_TILES = 8
"""Tiles that a program takes at the most: parts are next to nothing then, and no straggler is long."""

TILE = tl.constexpr(BLOCK)
# Slots, and entries of the table of blocks, that a program of the second kernel takes at a time.
WIDE = tl.constexpr(1024)
NOTHING = tl.constexpr(float("-inf"))


def tiles_of_program(tiles: int, sequences: int, processors: int) -> int:
    """How many tiles a program of the first kernel takes, one after the other.

    Long programs leave few parts to put together, short ones occupy the whole device when there are few
    sequences: the most that still leaves every processor its `PROGRAMS`.

    Args:
        tiles: tiles of one sequence.
        sequences: rows times key heads, or rows where the heads are unequal.
        processors: multiprocessors of the device.

    Returns:
        A power of two, 1 to `MOST_TILES`.
    """
    taken = 1
    while taken < min(tiles, MOST_TILES) and sequences * -(-tiles // (2 * taken)) >= PROGRAMS * processors:
        taken *= 2
    return taken


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    blocks: Blocks | None,
    kv_heads: int,
    mass: Tensor | None,
    scores: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    processors: int,
) -> Tensor:
    """Launch both kernels; nothing waits for the device.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, contiguous.
        values: as `keys`.
        visible: bool `[rows, slots]`.
        blocks: where each head's slots are, the blocks in the order of their heads; None if the heads are
            equal and lie one after the other.
        kv_heads: key heads.
        mass: float32 `[rows, slots or more]`, written to, or None.
        scores: as `mass`.
        key_scale: float32 `[rows, slots]`, or None.
        value_scale: as `key_scale`.
        processors: multiprocessors of the device.

    Returns:
        `[rows, heads, head_dim]` in the dtype of `query`.

    Raises:
        ArkvError: keys or values are not contiguous, or the heads are not as many as they say.
    """
    rows, heads, head_dim = query.shape
    slots = keys.shape[1]
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ArkvError("keys or values are not contiguous; give the leaves of the store as they are")
    if heads % kv_heads or (blocks is None and slots % kv_heads):
        raise ArkvError(f"{kv_heads} key heads do not divide {heads} heads and {slots} slots")
    group, capacity = heads // kv_heads, slots // kv_heads
    query, visible = query.contiguous(), visible.view(torch.uint8)
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    key_scale, value_scale = (x if x is None else x.contiguous() for x in (key_scale, value_scale))
    mass_stride, scores_stride = (0 if x is None else x.stride(0) for x in (mass, scores))
    if blocks is None:
        slot = filled = head = None
        tiles = -(-capacity // BLOCK)
        taken = tiles_of_program(tiles, rows * kv_heads, processors)
        programs = -(-tiles // taken)
        parts, positions, table_stride = kv_heads * programs, slots, 0
    else:
        slot, filled, head = (x.contiguous() for x in blocks)
        filled = filled.view(torch.uint8)
        tiles = head.shape[-1]
        taken = tiles_of_program(tiles, rows, processors)
        programs = -(-tiles // taken)
        # Rows may have one layout in common.
        parts, positions, table_stride = tiles, tiles * BLOCK, tiles if head.shape[0] == rows else 0

    observed = mass is not None or scores is not None
    output = torch.empty_like(query)
    part, greatest, total, logits = (
        torch.empty(rows, *shape, dtype=torch.float32, device=query.device)
        for shape in (
            (parts, group, head_dim),
            (parts, group),
            (parts, group),
            (group, positions if observed else 0),
        )
    )
    left = (part, greatest, total, logits if observed else None)
    specialised = {"GROUP": group, "HEAD_DIM": head_dim}
    # What more than four queries add up does not fit into the registers of one warp.
    warps = 1 if group <= 4 else 4
    with torch.cuda.device_of(query):
        if blocks is None:
            _attend_slots[programs, kv_heads, rows](
                *(query, keys, values, visible, key_scale, value_scale, *left),
                *(head_dim**-0.5, slots, capacity, visible.stride(0)),
                **specialised,
                TILES=taken,
                num_warps=warps,
            )
        else:
            _attend_blocks[programs, rows](
                *(query, keys, values, visible, key_scale, value_scale, *left),
                *(slot, filled, head, mass, scores),
                *(head_dim**-0.5, slots, tiles, visible.stride(0), table_stride, mass_stride, scores_stride),
                **specialised,
                HEADS=kv_heads,
                TILES=taken,
                num_warps=warps,
            )
        _combine[-(-slots // (kv_heads * WIDE.value)) if observed else 1, kv_heads, rows](
            *(*left, visible, slot, filled, head, output, mass, scores),
            *(parts, positions, capacity, visible.stride(0), table_stride, mass_stride, scores_stride),
            **specialised,
            num_warps=4,
        )
    return output


@triton.jit
def _load_query(query, row_and_head, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The queries of one key head, float32 `[group, 1, width]`; zero beyond what there are."""
    member = tl.arange(0, triton.next_power_of_2(GROUP))[:, None, None]
    column = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, None, :]
    place = (row_and_head * GROUP + member) * HEAD_DIM + column
    inside = (member < GROUP) & (column < HEAD_DIM)
    return tl.load(query + place, inside, 0).to(tl.float32) * scale


@triton.jit
def _attend_tile(
    query, keys, values, key_scale, value_scale, slot, seen, part, greatest, total, HEAD_DIM: tl.constexpr
):
    """Add one tile to a softmax under way; the pointers are those of the row.

    Returns part `[group, width]`, greatest and total `[group]`, and the logits `[group, tile]`, minus
    infinity where hidden.
    """
    column = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    place = slot[None, :, None] * HEAD_DIM + column[None, None, :]
    wanted = seen[None, :, None] & (column < HEAD_DIM)[None, None, :]
    key = tl.load(keys + place, wanted, 0.0)
    value = tl.load(values + place, wanted, 0.0)
    logits = tl.sum(query * key.to(tl.float32), 2)
    if key_scale is not None:
        logits *= tl.load(key_scale + slot, seen, 0)[None, :]
    logits = tl.where(seen[None, :], logits, NOTHING)
    higher = tl.maximum(greatest, tl.max(logits, 1))
    # Where nothing was seen yet, any finite number makes all weights zero.
    base = tl.where(higher == NOTHING, 0.0, higher)
    weights = tl.exp(logits - base[:, None])
    shrink = tl.exp(greatest - base)
    total = total * shrink + tl.sum(weights, 1)
    if value_scale is not None:
        weights *= tl.load(value_scale + slot, seen, 0)[None, :]
    part = part * shrink[:, None] + tl.sum(weights[:, :, None] * value.to(tl.float32), 1)
    return part, higher, total, logits


@triton.jit
def _leave_part(
    part,
    greatest,
    total,
    parts_left,
    greatest_left,
    total_left,
    index,
    wanted,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store one part: always how much it weighs, what it is only where wanted."""
    member = tl.arange(0, triton.next_power_of_2(GROUP))
    column = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    place = index * GROUP + member
    tl.store(greatest_left + place, tl.where(wanted, greatest, NOTHING), member < GROUP)
    tl.store(total_left + place, tl.where(wanted, total, 0.0), member < GROUP)
    inside = wanted & (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(parts_left + place[:, None] * HEAD_DIM + column[None, :], part, inside)


@triton.jit
def _attend_slots(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    parts_left,
    greatest_left,
    total_left,
    logits_left,
    scale,
    slots,
    capacity,
    visible_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr,
):
    """First kernel, equal heads: a program takes up to `TILES` tiles of one head of one row."""
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    GROUPS: tl.constexpr = triton.next_power_of_2(GROUP)
    keys += row * slots * HEAD_DIM
    values += row * slots * HEAD_DIM
    visible += row * visible_stride
    if key_scale is not None:
        key_scale += row * slots
    if value_scale is not None:
        value_scale += row * slots

    begin, end = head * capacity, (head + 1) * capacity
    begin += program * TILES * TILE
    ahead = tl.arange(0, TILES * TILE)
    any_seen = tl.load(visible + begin + ahead, begin + ahead < end, 0) != 0
    # Past the last slot that may be looked at there is nothing to do.
    tiles = tl.cdiv(tl.max(tl.where(any_seen, ahead + 1, 0), 0), TILE)

    queries = _load_query(query, row * heads + head, scale, GROUP, HEAD_DIM)
    member, offset = tl.arange(0, GROUPS), tl.arange(0, TILE)
    greatest = tl.full([GROUPS], NOTHING, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    part = tl.zeros([GROUPS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for tile in range(tiles):
        slot = begin + tile * TILE + offset
        seen = tl.load(visible + slot, slot < end, 0) != 0
        part, greatest, total, logits = _attend_tile(
            queries, keys, values, key_scale, value_scale, slot, seen, part, greatest, total, HEAD_DIM
        )
        if logits_left is not None:
            place = (row * GROUP + member)[:, None] * slots + slot[None, :]
            tl.store(logits_left + place, logits, (member < GROUP)[:, None] & seen[None, :])
    index = (row * heads + head) * tl.num_programs(0) + program
    _leave_part(part, greatest, total, parts_left, greatest_left, total_left, index, True, GROUP, HEAD_DIM)


@triton.jit
def _attend_blocks(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    parts_left,
    greatest_left,
    total_left,
    logits_left,
    slot_of,
    filled_of,
    head_of,
    mass,
    scores,
    scale,
    slots,
    blocks,
    visible_stride,
    table_stride,
    mass_stride,
    scores_stride,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr,
):
    """First kernel, unequal heads: a program takes up to `TILES` blocks of one row.

    Where the next block is another head's, it leaves what it has and begins anew: a part stands at the
    last block that went into it, and at the others one of no weight.
    """
    row = tl.program_id(1).to(tl.int64)
    GROUPS: tl.constexpr = triton.next_power_of_2(GROUP)
    keys += row * slots * HEAD_DIM
    values += row * slots * HEAD_DIM
    visible += row * visible_stride
    if key_scale is not None:
        key_scale += row * slots
    if value_scale is not None:
        value_scale += row * slots
    head_of += row * table_stride
    slot_of += row * table_stride * TILE
    filled_of += row * table_stride * TILE

    first = tl.program_id(0) * TILES
    # The second kernel writes to slots that have a block; what belongs to nobody is zero.
    share = first * TILE + tl.arange(0, TILES * TILE)
    if mass is not None:
        tl.store(mass + row * mass_stride + share, 0.0, share < slots)
    if scores is not None:
        tl.store(scores + row * scores_stride + share, 0.0, share < slots)

    member, offset = tl.arange(0, GROUPS), tl.arange(0, TILE)
    greatest = tl.full([GROUPS], NOTHING, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    part = tl.zeros([GROUPS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    last = tl.minimum(first + TILES, blocks) - 1
    for block in range(first, last + 1):
        head = tl.load(head_of + block)
        place = block * TILE + offset
        slot = tl.load(slot_of + place).to(tl.int32)
        filled = tl.load(filled_of + place) != 0
        seen = tl.load(visible + slot, filled, 0) != 0
        queries = _load_query(query, row * HEADS + head, scale, GROUP, HEAD_DIM)
        part, greatest, total, logits = _attend_tile(
            queries, keys, values, key_scale, value_scale, slot, seen, part, greatest, total, HEAD_DIM
        )
        if logits_left is not None:
            line = (row * GROUP + member)[:, None] * blocks * TILE
            tl.store(logits_left + line + place[None, :], logits, (member < GROUP)[:, None] & seen[None, :])
        done = (block == last) | (tl.load(head_of + block + 1, block < last, -1) != head)
        _leave_part(
            part,
            greatest,
            total,
            parts_left,
            greatest_left,
            total_left,
            row * blocks + block,
            done,
            GROUP,
            HEAD_DIM,
        )
        # Next to any score, what was summed up so far then weighs nothing.
        greatest = tl.where(done, NOTHING, greatest)


@triton.jit
def _combine(
    parts_left,
    greatest_left,
    total_left,
    logits_left,
    visible,
    slot_of,
    filled_of,
    head_of,
    output,
    mass,
    scores,
    parts,
    positions,
    capacity,
    visible_stride,
    table_stride,
    mass_stride,
    scores_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Second kernel: the first program of a head puts its parts together, all share its slots."""
    program, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    row = tl.program_id(2).to(tl.int64)
    GROUPS: tl.constexpr = triton.next_power_of_2(GROUP)
    # Parts at a time: with the width of a head, as many numbers whatever the group.
    MANY: tl.constexpr = 64 // GROUPS if GROUPS < 64 else 1
    member = tl.arange(0, GROUPS)
    if head_of is None:
        first = head * (parts // heads)
        last = first + parts // heads
        begin, end = head * capacity, (head + 1) * capacity
    else:
        # Blocks stand in the order of their heads.
        first, last = 0, 0
        for at in range(0, parts, WIDE):
            index = at + tl.arange(0, WIDE)
            owner = tl.load(head_of + row * table_stride + index, index < parts, heads)
            first += tl.sum((owner < head).to(tl.int32), 0)
            last += tl.sum((owner <= head).to(tl.int32), 0)
        begin, end = first * TILE, last * TILE
        slot_of += row * table_stride * TILE
        filled_of += row * table_stride * TILE

    greatest = tl.full([GROUPS], NOTHING, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    for at in range(first, last, MANY):
        index = at + tl.arange(0, MANY)
        place = (row * parts + index)[None, :] * GROUP + member[:, None]
        inside = (index < last)[None, :] & (member < GROUP)[:, None]
        tops = tl.load(greatest_left + place, inside, NOTHING)
        higher = tl.maximum(greatest, tl.max(tops, 1))
        base = tl.where(higher == NOTHING, 0.0, higher)
        sums = tl.load(total_left + place, inside, 0) * tl.exp(tops - base[:, None])
        total = total * tl.exp(greatest - base) + tl.sum(sums, 1)
        greatest = higher
    base = tl.where(greatest == NOTHING, 0.0, greatest)
    # A head that sees nothing has no sum.
    norm = tl.where(total == 0, 1.0, total)

    if program == 0:
        column = tl.arange(0, triton.next_power_of_2(HEAD_DIM))
        result = tl.zeros([GROUPS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
        for at in range(first, last, MANY):
            index = at + tl.arange(0, MANY)
            place = (row * parts + index)[None, :] * GROUP + member[:, None]
            inside = (index < last)[None, :] & (member < GROUP)[:, None]
            tops = tl.load(greatest_left + place, inside, NOTHING)
            # What is of no weight was not left.
            there = (tops != NOTHING)[:, :, None] & (column < HEAD_DIM)[None, None, :]
            part = tl.load(parts_left + place[:, :, None] * HEAD_DIM + column[None, None, :], there, 0)
            result += tl.sum(part * tl.exp(tops - base[:, None])[:, :, None], 1)
        result /= norm[:, None]
        place = ((row * heads + head) * GROUP + member)[:, None] * HEAD_DIM + column[None, :]
        inside = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(output + place, result.to(output.dtype.element_ty), inside)

    if logits_left is not None:
        for at in range(begin + program * WIDE, end, tl.num_programs(0) * WIDE):
            position = at + tl.arange(0, WIDE)
            held = position < end
            slot = position
            if head_of is not None:
                held = held & (tl.load(filled_of + position, held, 0) != 0)
                slot = tl.load(slot_of + position, held, 0)
            seen = tl.load(visible + row * visible_stride + slot, held, 0) != 0
            place = (row * GROUP + member)[:, None] * positions + position[None, :]
            there = (member < GROUP)[:, None] & seen[None, :]
            if mass is not None:
                logits = tl.load(logits_left + place, there, NOTHING)
                weights = tl.exp(logits - base[:, None]) / norm[:, None]
                tl.store(mass + row * mass_stride + slot, tl.sum(weights, 0), held)
            if scores is not None:
                logits = tl.load(logits_left + place, there, 0)
                tl.store(scores + row * scores_stride + slot, tl.sum(logits, 0), held)
