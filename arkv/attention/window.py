"""Attention of several queries a head over the slots of a store, each query with slots of its own to see.

The specification, in plain tensor expressions, of what a window of tokens needs. With one query it computes
what `arkv.attention.reference` does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.attention.quantization import dequantize
from arkv.attention.reference import MASKED, Attended


def window_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    kv_heads: int,
    owner: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Attended:
    """Softmax attention of several queries a head over slots in any order.

    Args:
        query: `[rows, tokens, heads, head_dim]`.
        keys: `[rows, slots, head_dim]`, or codes, a leaf of the store.
        values: as `keys`.
        visible: bool `[rows, tokens, slots]`; slots where it is False get no weight.
        kv_heads: key heads; divides `heads`.
        owner: int64 `[1 or rows, slots]`, the key head that each slot belongs to, `kv_heads` for one of
            nobody's; None where the key heads have as many slots each, one head after the other.
        needs: "mass" and "scores", as far as they are wanted.
        key_scale: what makes numbers of codes (see `arkv.attention.quantization`); None for others.
        value_scale: likewise for values.

    Returns:
        The output `[rows, tokens, heads, head_dim]` in the dtype of the query, and mass and scores, float32
        `[rows, tokens, slots]`, as `arkv.attention.reference.Attended` says of one query.
    """
    rows, tokens, heads, _ = query.shape
    keys, values = (
        dequantize(x, scale, query.dtype) for x, scale in ((keys, key_scale), (values, value_scale))
    )
    # What nobody sees is left out, not multiplied by zero: that would make NaN of a NaN.
    values = values.masked_fill(~visible.any(1)[..., None], 0)
    query = query.unflatten(2, (kv_heads, -1)).transpose(1, 2) * query.shape[-1] ** -0.5
    if owner is None:
        # Each head with its own part of the pool.
        keys, values = keys.unflatten(1, (kv_heads, -1)), values.unflatten(1, (kv_heads, -1))
        hidden = ~visible.unflatten(-1, (kv_heads, -1)).transpose(1, 2)[:, :, :, None]
    else:
        # Each head with the whole pool, in which it sees its own slots.
        keys, values = keys[:, None], values[:, None]
        own = owner[:, None, :] == torch.arange(kv_heads, device=owner.device)[:, None]
        hidden = ~(visible[:, None] & own[:, :, None])[:, :, :, None]
    scores = (query.flatten(2, 3) @ keys.transpose(-1, -2)).float().unflatten(2, (tokens, -1))
    # A head that sees nothing would spread its weight evenly.
    weights = scores.masked_fill(hidden, MASKED).softmax(-1).masked_fill(hidden, 0)
    output = (weights.to(values.dtype).flatten(2, 3) @ values).unflatten(2, (tokens, -1))
    output = output.transpose(1, 2).reshape(rows, tokens, heads, -1)

    def by_slot(x: Tensor) -> Tensor:
        """`[rows, kv_heads, tokens, group, n]` to `[rows, tokens, slots]`."""
        x = x.sum(3).transpose(1, 2)
        return x.flatten(2) if owner is None else x.sum(2)

    mass = by_slot(weights) if "mass" in needs else None
    raw = by_slot(scores.masked_fill(hidden, 0)) if "scores" in needs else None
    return Attended(output, mass, raw)
