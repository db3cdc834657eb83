"""The parts of a pass of several tokens, in their order, and how a policy is shown its tokens.

Each is compiled once, the one of a block for all layers. Whatever changes from pass to pass is a tensor at a
fixed address.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention import operators
from arkv.attention.blocks import Blocks
from arkv.attention.window import window_attention
from arkv.decoding.buffers import Buffers
from arkv.decoding.drafts import accept_
from arkv.decoding.layers import Layer
from arkv.decoding.sampling import Sampling, draw, guide
from arkv.grid import Grid
from arkv.model import Block, Model
from arkv.policy import CachePolicy, Observation
from arkv.store import Store, write_

HIDDEN = torch.iinfo(torch.int32).max
"""A place that no token has: what is seen from there on is not seen."""


def enter_(
    model: Model,
    store: Store,
    buffers: Buffers,
    room: Tensor,
    at: Tensor,
    ahead: Tensor,
    stop: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """Embed a window of every row; one that would reach past the end repeats its last token.

    Args:
        model: embeds the tokens.
        store: of the batch.
        buffers: of the batch.
        room: int64 `[layers, rows, kv_heads, reach]`, slots of tokens by their place, which starts anew every
            `reach`.
        at: int64 `[pictures]`, the first place of each window.
        ahead: int64 `[K]`, 0, 1, ... K - 1.
        stop: int64 `[pictures]`, the place after the last that may be fed.

    Returns:
        Hidden `[rows, K, width]`, rotations `[rows, K, head_dim]`, places and places within `reach`, int64
        `[rows, K]`, and, by layer, where to write, int64 `[rows, K, kv_heads]`.
    """
    places = torch.minimum(at[:, None] + ahead, stop[:, None] - 1)
    tokens = buffers.tokens.gather(1, places)
    if store.guided:
        places, tokens = places.repeat(2, 1), tokens.repeat(2, 1)
    # An adapter is written for one place at a time.
    embed = torch.vmap(lambda token, place: model.embed(token[None], place)[0, 0])
    hidden = embed(tokens.flatten(), places.flatten()).unflatten(0, places.shape)
    turned = buffers.rotation.expand(store.rows, -1, -1)
    index = (places + store.condition)[..., None].expand(-1, -1, turned.shape[-1])
    offsets = places % room.shape[-1]
    taken = offsets[None, :, None].expand(store.layers, -1, store.kv_heads, -1)
    slots = room.gather(-1, taken).transpose(2, 3)
    return hidden, turned.gather(1, index), places, offsets, slots.unbind()


def pass_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    layer: Layer,
    slots: Tensor,
    seen_from: Tensor,
    places: Tensor,
    offsets: Tensor,
    kv_heads: int,
    shown: dict[str, Tensor],
    with_kernels: bool,
) -> Tensor:
    """One block for a window: write keys and values, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, K, width]`.
        rotation: float32 `[rows, K, head_dim]`.
        layer: where keys and values lie.
        slots: int64 `[rows, K, kv_heads]`, where the window's keys and values go.
        seen_from: int32 `[rows, slots]`, the first place that sees each slot.
        places: int64 `[rows, K]`, of the window's tokens.
        offsets: int64 `[rows, K]`, their places since the last eviction.
        kv_heads: key heads.
        shown: by what the policy needs, where to keep it until the end of the line, `[period, rows, ...]`.
        with_kernels: whether attention is `arkv.attention.operators`'.

    Returns:
        The next hidden state.
    """
    query, key, value = block.project(hidden, rotation)
    keys, values, key_scale, value_scale, layout, _ = layer
    write_(keys, slots.flatten(1), key.flatten(1, 2)[:, None], key_scale)
    write_(values, slots.flatten(1), value.flatten(1, 2)[:, None], value_scale)
    visible = seen_from[:, None, : keys.shape[1]] <= places[..., None]
    needs = frozenset(shown)
    leaf, scales = (query, keys, values, visible), (key_scale, value_scale)
    if with_kernels:
        blocks = cast("Blocks | None", layout)
        attended = operators.slot_attention(*leaf, kv_heads, needs, *scales, blocks=blocks)
    else:
        attended = window_attention(*leaf, kv_heads, cast("Tensor | None", layout), needs, *scales)
    seen = {"mass": attended.mass, "scores": attended.scores, "queries": query}
    rows = torch.arange(len(places), device=places.device)[:, None]
    for name, kept in shown.items():
        new = cast(Tensor, seen[name])
        if name != "queries":
            new = pad(new, (0, kept.shape[-1] - new.shape[-1]))
        kept.index_put_((offsets, rows), new)
    return block.merge(hidden, attended.output)


def finish_(
    model: Model,
    buffers: Buffers,
    at: Tensor,
    hidden: Tensor,
    places: Tensor,
    stop: Tensor,
    grid: Grid,
    sampling: Sampling,
    guided: bool,
) -> None:
    """Draw a token after each of the window's, and accept those that were drawn after right ones.

    Args:
        model: gives the logits.
        buffers: its tokens are written in place, and `first_bad` may be.
        at: int64 `[pictures]`, moved on in place.
        hidden: `[rows, K, width]`, output of the last block.
        places: int64 `[rows, K]`.
        stop: int64 `[pictures]`, the last place that may be drawn.
        grid: of the pictures.
        sampling: how.
        guided: whether the second half of the rows are the unconditional ones.
    """
    pictures = len(at)
    head = torch.vmap(lambda state, place: model.head(state[None, None], place)[0])
    logits = head(hidden.flatten(0, 1), places.flatten() + 1).unflatten(0, places.shape)
    logits = guide(logits, buffers.scale) if guided else logits[:pictures]
    keys = buffers.keys[:, None].expand(-1, places.shape[1], -1)
    places = places[:pictures]
    drawn = draw(logits, keys, places + 1, sampling, buffers.temperature)
    accepted = accept_(buffers.tokens, at, places, drawn, stop, grid)
    # Of a wrong draft nobody cares what it leads to.
    bad = accepted & ~logits.amax(-1).isfinite()
    first = torch.where(bad, places + 1, HIDDEN).amin()
    first_bad = buffers.first_bad
    first_bad.copy_(torch.where((first_bad >= 0) | (first == HIDDEN), first_bad, first))


def replay_(
    policy: CachePolicy, store: Store, slots: Tensor, offset: Tensor, shown: dict[str, Tensor], step: Tensor
) -> None:
    """Claim a token's slots, and show the policy its attention.

    Args:
        policy: looks.
        store: positions and statistics are written in place.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        offset: int64 0-d, which of them are the token's.
        shown: what the policy needs, of all tokens since the last eviction, `[layers, period, rows, ...]`.
        step: int64 0-d, position of the token.
    """
    store.claim_(slots.index_select(-1, offset[None])[..., 0], step)
    seen = {name: kept.index_select(1, offset[None])[:, 0] for name, kept in shown.items()}
    policy.observe(store, Observation(**seen), step)
