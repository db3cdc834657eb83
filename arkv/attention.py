"""Attention: causal over a whole sequence, and one query over the slots of a store.

Both are plain tensor expressions that Inductor fuses. Products run in the dtype of the inputs, scores
and softmax in float32. Rows with nothing to look at give zeros or uniform averages, never NaN.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

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


def slot_attention(
    query: Tensor, keys: Tensor, values: Tensor, resident: Tensor, needs_mass: bool
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of one query a head over the slots that hold a token, in any order.

    Args:
        query: `[rows, heads, head_dim]`.
        keys: `[rows, kv_heads * capacity, head_dim]`, a leaf of the store.
        values: as `keys`.
        resident: bool `[rows, kv_heads, capacity]`; False slots get no weight.
        needs_mass: whether to return what each slot received.

    Returns:
        The attended values `[rows, heads, head_dim]`, in the dtype of `values`, and the attention mass
        float32 `[rows, kv_heads, capacity]`, summed over the query heads that share a key head; None if
        not needed.
    """
    rows, kv_heads, capacity = resident.shape
    query = query.unflatten(1, (kv_heads, -1)) * query.shape[-1] ** -0.5
    keys, values = (x.view(rows, kv_heads, capacity, -1) for x in (keys, values))
    scores = (query @ keys.transpose(-1, -2)).float()
    weights = scores.masked_fill(~resident[:, :, None], MASKED).softmax(-1)
    attended = (weights.to(values.dtype) @ values).flatten(1, 2)
    return attended, weights.sum(2) if needs_mass else None
