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

from arkv.attention.quantization import dequantize

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
    if mask is not None:
        value = value.masked_fill(~mask[:, :, None, None], 0)  # a weight of zero would not hide a NaN
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
        keys: `[rows, slots, head_dim]`, or codes, a leaf of the store: the key heads one after the other.
        values: as `keys`.
        visible: bool `[rows, slots]`; slots where it is False get no weight.
        kv_heads: key heads; divides `heads` and `slots`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: what makes numbers of codes (see `arkv.attention.quantization`); None for others.
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
    # What is hidden is left out, not multiplied by zero: that would make NaN of a NaN.
    values = values.masked_fill(hidden[:, :, 0, :, None], 0)
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


def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    owner: Tensor,
    kv_heads: int,
    needs: frozenset[str] = frozenset(),
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Attended:
    """Softmax attention of one query a head over slots in any order, each the slot of any head.

    Keys and values are read once, where they lie: a slot meets the queries of its own head only, and a sum
    over values has weights of zero for the slots of other heads.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, or codes, a leaf of the store.
        values: as `keys`.
        visible: bool `[rows, slots]`; slots where it is False get no weight.
        owner: int64 `[1 or rows, slots]`, the key head that each slot belongs to; `kv_heads` for one of
            nobody's, which gets no weight.
        kv_heads: key heads; divides `heads`.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: what makes numbers of codes (see `arkv.attention.quantization`); None for others.
        value_scale: likewise for values.
    """
    query = query.unflatten(1, (kv_heads, -1)) * query.shape[-1] ** -0.5
    keys, values = (
        dequantize(x, scale, query.dtype) for x, scale in ((keys, key_scale), (values, value_scale))
    )
    hidden = ~(visible & (owner < kv_heads))[:, None]
    member = owner[:, None, None] == torch.arange(kv_heads, device=owner.device)[:, None, None]
    # Of any head that there is, where a slot is nobody's: it is hidden.
    owner = owner.clamp(max=kv_heads - 1).expand(len(query), -1)

    def of_owner(x: Tensor) -> Tensor:
        """`[rows, kv_heads, group]` to `[rows, group, slots]`."""
        return x.gather(1, owner[..., None].expand(-1, -1, x.shape[-1])).transpose(1, 2)

    scores = scores_of_owner(query, keys, owner)
    masked = scores.masked_fill(hidden, MASKED)
    greatest = torch.where(member, masked[:, None], MASKED).amax(-1)
    weights = (masked - of_owner(greatest)).exp().masked_fill(hidden, 0)
    by_head = torch.where(member, weights[:, None], 0)
    # A head that sees nothing has no sum.
    sums = by_head.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
    values = values.masked_fill(hidden.transpose(1, 2), 0)  # as in `slot_attention`
    output = (by_head.flatten(1, 2).to(values.dtype) @ values).float() / sums.flatten(1)[..., None]
    mass = (weights / of_owner(sums)).sum(1) if "mass" in needs else None
    raw = scores.masked_fill(hidden, 0).sum(1) if "scores" in needs else None
    return Attended(output.to(values.dtype), mass, raw)


def scores_of_owner(query: Tensor, keys: Tensor, owner: Tensor) -> Tensor:
    """Dot products of each slot's key with the queries of its head.

    Args:
        query: `[rows, kv_heads, group, head_dim]`.
        keys: `[rows, slots, head_dim]`.
        owner: int64 `[rows, slots]`, key heads.

    Returns:
        float32 `[rows, group, slots]`.
    """
    if _fused(query):
        own = query[:, :, 0].gather(1, owner[..., None].expand(-1, -1, query.shape[-1]))
        return (own.float() * keys.float()).sum(-1)[:, None]
    every = (query.flatten(1, 2) @ keys.transpose(-1, -2)).float().unflatten(1, query.shape[1:3])
    return every.gather(1, owner[:, None, None].expand(-1, 1, every.shape[2], -1))[:, 0]
