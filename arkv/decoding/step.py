"""One step: a visual token of every row goes through all layers, over a static store.

    every P tokens:   slots = policy.select(store, step);  policy.evict(store, slots)
    every token:      claim a slot in every head
                      each layer: write key and value, attend over the slots
                      policy.observe(store, seen, step)
                      logits of the next token
                      draw it

`Step.__call__` does this from top to bottom, up to the logits; the functions below it are its parts, in the
same order, and last the draw. Each
of them is compiled once, the one of a block for all layers. Whatever changes from one token to the next is a
tensor at a fixed address, and nothing comes back to Python, so that steps can be captured.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention import operators
from arkv.attention.reference import ragged_attention, slot_attention
from arkv.decoding.buffers import Buffers
from arkv.decoding.checks import note_
from arkv.decoding.compiling import Compile, compiled
from arkv.decoding.layers import Layer, has_kernels, layers_of, reaches
from arkv.decoding.sampling import Sampling, draw, guide
from arkv.machine.threads import Threads
from arkv.model import Block, Model
from arkv.policy import CachePolicy, Observation
from arkv.store import CONDITION, Store, write_


class Step:
    """What is done for one token of every row.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        store: where keys and values lie.
        buffers: of the same batch.
        compile: "none" calls the parts as they are, all others call them compiled.
        threads: how many a step takes.

    Attributes:
        head: logits of a token, from the hidden state of the one before and the position.
        draw_: the function below, compiled.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        store: Store,
        buffers: Buffers,
        compile: Compile,
        threads: Threads,
    ) -> None:
        self._model, self._policy, self._store, self._buffers = model, policy, store, buffers
        self._threads = threads
        self._blocks = list(model.blocks)
        # Where there are kernels, they write what a policy is shown to where it reads it.
        self._with_kernels = has_kernels(model, store)
        self._rooms = {
            name: torch.zeros(
                store.layers, store.rows, store.slots, dtype=torch.float32, device=store.position.device
            )
            for name in sorted(policy.needs & {"mass", "scores"})
            if self._with_kernels
        }
        self._layers = layers_of(store, self._rooms, self._with_kernels)
        # A length is no tensor and cannot change within a graph; kernels pass over empty slots by themselves.
        # The CPU's products of narrow numbers copy what is not contiguous, which costs more than it saves.
        copies = compile == "none" and store.keys[0].dtype != torch.float32
        self._reaches: list[Tensor | None] = [None] * store.grid.rows
        if policy.in_order and store.equal and not (self._with_kernels or copies or compile == "cudagraphs"):
            self._reaches = reaches(store)
        self._recycle = compiled(recycle_, compile)
        self._enter = compiled(enter_, compile)
        self._step_block = compiled(step_block, compile)
        self._observe = compiled(observe_, compile)
        self.head = compiled(model.head, compile)
        self.draw_ = compiled(draw_, compile)

    def __call__(self, tokens: Tensor, position: int) -> Tensor:
        """One token: feed it to the model, and the cache.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: what `buffers.step` holds, as a number: it decides which operations a step is made of,
                whether there is an eviction and how far is read, and goes into none of them.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """
        with self._threads.fitted():
            return self._logits(tokens, position)

    def _logits(self, tokens: Tensor, position: int) -> Tensor:
        model, policy, store, buffers = self._model, self._policy, self._store, self._buffers
        step, offset = buffers.step, position % store.plan.period
        if offset == 0:
            buffers.slots.copy_(self._recycle(policy, store, step))
        hidden, rotation, slots, visible = self._enter(
            model, policy, store, tokens, buffers.slots, buffers.places[offset], buffers.rotation, step
        )
        reach = self._reaches[store.grid.row(position)]
        seen = []
        for number, (block, layer) in enumerate(zip(self._blocks, self._layers, strict=True)):
            hidden, shown = self._step_block(
                block,
                hidden,
                rotation,
                layer,
                slots[number],
                visible[number],
                store.kv_heads,
                policy.needs,
                reach,
                self._with_kernels,
            )
            seen.append(shown)
        if policy.needs:
            self._observe(policy, store, seen, self._rooms, step)
        return self.head(hidden, step + 1)


def recycle_(policy: CachePolicy, store: Store, step: Tensor) -> Tensor:
    """Let the policy select and evict; the slots int64 `[layers, rows, kv_heads, period]` to write next."""
    slots = policy.select(store, step)
    policy.evict(store, slots)
    store.assign_(slots)
    return slots


def enter_(
    model: Model,
    policy: CachePolicy,
    store: Store,
    tokens: Tensor,
    slots: Tensor,
    offset: Tensor,
    rotation: Tensor,
    step: Tensor,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Give a new token its slots, its embedding and its rotation.

    Args:
        model: embeds the token.
        policy: says what the token may look at.
        store: positions and statistics are written in place.
        tokens: int64 `[rows]`.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        offset: int64 0-d, which of them is next.
        rotation: float32 `[rows or 1, condition + N, head_dim]`, of all tokens.
        step: int64 0-d, position of the token.

    Returns:
        Hidden `[rows, 1, width]`, the token's rotation `[rows or 1, 1, head_dim]` and, by layer, where to
        write, int64 `[rows, kv_heads]`, and what to look at, bool `[rows, pool]`.
    """
    chosen = slots.index_select(-1, offset[None])[..., 0]
    claimed = store.claim_(chosen, step)
    visible = operators.visible_slots(store.position, CONDITION, policy.visible(store, step))
    return (
        model.embed(tokens, step),
        rotation.index_select(1, (store.condition + step)[None]),
        claimed,
        [v[:, :n] for v, n in zip(visible, store.pools, strict=True)],
    )


def step_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    layer: Layer,
    slots: Tensor,
    visible: Tensor,
    kv_heads: int,
    needs: frozenset[str],
    reach: Tensor | None,
    with_kernels: bool,
) -> tuple[Tensor, Observation]:
    """One block for one token: write its key and value, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, 1, width]`.
        rotation: float32 `[rows or 1, 1, head_dim]`.
        layer: where keys and values lie.
        slots: int64 `[rows, kv_heads]`, where the token's key and value go, from `Store.claim_`.
        visible: bool `[rows, pool]`, the new token's slots included.
        kv_heads: key heads.
        needs: what the policy wants to see.
        reach: `[n, 0]` where only the first `n` slots of a head can hold anything; None to read all. A
            length and not a number, so that one graph serves every `n`.
        with_kernels: whether attention is `arkv.attention.operators`'.

    Returns:
        The next hidden state, and what the policy needs of this layer, as far as it has no room for it.
    """
    query, key, value = block.project(hidden, rotation)
    keys, values, key_scale, value_scale, layout, rooms = layer
    write_(keys, slots, key, key_scale)
    write_(values, slots, value, value_scale)
    leaf = (query[:, 0], keys, values, visible)
    scales = (key_scale, value_scale)
    if isinstance(layout, Tensor):
        attended = ragged_attention(*leaf, layout, kv_heads, needs, *scales)
    elif with_kernels:
        attended = operators.slot_attention(*leaf, kv_heads, needs, *scales, **rooms, blocks=layout)
    else:
        extent = None if reach is None else reach.shape[0]
        attended = slot_attention(*leaf, kv_heads, needs, *scales, extent)
    hidden = block.merge(hidden, attended.output[:, None])
    seen = Observation(cast(Tensor, attended.mass), cast(Tensor, attended.scores), query[:, 0])
    # Name by name: Dynamo of torch 2.11 cannot take the keys of a dictionary from a set.
    shown = Observation(**{name: getattr(seen, name) for name in sorted(needs) if name not in rooms})
    return hidden, shown


def observe_(
    policy: CachePolicy, store: Store, seen: list[Observation], rooms: dict[str, Tensor], step: Tensor
) -> None:
    """Show the policy what all layers saw; pools smaller than the widest are filled up with zeros.

    Args:
        policy: looks.
        store: gets its statistics.
        seen: by layer, what there is no room for.
        rooms: the rest, of all layers together, `[layers, rows, slots]`.
        step: int64 0-d, position of the token.
    """

    def joined(name: str) -> Tensor:
        if name in rooms:
            return rooms[name]
        parts = [getattr(layer, name) for layer in seen]
        if name == "queries":
            return torch.stack(parts)
        return torch.stack([pad(part, (0, store.slots - part.shape[-1])) for part in parts])

    policy.observe(store, Observation(**{name: joined(name) for name in sorted(policy.needs)}), step)


def draw_(logits: Tensor, buffers: Buffers, step: Tensor, guides: bool, sampling: Sampling) -> None:
    """Draw the token at a place, and note whether its logits were numbers.

    Args:
        logits: float32 `[rows, vocabulary]`.
        buffers: keys to draw by; the token is written to `tokens`, and it may be to `first_bad`.
        step: int64 0-d, the place.
        guides: whether the second half of the rows are to guide the first.
        sampling: by which operations, as `Sampling.frozen`.
    """
    logits = guide(logits, buffers.scale) if guides else logits[: len(buffers.tokens)]
    note_(buffers.first_bad, logits, step)
    drawn = draw(logits, buffers.keys, step.expand(len(logits)), sampling, buffers.temperature)
    buffers.tokens.index_copy_(1, step[None], drawn[:, None])
