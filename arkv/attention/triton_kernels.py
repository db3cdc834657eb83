# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: disable-error-code="import-not-found, import-untyped"
"""Attention of one query a head over slots, or of a window of them: flash-decoding in Triton.

A first kernel reads the slots, each once. The slots of a head are one part, or several where they are many,
and a part is a program's. A head of one part is finished by that program: output and mass are written where
they belong. Of several parts each leaves a partial output, with the greatest score and the sum behind it,
and a second kernel puts them together.

How the slots of a head are cut depends on how many they are and never on the batch, and no sum is formed by
atomics: a row gives the same bits alone, in any batch and at any place in it, and again in every run.

Decoding is bound by the bytes of keys and values, and from that follows the rest:

- One query a key head: products are multiplications and sums in float32. A matrix unit wants eight queries
  at the least, and what it would need to convert and to lay out costs more than it saves. Every lane of
  slots has a softmax of its own until the end, so that threads exchange nothing but the sum of a product.
- Several queries a key head, of a group or of a window of tokens: matrix products, by which a tile is read
  once for all of them. In a window each token sees slots of its own.
- All keys and values of a tile are on their way before the first of them is used.
- Keys and values of a hidden slot are not loaded. A program stops at the last slot that may be looked at,
  so the full cache costs what is filled of it.

`arkv.attention.tunables` has the sizes. Triton is imported with this module, and this module when the first
kernel is launched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from arkv.attention.blocks import BLOCK, Blocks
from arkv.attention.quantization import GROUP as GROUP_OF_CODES
from arkv.attention.tunables import Shape, Tuning, parts_of, tuning_of
from arkv.errors import ArkvError
from arkv.launch import Launch, launch_all

WIDEST = 1024
"""Slots, and entries of the table of blocks, that a program takes at a time at the most."""
WORD = 16
"""Bytes that a thread loads at a time."""
WARP = 32
"""Threads."""
MOST_QUERIES = 32
"""That a program takes of a window; of 64 the sums take more registers than a thread has on sm_80."""
FLOAT8_FROM = (8, 9)
"""Compute capability that converts float8."""

TILE = tl.constexpr(BLOCK)
NOTHING = tl.constexpr(float("-inf"))


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
    tuning: Tuning | None = None,
) -> Tensor:
    """Launch the kernels; nothing waits for the device.

    Args:
        query: `[rows, heads, head_dim]`, or of a window `[rows, tokens, heads, head_dim]`. Then `visible`,
            `mass` and `scores` have tokens, too: `[rows, tokens, slots]`.
        keys: `[rows, slots, head_dim]`, contiguous; of two codes a byte `[rows, slots, head_dim / 2]`.
        values: as `keys`.
        visible: bool `[rows, slots]`.
        blocks: where each head's slots are, the blocks in the order of their heads; None if the heads are
            equal and lie one after the other.
        kv_heads: key heads.
        mass: float32 `[rows, slots or more]`, written to, or None.
        scores: as `mass`.
        key_scale: float32 `[rows, slots]`, or None; of two codes a byte bfloat16 `[rows, slots, 2 groups]`.
        value_scale: as `key_scale`.
        tuning: sizes to go by; None for what the table has.

    Returns:
        The shape and the dtype of `query`.

    Raises:
        ArkvError: keys or values are not contiguous, the heads are not as many as they say, or the GPU is
            too old for float8.
    """
    if keys.dtype == torch.float8_e4m3fn and query.is_cuda and _capability(query.device) < FLOAT8_FROM:
        raise ArkvError("this GPU does not convert float8, which needs compute capability 8.9: take int8")
    tensors = query, keys, values, visible, blocks, kv_heads, mass, scores, key_scale, value_scale
    output, launches = launches_of(*tensors, tuning)
    launch_all(launches, query)
    return output


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def launches_of(
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
    tuning: Tuning | None = None,
) -> tuple[Tensor, list[Launch]]:
    """What `attend` launches, and the output that will be written; arguments and errors are the same.

    No device is asked, so that the tensors may be on the meta device.
    """
    window = query.ndim == 4
    if not window:  # of one token
        query, visible = query[:, None], visible[:, None]
        mass, scores = (room if room is None else room[:, None] for room in (mass, scores))
    rows, tokens, heads, head_dim = query.shape
    slots, itemsize = keys.shape[1], keys.element_size()
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ArkvError("keys or values are not contiguous; give the leaves of the store as they are")
    if heads % kv_heads or (blocks is None and slots % kv_heads):
        raise ArkvError(f"{kv_heads} key heads do not divide {heads} heads and {slots} slots")
    group, capacity = heads // kv_heads, slots // kv_heads
    if tuning is None:
        tuning = tuning_of(Shape.of(group, head_dim, itemsize, blocks is not None, window))
    visible = visible.view(torch.uint8)
    visible = visible if visible.stride(-1) == 1 else visible.contiguous()
    # A program takes so many tokens of a window.
    groups = triton.next_power_of_2(group)
    at_once = min(triton.next_power_of_2(tokens), max(MOST_QUERIES // groups, 1))
    turns = -(-tokens // at_once)
    slot = filled = head = None
    if blocks is None:
        parts, share = parts_of(capacity, tuning)
        places, table, positions = kv_heads * parts, 0, slots
        grid = (parts * turns, kv_heads, rows)
    else:
        slot, filled, head = (x.contiguous() for x in blocks)
        filled = filled.view(torch.uint8)
        # A program takes a run of blocks, and where the head changes in it a part ends too.
        parts, share = 0, tuning.part
        places = head.shape[-1]
        # Rows may have one layout in common.
        table, positions = places if head.shape[0] == rows else 0, places * BLOCK
        grid = (-(-positions // share) * turns, rows, 1)

    observed = mass is not None or scores is not None
    finished = parts == 1 and not window
    output = query.new_empty(query.shape)
    part, greatest, total, logits = (
        query.new_empty(rows, *shape, dtype=torch.float32) if wanted else None
        for wanted, shape in (
            (not finished, (places, tokens * group, head_dim)),
            (not finished, (places, tokens * group)),
            (not finished, (places, tokens * group)),
            (observed, (tokens * group, positions)),
        )
    )
    # As many numbers whatever the group.
    wide = min(triton.next_power_of_2(capacity), max(WIDEST // groups, 1))
    known = {
        "query": query.contiguous(),
        "keys": keys,
        "values": values,
        "visible": visible,
        "key_scale": key_scale if key_scale is None else key_scale.contiguous(),
        "value_scale": value_scale if value_scale is None else value_scale.contiguous(),
        "slot_of": slot,
        "filled_of": filled,
        "head_of": head,
        "output": output,
        "mass": mass,
        "scores": scores,
        "parts_left": part,
        "greatest_left": greatest,
        "total_left": total,
        "logits_left": logits,
        "scale": head_dim**-0.5,
        "slots": slots,
        "positions": positions,
        "capacity": capacity,
        "share": share,
        "tokens": tokens,
        "visible_stride": visible.stride(0),
        "visible_step": visible.stride(1),
        "table_stride": table,
        "mass_stride": 0 if mass is None else mass.stride(0),
        "mass_step": 0 if mass is None else mass.stride(1),
        "scores_stride": 0 if scores is None else scores.stride(0),
        "scores_step": 0 if scores is None else scores.stride(1),
        "HEADS": kv_heads,
        "GROUP": group,
        "TOKENS": at_once,
        "HEAD_DIM": head_dim,
        "PARTS": parts,
        "FINISHED": finished,
        "SHARE": triton.next_power_of_2(share),
        "WIDE": wide,
        "TABLE": min(triton.next_power_of_2(places), WIDEST),
        "RUN": share // BLOCK,
    } | tile_of(at_once * group, head_dim, itemsize, tuning)

    def launch(kernel: Any, grid: tuple[int, int, int], **options: int) -> Launch:
        return Launch(kernel, grid, {name: known[name] for name in kernel.arg_names}, options)

    first = _attend_slots if blocks is None else _attend_blocks
    launches = [launch(first, grid, num_warps=tuning.warps, num_stages=tuning.stages)]
    if not finished:
        programs = tokens * (-(-capacity // wide) if observed else 1)
        launches.append(launch(_combine, (programs, kv_heads, rows), num_warps=4 if wide > 128 else 1))
    return output if window else output[:, 0], launches


def tile_of(queries: int, head_dim: int, itemsize: int, tuning: Tuning) -> dict[str, int]:
    """How a program lays out its tile over its threads.

    Args:
        queries: of a program.
        head_dim: numbers of a key.
        itemsize: bytes of a stored number.
        tuning: sizes to go by.

    Returns:
        `SLOTS` of a tile; for one query besides, what its threads take at a time: so many neighbouring
        `COLUMNS` of so many slots, `LANES`.
    """
    width = triton.next_power_of_2(head_dim)
    # As many numbers as one load brings: rows of a length that no power of two divides have shorter ones.
    row = head_dim * itemsize
    columns = min(width, tuning.threads * max(min(WORD, row & -row) // itemsize, 1))
    threads = columns * itemsize // min(WORD, row & -row)
    lanes = tuning.warps * WARP // max(threads, 1)
    slots = tuning.tile * tuning.warps
    return {"SLOTS": max(slots, BLOCK if queries > 1 else lanes), "COLUMNS": columns, "LANES": lanes}


@triton.jit
def _held(slot_of, filled_of, position, end):
    """The slots at some positions, and whether there is one."""
    held = position < end
    slot = position
    if slot_of is not None:
        held = held & (tl.load(filled_of + position, held, 0) != 0)
        slot = tl.load(slot_of + position, held, 0).to(tl.int32)
    return slot, held


@triton.jit
def _look(visible, slot_of, filled_of, position, end):
    """The slots at some positions, whether there is one, and whether it may be looked at."""
    slot, held = _held(slot_of, filled_of, position, end)
    return slot, held, tl.load(visible + slot, held, 0) != 0


@triton.jit
def _attend(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    slot_of,
    filled_of,
    logits_left,
    scale,
    begin,
    end,
    positions,
    left,
    query_step,
    visible_step,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Attention of a head's queries over some positions.

    The pointers are those of the row, or of the head, and of the first token of a window. Of `TOKENS` there
    are `left`, each a step behind the one before.

    Returns part `[width, queries]`, not divided by its sum, greatest and total `[queries]`.
    """
    if GROUP * TOKENS == 1:
        part, greatest, total = _attend_alone(
            query,
            keys,
            values,
            visible,
            key_scale,
            value_scale,
            slot_of,
            filled_of,
            logits_left,
            scale,
            begin,
            end,
            positions,
            HEAD_DIM,
            SLOTS,
            COLUMNS,
            LANES,
        )
    else:
        part, greatest, total = _attend_together(
            query,
            keys,
            values,
            visible,
            key_scale,
            value_scale,
            slot_of,
            filled_of,
            logits_left,
            scale,
            begin,
            end,
            positions,
            left,
            query_step,
            visible_step,
            GROUP,
            TOKENS,
            HEAD_DIM,
            SLOTS,
        )
    return part, greatest, total


@triton.constexpr_function
def _stored(head_dim, packed):
    """Elements of a stored vector: numbers, or bytes of two codes (see `arkv.attention.quantization`)."""
    return head_dim // 2 if packed else head_dim


@triton.constexpr_function
def _scales(head_dim, packed):
    """What stands beside a stored vector: a scale, or the scales of its groups and then their zeros."""
    return 2 * max(1, head_dim // GROUP_OF_CODES) if packed else 1


@triton.jit
def _load_stored(leaf, slot, column, wanted, HEAD_DIM: tl.constexpr):
    """Numbers of slots, `[slots, columns]`, as they are stored; of two codes a byte, their bytes."""
    if leaf.dtype.element_ty == tl.uint8:
        HALF: tl.constexpr = _stored(HEAD_DIM, True)
        place = slot[:, None] * HALF + column[None, :] % HALF
    else:
        place = slot[:, None] * HEAD_DIM + column[None, :]
    return tl.load(leaf + place, wanted, 0.0)


@triton.jit
def _widened(stored, scale, slot, seen, first, HEAD_DIM: tl.constexpr):
    """As float32 what was loaded from column `first` on; codes of eight bits without their scale."""
    if stored.dtype == tl.uint8:
        SLOTS: tl.constexpr = stored.shape[0]
        COLUMNS: tl.constexpr = stored.shape[1]
        SCALES: tl.constexpr = _scales(HEAD_DIM, True)
        GROUPS: tl.constexpr = SCALES // 2
        SIZE: tl.constexpr = COLUMNS if GROUPS == 1 else min(COLUMNS, HEAD_DIM // GROUPS)
        column = first + tl.arange(0, COLUMNS)
        code = (stored >> tl.where(column < HEAD_DIM // 2, 0, 4)[None, :].to(tl.uint8)) & 15
        # One load of scale and zero for all the numbers of a group.
        group = first // (HEAD_DIM // GROUPS) + tl.arange(0, COLUMNS // SIZE)
        there = seen[:, None] & (group < GROUPS)[None, :]
        place = scale + slot[:, None] * SCALES + group[None, :]
        step = tl.load(place, there, 0.0).to(tl.float32)
        zero = tl.load(place + GROUPS, there, 0.0).to(tl.float32)
        grouped = tl.reshape(code.to(tl.float32), [SLOTS, COLUMNS // SIZE, SIZE])
        wide = tl.reshape(zero[:, :, None] + grouped * step[:, :, None], [SLOTS, COLUMNS])
    else:
        wide = stored.to(tl.float32)
    return wide


@triton.jit
def _attend_alone(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    slot_of,
    filled_of,
    logits_left,
    scale,
    begin,
    end,
    positions,
    HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """One query a key head.

    A key is taken in chunks of `COLUMNS` numbers, and a chunk of a tile is loaded as `[slots, COLUMNS]`: over
    two axes there is one way for threads to lie, over more each version of Triton has its own. `LANES` slots
    are what the threads take at a time. Seen as `[rounds, LANES, COLUMNS]`, sums over chunks and rounds stay
    within a thread.
    """
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    CHUNKS: tl.constexpr = triton.next_power_of_2(HEAD_DIM) // COLUMNS
    ROUNDS: tl.constexpr = SLOTS // LANES
    column = tl.arange(0, COLUMNS)
    # Every lane loads the query for itself, and has it where it will have keys.
    of_lanes = column[None, :] + tl.arange(0, LANES)[:, None] * 0
    asking, part = (), ()
    for chunk in tl.static_range(CHUNKS):
        asked = of_lanes + chunk * COLUMNS
        asking = asking + (tl.load(query + asked, asked < HEAD_DIM, 0).to(tl.float32) * scale,)
        part = part + (tl.zeros([LANES, COLUMNS], tl.float32),)

    greatest = tl.full([LANES], NOTHING, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for at in range(begin, end, SLOTS):
        position = at + tl.arange(0, SLOTS)
        slot, _, seen = _look(visible, slot_of, filled_of, position, end)
        key, value = (), ()
        for chunk in tl.static_range(CHUNKS):
            at_column = chunk * COLUMNS + column
            wanted = seen[:, None] & (at_column < HEAD_DIM)[None, :]
            key = key + (_load_stored(keys, slot, at_column, wanted, HEAD_DIM),)
            value = value + (_load_stored(values, slot, at_column, wanted, HEAD_DIM),)
        if key_scale is not None and not PACKED:
            key_factor = tl.load(key_scale + slot, seen, 0)
        if value_scale is not None and not PACKED:
            value_factor = tl.load(value_scale + slot, seen, 0)
        # Always so, which the compiler does not know: it would move each load down to where it is used.
        if at < positions:
            product = tl.zeros([ROUNDS, LANES, COLUMNS], tl.float32)
            for chunk in tl.static_range(CHUNKS):
                wide = _widened(key[chunk], key_scale, slot, seen, chunk * COLUMNS, HEAD_DIM)
                product += asking[chunk] * tl.reshape(wide, [ROUNDS, LANES, COLUMNS])
            logits = tl.sum(product, 2)
            if key_scale is not None and not PACKED:
                logits *= tl.reshape(key_factor, [ROUNDS, LANES])
            logits = tl.where(tl.reshape(seen, [ROUNDS, LANES]), logits, NOTHING)
            higher = tl.maximum(greatest, tl.max(logits, 0))
            # Where nothing was seen yet, any finite number makes all weights zero.
            base = tl.where(higher == NOTHING, 0.0, higher)
            weights = tl.exp(logits - base[None, :])
            shrink = tl.exp(greatest - base)
            greatest = higher
            total = total * shrink + tl.sum(weights, 0)
            if value_scale is not None and not PACKED:
                weights *= tl.reshape(value_factor, [ROUNDS, LANES])
            before, part = part, ()
            for chunk in tl.static_range(CHUNKS):
                wide = _widened(value[chunk], value_scale, slot, seen, chunk * COLUMNS, HEAD_DIM)
                add = tl.sum(weights[:, :, None] * tl.reshape(wide, [ROUNDS, LANES, COLUMNS]), 0)
                part = part + (before[chunk] * shrink[:, None] + add,)
            if logits_left is not None:
                tl.store(logits_left + position, tl.reshape(logits, [SLOTS]), seen)
    highest = tl.max(greatest, 0)
    weight = tl.exp(greatest - tl.where(highest == NOTHING, 0.0, highest))
    total = tl.sum(total * weight, 0)
    sums = ()
    for chunk in tl.static_range(CHUNKS):
        sums = sums + (tl.sum(part[chunk] * weight[:, None], 0),)
    one = tl.zeros([1], tl.float32)
    return tl.reshape(_side_by_side(sums), [CHUNKS * COLUMNS, 1]), one + highest, one + total


@triton.jit
def _side_by_side(chunks):
    """The chunks of a key, one, two or four, as `[chunks, columns]`."""
    COUNT: tl.constexpr = len(chunks)
    tl.static_assert(COUNT == 1 or COUNT == 2 or COUNT == 4)
    if COUNT == 1:
        whole = chunks[0][None, :]
    elif COUNT == 2:
        whole = tl.permute(tl.join(chunks[0], chunks[1]), [1, 0])
    else:
        pairs = tl.join(tl.join(chunks[0], chunks[1]), tl.join(chunks[2], chunks[3]))
        whole = tl.permute(pairs, [2, 1, 0])
    return whole


@triton.jit
def _attend_together(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    slot_of,
    filled_of,
    logits_left,
    scale,
    begin,
    end,
    positions,
    left,
    query_step,
    visible_step,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Several queries a key head: slots down and queries across, eight of them at the least."""
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    WIDTH: tl.constexpr = _width(GROUP * TOKENS, HEAD_DIM)
    QUERIES: tl.constexpr = _queries(GROUP, TOKENS)
    # What codes of eight bits stand for is in no narrow type, and weights need more range than precision.
    EXACT: tl.constexpr = query.dtype.element_ty == tl.float32
    NARROW: tl.constexpr = tl.bfloat16 if value_scale is not None else query.dtype.element_ty
    PRODUCT: tl.constexpr = tl.float32 if EXACT else NARROW
    token, member, there = _members(left, GROUP, TOKENS)
    column, offset = tl.arange(0, WIDTH), tl.arange(0, SLOTS)
    inside = column < HEAD_DIM
    asked = (token * query_step + member * HEAD_DIM)[None, :] + column[:, None]
    asking = tl.load(query + asked, there[None, :] & inside[:, None], 0)

    greatest = tl.full([QUERIES], NOTHING, tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    part = tl.zeros([WIDTH, QUERIES], tl.float32)
    for at in range(begin, end, SLOTS):
        position = at + offset
        if TOKENS == 1:
            slot, _, any_sees = _look(visible, slot_of, filled_of, position, end)
            seen = any_sees[:, None]
        else:
            slot, held = _held(slot_of, filled_of, position, end)
            looked = visible + token[None, :] * visible_step + slot[:, None]
            sees = tl.load(looked, held[:, None] & there[None, :], 0).to(tl.int32)
            seen = sees != 0
            any_sees = tl.max(sees, 1) != 0
        wanted = any_sees[:, None] & inside[None, :]
        key = _load_stored(keys, slot, column, wanted, HEAD_DIM)
        value = _load_stored(values, slot, column, wanted, HEAD_DIM)
        if key_scale is not None and not PACKED:
            key_factor = tl.load(key_scale + slot, any_sees, 0)
        if value_scale is not None and not PACKED:
            value_factor = tl.load(value_scale + slot, any_sees, 0)
        # As in `_attend_alone`.
        if at < positions:
            if PACKED:
                met = _widened(key, key_scale, slot, any_sees, 0, HEAD_DIM)
                added = _widened(value, value_scale, slot, any_sees, 0, HEAD_DIM)
            else:
                met, added = key, value
            logits = tl.dot(met.to(asking.dtype), asking, input_precision="tf32x3") * scale
            if key_scale is not None and not PACKED:
                logits *= key_factor[:, None]
            logits = tl.where(seen, logits, NOTHING)
            higher = tl.maximum(greatest, tl.max(logits, 0))
            base = tl.where(higher == NOTHING, 0.0, higher)
            weights = tl.exp(logits - base[None, :])
            shrink = tl.exp(greatest - base)
            greatest = higher
            total = total * shrink + tl.sum(weights, 0)
            if value_scale is not None and not PACKED:
                weights *= value_factor[:, None]
            narrow = weights.to(PRODUCT)
            before = part * shrink[None, :]
            part = tl.dot(tl.trans(added.to(PRODUCT)), narrow, before, input_precision="tf32x3")
            if logits_left is not None:
                line = logits_left + (token * GROUP + member)[None, :] * positions + position[:, None]
                tl.store(line, logits, there[None, :] & seen)
    return part, greatest, total


@triton.jit
def _members(left, GROUP: tl.constexpr, TOKENS: tl.constexpr):
    """The token and the member of its group that each query of a tile is, and whether there is one."""
    GROUPS: tl.constexpr = triton.next_power_of_2(GROUP)
    query = tl.arange(0, _queries(GROUP, TOKENS))
    token, member = query // GROUPS, query % GROUPS
    there = query < GROUP if TOKENS == 1 else (member < GROUP) & (token < left)
    return token, member, there


@triton.constexpr_function
def _queries(group, tokens):
    """Columns of a tile of queries: those that there are, or as few as a matrix unit takes."""
    queries = triton.next_power_of_2(group) * triton.next_power_of_2(tokens)
    return 1 if queries == 1 else max(8, queries)


@triton.constexpr_function
def _width(queries, head_dim):
    """Columns of a tile of keys."""
    return max(1 if queries == 1 else 16, triton.next_power_of_2(head_dim))


@triton.jit
def _write_output(output, part, total, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Write what the queries of a head found; the pointer is that of the head."""
    member = tl.arange(0, _queries(GROUP, 1))[None, :]
    column = tl.arange(0, _width(GROUP, HEAD_DIM))[:, None]
    # A head that sees nothing has no sum.
    found = part * (1 / tl.where(total == 0, 1.0, total))[None, :]
    place = output + member * HEAD_DIM + column
    tl.store(place, found.to(output.dtype.element_ty), (member < GROUP) & (column < HEAD_DIM))


@triton.jit
def _leave_part(
    part,
    greatest,
    total,
    parts_left,
    greatest_left,
    total_left,
    index,
    left,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Store one part for the second kernel, from the place of its first token on."""
    token, member, there = _members(left, GROUP, TOKENS)
    column = tl.arange(0, _width(GROUP * TOKENS, HEAD_DIM))
    place = (index + token) * GROUP + member
    tl.store(greatest_left + place, greatest, there)
    tl.store(total_left + place, total, there)
    inside = there[None, :] & (column < HEAD_DIM)[:, None]
    tl.store(parts_left + place[None, :] * HEAD_DIM + column[:, None], part, inside)


@triton.jit
def _write_observed(
    logits_left,
    visible,
    slot_of,
    filled_of,
    mass,
    scores,
    greatest,
    total,
    first,
    step,
    end,
    positions,
    GROUP: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Turn the logits of a head into mass and scores, `WIDE` of every `step` positions from `first`.

    The pointers are those of the row; greatest and total are of as many queries as there are, or more.
    """
    member = tl.arange(0, greatest.shape[0])[:, None]
    base = tl.where(greatest == NOTHING, 0.0, greatest)[:, None]
    share = (1 / tl.where(total == 0, 1.0, total))[:, None]
    for at in range(first, end, step):
        position = at + tl.arange(0, WIDE)
        slot, held, seen = _look(visible, slot_of, filled_of, position, end)
        there = (member < GROUP) & seen[None, :]
        logits = tl.load(logits_left + member * positions + position[None, :], there, NOTHING)
        if mass is not None:
            tl.store(mass + slot, tl.sum(tl.exp(logits - base) * share, 0), held)
        if scores is not None:
            tl.store(scores + slot, tl.sum(tl.where(there, logits, 0), 0), held)


@triton.jit
def _attend_slots(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    output,
    mass,
    scores,
    parts_left,
    greatest_left,
    total_left,
    logits_left,
    scale,
    slots,
    capacity,
    share,
    tokens,
    visible_stride,
    visible_step,
    mass_stride,
    scores_stride,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    FINISHED: tl.constexpr,
    SHARE: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    """First kernel, equal heads: a program takes one part of one head of one row, for `TOKENS` or fewer."""
    program, head, heads = tl.program_id(0) % PARTS, tl.program_id(1), tl.num_programs(1)
    token = tl.program_id(0) // PARTS * TOKENS
    row = tl.program_id(2).to(tl.int64)
    of_head = ((row * tokens + token) * heads + head) * GROUP * HEAD_DIM
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    STORED: tl.constexpr = _stored(HEAD_DIM, PACKED)
    keys += row * slots * STORED
    values += row * slots * STORED
    visible += row * visible_stride + token * visible_step
    if key_scale is not None:
        key_scale += row * slots * _scales(HEAD_DIM, PACKED)
    if value_scale is not None:
        value_scale += row * slots * _scales(HEAD_DIM, PACKED)
    if logits_left is not None:
        logits_left += (row * tokens + token) * GROUP * slots

    begin = head * capacity + program * share
    end = tl.minimum(begin + share, (head + 1) * capacity)
    ahead = tl.arange(0, SHARE)
    any_seen = tl.load(visible + begin + ahead, begin + ahead < end, 0) != 0
    if TOKENS > 1:
        for later in range(1, tl.minimum(TOKENS, tokens - token)):
            looked = visible + later * visible_step + begin + ahead
            any_seen = any_seen | (tl.load(looked, begin + ahead < end, 0) != 0)
    # Past the last slot that may be looked at there is nothing to do.
    stop = begin + tl.max(tl.where(any_seen, ahead + 1, 0), 0)
    part, greatest, total = _attend(
        query + of_head,
        keys,
        values,
        visible,
        key_scale,
        value_scale,
        None,
        None,
        logits_left,
        scale,
        begin,
        stop,
        slots,
        tokens - token,
        heads * GROUP * HEAD_DIM,
        visible_step,
        GROUP,
        TOKENS,
        HEAD_DIM,
        SLOTS,
        COLUMNS,
        LANES,
    )
    if FINISHED:
        _write_output(output + of_head, part, total, GROUP, HEAD_DIM)
        if logits_left is not None:
            # Threads read what others of them wrote.
            tl.debug_barrier()
            if mass is not None:
                mass += row * mass_stride
            if scores is not None:
                scores += row * scores_stride
            _write_observed(
                logits_left,
                visible,
                None,
                None,
                mass,
                scores,
                greatest,
                total,
                begin,
                WIDE,
                end,
                slots,
                GROUP,
                WIDE,
            )
    else:
        index = ((row * heads + head) * PARTS + program) * tokens + token
        _leave_part(
            part,
            greatest,
            total,
            parts_left,
            greatest_left,
            total_left,
            index,
            tokens - token,
            GROUP,
            TOKENS,
            HEAD_DIM,
        )


@triton.jit
def _attend_blocks(
    query,
    keys,
    values,
    visible,
    key_scale,
    value_scale,
    slot_of,
    filled_of,
    head_of,
    mass,
    scores,
    parts_left,
    greatest_left,
    total_left,
    logits_left,
    scale,
    slots,
    positions,
    tokens,
    visible_stride,
    visible_step,
    table_stride,
    mass_stride,
    mass_step,
    scores_stride,
    scores_step,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    RUN: tl.constexpr,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANES: tl.constexpr,
):
    """First kernel, unequal heads: a program takes `RUN` blocks of one row, head by head.

    What it finds for a head is a part, and stands at the last block that went into it.
    """
    row = tl.program_id(1).to(tl.int64)
    blocks = positions // TILE
    runs = tl.cdiv(blocks, RUN)
    token = tl.program_id(0) // runs * TOKENS
    left = tokens - token
    PACKED: tl.constexpr = keys.dtype.element_ty == tl.uint8
    STORED: tl.constexpr = _stored(HEAD_DIM, PACKED)
    keys += row * slots * STORED
    values += row * slots * STORED
    visible += row * visible_stride + token * visible_step
    if key_scale is not None:
        key_scale += row * slots * _scales(HEAD_DIM, PACKED)
    if value_scale is not None:
        value_scale += row * slots * _scales(HEAD_DIM, PACKED)
    if logits_left is not None:
        logits_left += (row * tokens + token) * GROUP * positions
    head_of += row * table_stride
    slot_of += row * table_stride * TILE
    filled_of += row * table_stride * TILE

    first = tl.program_id(0) % runs * RUN
    # The second kernel writes to slots that have a block; what belongs to nobody is zero.
    nobody = first * TILE + tl.arange(0, triton.next_power_of_2(RUN * TILE))
    for one in range(tl.minimum(TOKENS, left)):
        if mass is not None:
            tl.store(mass + row * mass_stride + (token + one) * mass_step + nobody, 0.0, nobody < slots)
        if scores is not None:
            tl.store(scores + row * scores_stride + (token + one) * scores_step + nobody, 0.0, nobody < slots)

    last = tl.minimum(first + RUN, blocks)
    index = first + tl.arange(0, triton.next_power_of_2(RUN))
    owner = tl.load(head_of + index, index < last, HEADS)
    block = first
    while block < last:
        head = tl.load(head_of + block)
        # Blocks stand in the order of their heads.
        until = first + tl.sum((owner <= head).to(tl.int32), 0)
        part, greatest, total = _attend(
            query + ((row * tokens + token) * HEADS + head) * GROUP * HEAD_DIM,
            keys,
            values,
            visible,
            key_scale,
            value_scale,
            slot_of,
            filled_of,
            logits_left,
            scale,
            block * TILE,
            until * TILE,
            positions,
            left,
            HEADS * GROUP * HEAD_DIM,
            visible_step,
            GROUP,
            TOKENS,
            HEAD_DIM,
            SLOTS,
            COLUMNS,
            LANES,
        )
        place = (row * blocks + until - 1) * tokens + token
        _leave_part(
            part,
            greatest,
            total,
            parts_left,
            greatest_left,
            total_left,
            place,
            left,
            GROUP,
            TOKENS,
            HEAD_DIM,
        )
        block = until


@triton.jit
def _part_at(number, first, last, RUN: tl.constexpr):
    """Where the parts of a head stand whose blocks are `first` to `last`: at ends of runs and at its own."""
    return tl.minimum((first // RUN + number + 1) * RUN, last) - 1


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
    positions,
    capacity,
    tokens,
    visible_stride,
    visible_step,
    table_stride,
    mass_stride,
    mass_step,
    scores_stride,
    scores_step,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PARTS: tl.constexpr,
    RUN: tl.constexpr,
    TABLE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Second kernel: the first program of a token and head puts their parts together, all share the slots."""
    program, token, head = tl.program_id(0) // tokens, tl.program_id(0) % tokens, tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    GROUPS: tl.constexpr = triton.next_power_of_2(GROUP)
    # Parts at a time: all of a head, or as many as make, with the width of a head, as many numbers.
    MOST: tl.constexpr = 8 // GROUPS if GROUPS < 8 else 1
    MANY: tl.constexpr = min(MOST, triton.next_power_of_2(PARTS)) if PARTS > 0 else MOST
    if head_of is None:
        first, last = 0, PARTS
        parts = PARTS
        begin, end = head * capacity, (head + 1) * capacity
        before = (row * HEADS + head) * PARTS
    else:
        blocks = positions // TILE
        first, last = 0, 0
        for at in range(0, blocks, TABLE):
            index = at + tl.arange(0, TABLE)
            owner = tl.load(head_of + row * table_stride + index, index < blocks, HEADS)
            first += tl.sum((owner < head).to(tl.int32), 0)
            last += tl.sum((owner <= head).to(tl.int32), 0)
        # Of a head without a block there is none.
        parts = tl.where(first < last, (last - 1) // RUN - first // RUN + 1, 0)
        begin, end = first * TILE, last * TILE
        before = row * blocks
        slot_of += row * table_stride * TILE
        filled_of += row * table_stride * TILE

    member, column = tl.arange(0, GROUPS), tl.arange(0, triton.next_power_of_2(HEAD_DIM))
    greatest = tl.full([GROUPS], NOTHING, tl.float32)
    total = tl.zeros([GROUPS], tl.float32)
    found = tl.zeros([GROUPS, triton.next_power_of_2(HEAD_DIM)], tl.float32)
    for at in range(0, parts, MANY):
        number = at + tl.arange(0, MANY)
        index = number if head_of is None else _part_at(number, first, last, RUN)
        place = ((before + index) * tokens + token)[None, :] * GROUP + member[:, None]
        inside = (number < parts)[None, :] & (member < GROUP)[:, None]
        tops = tl.load(greatest_left + place, inside, NOTHING)
        sums = tl.load(total_left + place, inside, 0)
        higher = tl.maximum(greatest, tl.max(tops, 1))
        base = tl.where(higher == NOTHING, 0.0, higher)
        weights = tl.exp(tops - base[:, None])
        shrink = tl.exp(greatest - base)
        greatest = higher
        total = total * shrink + tl.sum(sums * weights, 1)
        if program == 0:
            there = inside[:, :, None] & (column < HEAD_DIM)[None, None, :]
            part = tl.load(parts_left + place[:, :, None] * HEAD_DIM + column[None, None, :], there, 0)
            found = found * shrink[:, None] + tl.sum(part * weights[:, :, None], 1)

    if program == 0:
        # A head that sees nothing has no sum.
        found /= tl.where(total == 0, 1.0, total)[:, None]
        place = (((row * tokens + token) * HEADS + head) * GROUP + member)[:, None] * HEAD_DIM + column[
            None, :
        ]
        inside = (member < GROUP)[:, None] & (column < HEAD_DIM)[None, :]
        tl.store(output + place, found.to(output.dtype.element_ty), inside)

    if logits_left is not None:
        if mass is not None:
            mass += row * mass_stride + token * mass_step
        if scores is not None:
            scores += row * scores_stride + token * scores_step
        _write_observed(
            logits_left + (row * tokens + token) * GROUP * positions,
            visible + row * visible_stride + token * visible_step,
            slot_of,
            filled_of,
            mass,
            scores,
            greatest,
            total,
            begin + program * WIDE,
            tl.num_programs(0) // tokens * WIDE,
            end,
            positions,
            GROUP,
            WIDE,
        )
