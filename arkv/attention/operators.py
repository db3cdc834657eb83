"""Attention over slots as custom operators: Triton on CUDA, the plain functions everywhere else.

`arkv.attention.reference` is the specification. The operators compute the same with one read of keys and
values, are opaque to `torch.compile`, never wait for the device and can be captured in a CUDA graph.

Mass and scores are written to memory that the caller gives, so that a layer's part of one tensor
`[layers, rows, slots]` can be written to where a policy reads it. For a policy that does not look nothing
is computed, stored or launched for them.

Keys and values may be of eight bits, with a scale for each slot.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from arkv.attention import reference
from arkv.attention.blocks import Blocks, owners_of
from arkv.attention.reference import Attended


@cache
def available(device: torch.device) -> bool:
    """Whether the operators have kernels of their own there: on CUDA, if Triton is installed."""
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
) -> Attended:
    """`arkv.attention.reference.slot_attention` by the operator `arkv::slot_attention`.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, a leaf of the store: the key heads one after the other. Of the
            dtype of `query` or, with a scale, int8 or float8_e4m3fn.
        values: as `keys`.
        visible: bool `[rows, slots]`; keys and values where it is False get no weight and are not read.
        kv_heads: key heads; divides `heads` and `slots`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: float32 `[rows, slots]`, what the keys are multiplied by, or None.
        value_scale: the same for the values.
        mass: where to write it, float32 `[rows, slots or more]`; None for new memory.
        scores: likewise.

    Returns:
        As `arkv.attention.reference.slot_attention`, in the dtype of `query`; `mass` and `scores` are the
        given tensors where there are any, and what lies beyond `slots` in them stays as it was.
    """
    mass, scores = _room(visible, needs, mass, scores)
    output = torch.ops.arkv.slot_attention(
        query, keys, values, visible, kv_heads, mass, scores, key_scale, value_scale
    )
    return Attended(output, mass, scores)


def block_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    slot: Tensor,
    filled: Tensor,
    head: Tensor,
    kv_heads: int,
    needs: frozenset[str] = frozenset(),
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    mass: Tensor | None = None,
    scores: Tensor | None = None,
) -> Attended:
    """`arkv.attention.reference.ragged_attention` by the operator `arkv::block_attention`.

    Where the plain function asks for the head of each slot, the operator asks for the slots of each head, in
    blocks: then no program meets a slot that is not its head's.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, a leaf of the store. Of the dtype of `query` or, with a scale,
            int8 or float8_e4m3fn.
        values: as `keys`.
        visible: bool `[rows, slots]`; keys and values where it is False get no weight and are not read.
        slot: int64 `[1 or rows, blocks * BLOCK]`, those of the blocks (see `arkv.attention.blocks`).
        filled: bool, as `slot`: where a block has a slot.
        head: int64 `[1 or rows, blocks]`, the key head of each block, ascending as in the store.
        kv_heads: key heads; divides `heads`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: float32 `[rows, slots]`, what the keys are multiplied by, or None.
        value_scale: the same for the values.
        mass: where to write it, float32 `[rows, slots or more]`; None for new memory.
        scores: likewise.

    Returns:
        As `slot_attention`; `mass` and `scores` are zero at slots without a block.
    """
    mass, scores = _room(visible, needs, mass, scores)
    output = torch.ops.arkv.block_attention(
        query, keys, values, visible, slot, filled, head, kv_heads, mass, scores, key_scale, value_scale
    )
    return Attended(output, mass, scores)


def _room(
    visible: Tensor, needs: frozenset[str], mass: Tensor | None, scores: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for what is needed: the given or new; None for what is not."""

    def room(name: str, given: Tensor | None) -> Tensor | None:
        if name not in needs:
            return None
        return visible.new_empty(visible.shape, dtype=torch.float32) if given is None else given

    return room("mass", mass), room("scores", scores)


@torch.library.custom_op("arkv::slot_attention", mutates_args=("mass", "scores"))
def _slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    mass: Tensor | None,
    scores: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    needs = _needs(mass, scores)
    attended = reference.slot_attention(query, keys, values, visible, kv_heads, needs, key_scale, value_scale)
    return _written(attended, mass, scores)


@torch.library.custom_op("arkv::block_attention", mutates_args=("mass", "scores"))
def _block_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    slot: Tensor,
    filled: Tensor,
    head: Tensor,
    kv_heads: int,
    mass: Tensor | None,
    scores: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    needs = _needs(mass, scores)
    owner = owners_of(Blocks(slot, filled, head), keys.shape[1], kv_heads)
    attended = reference.ragged_attention(
        query, keys, values, visible, owner, kv_heads, needs, key_scale, value_scale
    )
    return _written(attended, mass, scores)


@_slot_attention.register_kernel("cuda")
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    mass: Tensor | None,
    scores: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    from arkv.attention.triton_kernels import attend

    processors = _processors(query.device)
    return attend(
        query, keys, values, visible, None, kv_heads, mass, scores, key_scale, value_scale, processors
    )


@_block_attention.register_kernel("cuda")
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    slot: Tensor,
    filled: Tensor,
    head: Tensor,
    kv_heads: int,
    mass: Tensor | None,
    scores: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
) -> Tensor:
    from arkv.attention.triton_kernels import attend

    blocks, processors = Blocks(slot, filled, head), _processors(query.device)
    return attend(
        query, keys, values, visible, blocks, kv_heads, mass, scores, key_scale, value_scale, processors
    )


@_slot_attention.register_fake
@_block_attention.register_fake
def _(query: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _needs(mass: Tensor | None, scores: Tensor | None) -> frozenset[str]:
    return frozenset(name for name, x in (("mass", mass), ("scores", scores)) if x is not None)


def _written(attended: Attended, *given: Tensor | None) -> Tensor:
    """The output; mass and scores go where there is room for them."""
    for room, found in zip(given, attended[1:], strict=True):
        if room is not None and found is not None:
            room[:, : found.shape[1]] = found
    return attended.output.contiguous()
