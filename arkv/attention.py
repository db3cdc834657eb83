"""Attention: causal over a whole sequence, and one query over the slots of a store.

Both are plain tensor expressions that Inductor fuses. Products run in the dtype of the inputs, scores
and softmax in float32. Rows with nothing to look at give zeros or uniform averages, never NaN.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.quantization import dequantize, gather_slots

# Large enough to vanish in a softmax, finite so that a fully masked row stays a number.
MASKED = -1e30

# Queries are taken in this many blocks, each against the keys it can see: a third less work than one
# full square, and smaller intermediate tensors.
QUERY_BLOCKS = 4


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of every token over itself and the tokens before it.

    Args:
        query: `[rows, tokens, heads, head_dim]`.
        key: `[rows, tokens, kv_heads, head_dim]`; `kv_heads` divides `heads`.
        value: as `key`.
        mask: bool `[rows, tokens]`, False for keys nobody may look at, or None.

    Returns:
        `[rows, tokens, heads, head_dim]` in the dtype of `value`. What stands at a masked token, or at
        one that sees nothing but masked tokens, is finite and without meaning.
    """
    groups = query.shape[2] // key.shape[2]
    query = query.transpose(1, 2) * query.shape[-1] ** -0.5
    key, value = (x.transpose(1, 2).repeat_interleave(groups, dim=1) for x in (key, value))
    tokens = query.shape[2]
    edges = [tokens * i // QUERY_BLOCKS for i in range(QUERY_BLOCKS + 1)]
    parts = []
    for start, stop in pairwise(edges):
        scores = query[:, :, start:stop] @ key[:, :, :stop].transpose(-1, -2)
        visible = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).tril(start)
        if mask is not None:
            visible = visible & mask[:, None, None, :stop]
        weights = scores.float().masked_fill(~visible, MASKED).softmax(-1).to(value.dtype)
        parts.append(weights @ value[:, :, :stop])
    return torch.cat(parts, dim=2).transpose(1, 2)


class Attended(NamedTuple):
    """What one query a head found in its slots.

    Attributes:
        output: `[rows, heads, head_dim]`, in the dtype of the query.
        mass: float32 `[rows, slots]`: the softmax weight of each slot, summed over the query heads that
            share its key head; zero exactly where nothing may be looked at. None if not asked for.
        scores: float32 `[rows, slots]`: the scaled dot products before the softmax, summed likewise, zero
            where nothing may be looked at. None if not asked for.
    """

    output: Tensor
    mass: Tensor | None
    scores: Tensor | None


def slot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    needs: frozenset[str] = frozenset(),
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    reach: int | None = None,
) -> Attended:
    """Softmax attention of one query a head over slots in any order, as many for each head.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, a leaf of the store: the key heads one after the other.
        values: as `keys`.
        visible: bool `[rows, slots]`; slots where it is False get no weight.
        kv_heads: key heads; divides `heads` and `slots`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: float32 `[rows, slots]`, by which keys of eight bits are multiplied; None for others.
        value_scale: likewise for values.
        reach: the first slots of each head that are read; the others must be hidden. None for all.
    """
    query = query.unflatten(1, (kv_heads, -1)) * query.shape[-1] ** -0.5
    keys, values = (
        dequantize(x, scale, query.dtype).unflatten(1, (kv_heads, -1))[:, :, :reach]
        for x, scale in ((keys, key_scale), (values, value_scale))
    )
    hidden = ~visible.unflatten(1, (kv_heads, 1, -1))
    unread = 0 if reach is None else hidden.shape[-1] - reach
    hidden = hidden[..., :reach]
    scores = scores_of(query, keys)
    # A head that sees nothing would spread its weight evenly.
    weights = scores.masked_fill(hidden, MASKED).softmax(-1).masked_fill(hidden, 0)
    output = weighted_sum(weights, values).flatten(1, 2)

    def by_slot(x: Tensor) -> Tensor:
        return pad(x.sum(2), (0, unread)).flatten(1)

    mass = by_slot(weights) if "mass" in needs else None
    raw = by_slot(scores.masked_fill(hidden, 0)) if "scores" in needs else None
    return Attended(output, mass, raw)


def scores_of(query: Tensor, keys: Tensor) -> Tensor:
    """Dot products of queries with keys.

    Args:
        query: `[rows, kv_heads, group, head_dim]`.
        keys: `[rows, kv_heads, slots, head_dim]`.

    Returns:
        float32 `[rows, kv_heads, group, slots]`.
    """
    if _fused(query):
        return (query.float() * keys.float()).sum(-1)[:, :, None]
    return (query @ keys.transpose(-1, -2)).float()


def weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """Sums of values.

    Args:
        weights: float32 `[rows, kv_heads, group, slots]`.
        values: `[rows, kv_heads, slots, head_dim]`.

    Returns:
        `[rows, kv_heads, group, head_dim]` in the dtype of the values.
    """
    if _fused(weights):
        return (weights[:, :, 0, :, None] * values.float()).sum(-2, keepdim=True).to(values.dtype)
    return weights.to(values.dtype) @ values


def _fused(x: Tensor) -> bool:
    # A product of one query with its keys is a sum and no matrix product: written as one, Inductor reads a
    # leaf where it lies, widens it in registers, and is faster than a call of the library.
    # With several queries a key head, it would read the leaf once for each.
    return torch.compiler.is_compiling() and x.shape[2] == 1


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
) -> Attended:
    """Softmax attention of one query a head over slots in any order, heads of any size.

    Every block of slots belongs to one head. Each is attended to by itself and the parts of a head are put
    together by their greatest scores and their sums, so a slot is read once and no head waits for another.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, a leaf of the store.
        values: as `keys`.
        visible: bool `[rows, slots]`; slots where it is False get no weight.
        slot: int64 `[1 or rows, blocks * size]`, the slots of the blocks (see `arkv.store.Blocks`).
        filled: bool, as `slot`: where a block has a slot.
        head: int64 `[1 or rows, blocks]`, the key head of each block.
        kv_heads: key heads; divides `heads`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: float32 `[rows, slots]`, by which keys of eight bits are multiplied; None for others.
        value_scale: likewise for values.
    """
    rows, blocks = len(query), head.shape[-1]
    slot, filled, head = (x.expand(rows, -1) for x in (slot, filled, head))
    query = query.unflatten(1, (kv_heads, -1)) * query.shape[-1] ** -0.5
    by_block = query.gather(1, head[..., None, None].expand(-1, -1, *query.shape[2:]))
    keys, values = (
        dequantize(
            gather_slots(x, slot), None if scale is None else scale.gather(1, slot), query.dtype
        ).unflatten(1, (blocks, -1))
        for x, scale in ((keys, key_scale), (values, value_scale))
    )
    seen = (visible.gather(1, slot) & filled).unflatten(1, (blocks, 1, -1))
    scores = (by_block @ keys.transpose(-1, -2)).float()
    masked = scores.masked_fill(~seen, MASKED)
    greatest = masked.amax(-1)
    weights = (masked - greatest[..., None]).exp().masked_fill(~seen, 0)

    # One-hot products instead of scattered sums: the same result whenever it is computed.
    member = head[:, None] == torch.arange(kv_heads, device=head.device)[:, None]
    top = torch.where(member[..., None], greatest[:, None], MASKED).amax(2)
    share = (greatest - top.gather(1, head[..., None].expand_as(greatest))).exp()
    # A head that sees nothing has no sum.
    sums = (member.float() @ (weights.sum(-1) * share)).clamp(min=torch.finfo(torch.float32).tiny)
    parts = (weights.to(values.dtype) @ values).float() * share[..., None]
    output = (member.float() @ parts.flatten(2)).unflatten(2, parts.shape[2:]) / sums[..., None]

    def by_slot(x: Tensor) -> Tensor:
        return torch.zeros(visible.shape, device=x.device).scatter_add(1, slot, x.flatten(1))

    scale = share / sums.gather(1, head[..., None].expand_as(share))
    mass = by_slot((weights * scale[..., None]).sum(2)) if "mass" in needs else None
    raw = by_slot(scores.masked_fill(~seen, 0).sum(2)) if "scores" in needs else None
    return Attended(output.flatten(1, 2).to(values.dtype), mass, raw)
