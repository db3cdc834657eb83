"""Attention over slots as custom operators: Triton on CUDA, C++ on CPUs, the plain functions elsewhere.

`arkv.attention.reference` is the specification. The operators compute the same with one read of keys and
values, are opaque to `torch.compile`, never wait for the device and can be captured in a CUDA graph.

Mass and scores are written to memory that the caller gives, so that a layer's part of one tensor
`[layers, rows, slots]` can be written to where a policy reads it. For a policy that does not look nothing
is computed, stored or launched for them.

Keys and values may be of eight bits, with a scale for each slot, or of four, with scales for groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from arkv.attention import cpu, reference
from arkv.attention.blocks import Blocks, owners_of
from arkv.attention.reference import Attended
from arkv.attention.window import window_attention


@cache
def available(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the operators have kernels of their own there; for a CPU they are built at the first call.

    Args:
        device: on CUDA, if Triton is installed; on the CPU, if there is a compiler.
        dtype: of queries.
    """
    if device.type == "cpu":
        return dtype in cpu.DTYPES and cpu.load()
    return device.type == "cuda" and find_spec("triton") is not None


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    needs: frozenset[str] = frozenset(),
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    mass: Tensor | None = None,
    scores: Tensor | None = None,
    blocks: Blocks | None = None,
) -> Attended:
    """Softmax attention of one query a head over slots in any order, or of several.

    Without `blocks` as `arkv.attention.reference.slot_attention`, with them as `ragged_attention` there:
    where the plain function asks for the head of each slot, the operator asks for the slots of each head, in
    blocks, so that no program meets a slot that is not its head's. Several queries are as
    `arkv.attention.window.window_attention` says; then `visible`, mass and scores have tokens, too:
    `[rows, tokens, slots]`.

    Args:
        query: `[rows, heads, head_dim]`, or `[rows, tokens, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, a leaf of the store. Of the dtype of `query` or, with a scale,
            int8 or float8_e4m3fn; or `[rows, slots, head_dim / 2]` of two codes a byte (see
            `arkv.attention.quantization`).
        values: as `keys`.
        visible: bool `[rows, slots]`; keys and values where it is False get no weight and are not read.
        kv_heads: key heads; divides `heads` and, without `blocks`, `slots`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: float32 `[rows, slots]`, what the keys are multiplied by, or None; of two codes a byte
            bfloat16 `[rows, slots, 2 groups]`.
        value_scale: the same for the values.
        mass: where to write it, float32 `[rows, slots or more]`; None for new memory.
        scores: likewise.
        blocks: of one layer, `[1 or rows, ...]`, heads ascending; None if the key heads have as many slots
            each and lie one after the other.

    Returns:
        Output in the dtype of `query`; `mass` and `scores` are the given tensors where there are any, and
        what lies beyond `slots` in them stays as it was. Both are zero at slots without a block.
    """
    given = (query, keys, values, visible, kv_heads, key_scale, value_scale, *(blocks or (None, None, None)))
    if not needs:
        return Attended(torch.ops.arkv.slot_attention(*given), None, None)
    mass, scores = (
        (visible.new_empty(visible.shape, dtype=torch.float32) if room is None else room)
        if name in needs
        else None
        for name, room in (("mass", mass), ("scores", scores))
    )
    return Attended(torch.ops.arkv.observed_attention(*given, mass, scores), mass, scores)


def visible_slots(position: Tensor, condition: int, limit: Tensor | None) -> Tensor:
    """Where a token is held that the next one may look at, bool like `position`.

    An operator on a CPU only, where Inductor makes bools of comparisons one by one.

    Args:
        position: int32 `[layers, rows, slots]`, of the store.
        condition: position of a condition token; of a visual one it is zero or more.
        limit: bool, broadcast to `position`: what a policy lets the token look at; None for all that is held.
    """
    find = torch.ops.arkv.visible_slots if position.device.type == "cpu" else _visible_anywhere
    return find(position, condition, limit)


def _visible_anywhere(position: Tensor, condition: int, limit: Tensor | None) -> Tensor:
    """The plain expression, which every device runs."""
    held = (position >= 0) | (position == condition)
    return held if limit is None else held & limit


def _anywhere(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    slot: Tensor | None,
    filled: Tensor | None,
    head: Tensor | None,
    mass: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    """The specification, which runs on every device."""
    rooms = {"mass": mass, "scores": scores}
    needs = frozenset(name for name, room in rooms.items() if room is not None)
    leaf, scales = (query, keys, values, visible), (key_scale, value_scale)
    blocks = _blocks(slot, filled, head)
    owner = None if blocks is None else owners_of(blocks, keys.shape[1], kv_heads)
    if query.ndim == 4:
        attended = window_attention(*leaf, kv_heads, owner, needs, *scales)
    elif owner is None:
        attended = reference.slot_attention(*leaf, kv_heads, needs, *scales)
    else:
        attended = reference.ragged_attention(*leaf, owner, kv_heads, needs, *scales)
    for room, found in ((mass, attended.mass), (scores, attended.scores)):
        if room is not None and found is not None:
            room[..., : found.shape[-1]] = found
    return attended.output.contiguous()


def _on_cuda(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    slot: Tensor | None,
    filled: Tensor | None,
    head: Tensor | None,
    mass: Tensor | None = None,
    scores: Tensor | None = None,
) -> Tensor:
    from arkv.attention.triton_kernels import attend

    blocks = _blocks(slot, filled, head)
    return attend(query, keys, values, visible, blocks, kv_heads, mass, scores, key_scale, value_scale)


def _blocks(slot: Tensor | None, filled: Tensor | None, head: Tensor | None) -> Blocks | None:
    return None if slot is None or filled is None or head is None else Blocks(slot, filled, head)


def _define(name: str, schema: str, anywhere: Callable[..., Tensor], fake: Callable[..., Tensor]) -> None:
    """Without the wrapper of `torch.library.custom_op`, which costs more than attention of one picture."""
    _LIBRARY.define(name + schema, tags=torch.Tag.needs_fixed_stride_order)
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(anywhere)
    torch.library.register_fake(f"arkv::{name}", fake, lib=_LIBRARY)


def _like_query(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


def _like_position(position: Tensor, *_: object) -> Tensor:
    return position.new_empty(position.shape, dtype=torch.bool)


_LIBRARY = torch.library.Library("arkv", "FRAGMENT")

# Two operators of one code: Inductor cannot compile one that may write to mass and scores and gets neither.
_GIVEN = (
    "Tensor query, Tensor keys, Tensor values, Tensor visible, int kv_heads, Tensor? key_scale, "
    "Tensor? value_scale, Tensor? slot, Tensor? filled, Tensor? head"
)
_ROOMS = "Tensor(a!)? mass, Tensor(b!)? scores"
_define("slot_attention", f"({_GIVEN}) -> Tensor", _anywhere, _like_query)
_define("observed_attention", f"({_GIVEN}, {_ROOMS}) -> Tensor", _anywhere, _like_query)
torch.library.impl(_LIBRARY, "slot_attention", "CUDA")(_on_cuda)
torch.library.impl(_LIBRARY, "observed_attention", "CUDA")(_on_cuda)
_PLACES = "Tensor position, int condition, Tensor? limit"
_define("visible_slots", f"({_PLACES}) -> Tensor", _visible_anywhere, _like_position)
