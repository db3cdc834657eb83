"""The decoding loop of one batch: prefill, then one token at a time through a static store.

    every P tokens:   slots = policy.select(store, step);  policy.evict(store, slots)
    every token:      claim a slot in every head
                      each layer: write key and value, attend over the slots
                      policy.observe(store, seen, step)
                      logits of the next token

With `compile="inductor"` one block is compiled and every layer reuses it, as the head and the policy's
verbs are compiled once each. Whatever changes from token to token is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention import block_attention, causal_attention, slot_attention
from arkv.errors import ArkvError, NumericalError
from arkv.model import Block, Condition, Model
from arkv.policy import CachePolicy, Observation
from arkv.store import Blocks, Store, write_

Compile = Literal["none", "inductor"]
Function = TypeVar("Function", bound=Callable[..., Any])

# Every batch shape, budget and policy is a graph of its own; Dynamo's default of eight for a function is
# soon used up by somebody who compares policies.
GRAPHS_PER_FUNCTION = 256


class Loop:
    """Model, policy and store of one batch shape.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        rows: sequences, both guidance rows of a picture counted.
        condition: condition tokens of a row, padding included.
        compile: "none" runs eagerly, "inductor" through `torch.compile`.
        guided: whether the second half of the rows are the unconditional ones of the first half.

    Attributes:
        store: where keys and values lie.
        shape: rows, condition tokens, guidance, dtype and device that the loop was made for.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        rows: int,
        condition: int,
        compile: Compile,
        guided: bool = False,
    ) -> None:
        spec = model.spec
        self.model, self.policy = model, policy
        if unknown := policy.needs - set(Observation._fields):
            raise ArkvError(
                f"{type(policy).__name__} needs {sorted(unknown)[0]!r}: a policy can be shown "
                f"{', '.join(Observation._fields)}"
            )
        self.store = Store(
            spec,
            policy.plan(spec.grid, spec),
            rows,
            condition,
            policy.fields,
            model.dtype,
            model.device,
            policy.head_fields,
            guided,
        )
        self.shape = (rows, condition, guided, model.dtype, model.device)
        self._blocks = list(model.blocks)
        self._blocks_of = [blocks_of_layer(self.store, layer) for layer in range(spec.layers)]
        self._steps = torch.arange(spec.grid.tokens, device=model.device)
        self._first_bad = torch.full((spec.layers + 1,), -1, device=model.device)
        self._step_block = compiled(step_block, compile)
        self._head = compiled(model.head, compile)
        self._enter = compiled(enter_, compile)
        self._observe = compiled(observe_, compile)
        self._recycle = compiled(recycle_, compile)

    def prefill_(self, condition: Condition) -> Tensor:
        """Start a batch: empty the store, fill in the condition tokens.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.
        """
        store = self.store
        store.reset_(condition.mask)
        self.policy.begin(store)
        self._first_bad.fill_(-1)
        self._rotation = condition.rotation
        hidden = condition.embeddings
        rotation = condition.rotation[:, : store.condition]
        sums = []
        for layer, block in enumerate(self._blocks):
            query, key, value = block.project(hidden, rotation)
            store.fill_condition_(layer, key, value)
            hidden = block.merge(hidden, causal_attention(query, key, value, condition.mask))
            # Padding attends to nothing real; only the last column speaks for a row.
            sums.append(hidden[:, -1].float().sum())
        return self._finish(hidden[:, -1:], sums, 0)

    def advance_(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one token further.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order; from 0 to N - 2, one after the other.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """
        store, policy = self.store, self.policy
        step, period = self._steps[position], store.plan.period
        if position == 0:
            check_selection(policy, store, policy.select(store, step))
        if position % period == 0:
            self._slots = self._recycle(policy, store, step)
        offset = self._steps[position % period]
        hidden, index, visible = self._enter(self.model, policy, store, tokens, self._slots, offset, step)
        place = store.condition + position
        rotation = self._rotation[:, place : place + 1]
        sums, seen = [], []
        for layer, block in enumerate(self._blocks):
            hidden, total, observed = self._step_block(
                block,
                hidden,
                rotation,
                store.keys[layer],
                store.values[layer],
                index[layer],
                visible[layer],
                self._blocks_of[layer],
                store.kv_heads,
                policy.needs,
            )
            sums.append(total)
            seen.append(observed)
        if policy.needs:
            self._observe(policy, store, seen, step)
        return self._finish(hidden, sums, position + 1)

    def check(self) -> None:
        """Raise `NumericalError` if a number was not finite since the prefill; waits for the device."""
        bad = [(step, layer) for layer, step in enumerate(self._first_bad.tolist()) if step >= 0]
        if bad:
            step, layer = min(bad)
            where = f"layer {layer}" if layer < len(self._blocks) else "the output head"
            raise NumericalError(
                f"NaN or infinity at visual token {step} of {len(self._steps)}, first in {where}: "
                "the weights are damaged, or the dtype is too narrow for them (try float32)"
            )

    def _finish(self, hidden: Tensor, sums: list[Tensor], position: int) -> Tensor:
        step = self._steps[position]
        logits: Tensor = self._head(hidden, step)
        # A sum is finite only if all its terms are; the greatest logit, because others may be forbidden.
        finite = torch.stack([*sums, logits.amax(-1).sum()]).isfinite()
        self._first_bad.copy_(torch.where(finite | (self._first_bad >= 0), self._first_bad, step))
        return logits


def enter_(
    model: Model,
    policy: CachePolicy,
    store: Store,
    tokens: Tensor,
    slots: Tensor,
    offset: Tensor,
    step: Tensor,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Give a new token its slots and its embedding.

    Args:
        model: embeds the token.
        policy: says what the token may look at.
        store: positions and statistics are written in place.
        tokens: int64 `[rows]`.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        offset: int64 0-d, which of them is next.
        step: int64 0-d, position of the token.

    Returns:
        Hidden `[rows, 1, width]` and, by layer, where to write, int64 `[rows * kv_heads]`, and what to look
        at, bool `[rows, pool]`.
    """
    chosen = slots.index_select(-1, offset[None])[..., 0]
    index = store.claim_(chosen, step)
    visible = store.resident
    limit = policy.visible(store, step)
    if limit is not None:
        visible = visible & limit
    return model.embed(tokens, step), index, [v[:, :n] for v, n in zip(visible, store.pools, strict=True)]


def step_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    visible: Tensor,
    blocks: Blocks | None,
    kv_heads: int,
    needs: frozenset[str],
) -> tuple[Tensor, Tensor, Observation]:
    """One block for one token: write its key and value, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, 1, width]`.
        rotation: float32 `[rows or 1, 1, head_dim]`.
        keys: `[rows, pool, head_dim]`, the layer's leaf, written in place.
        values: as `keys`.
        index: int64 `[rows * kv_heads]`, the slots to write, from `Store.claim_`.
        visible: bool `[rows, pool]`, the new token's slots included.
        blocks: where each head's slots are; None if the heads are equal and lie one after the other.
        kv_heads: key heads.
        needs: what the policy wants to see.

    Returns:
        The next hidden state, its sum (float32 0-d, finite only if all of it is), and what the policy needs
        of this layer.
    """
    query, key, value = block.project(hidden, rotation)
    write_(keys, index, key)
    write_(values, index, value)
    if blocks is None:
        attended = slot_attention(query[:, 0], keys, values, visible, kv_heads, needs)
    else:
        attended = block_attention(query[:, 0], keys, values, visible, *blocks, kv_heads, needs)
    hidden = block.merge(hidden, attended.output[:, None])
    seen = Observation(cast(Tensor, attended.mass), cast(Tensor, attended.scores), query[:, 0])
    observed = Observation(**{name: getattr(seen, name) for name in sorted(needs)})
    return hidden, hidden.float().sum(), observed


def observe_(policy: CachePolicy, store: Store, seen: list[Observation], step: Tensor) -> None:
    """Show the policy what all layers saw; pools smaller than the widest are filled up with zeros."""

    def joined(name: str) -> Tensor:
        parts = [getattr(layer, name) for layer in seen]
        if name == "queries":
            return torch.stack(parts)
        return torch.stack([pad(part, (0, store.slots - part.shape[-1])) for part in parts])

    policy.observe(store, Observation(**{name: joined(name) for name in sorted(policy.needs)}), step)


def blocks_of_layer(store: Store, layer: int) -> Blocks | None:
    """Views of one layer's part of the store's blocks; None where attention is dense."""
    if store.dense[layer] or store.blocks is None:
        return None
    return Blocks(*(leaf[layer] for leaf in store.blocks))


def recycle_(policy: CachePolicy, store: Store, step: Tensor) -> Tensor:
    """Let the policy select and evict; the slots int64 `[layers, rows, kv_heads, period]` to write next."""
    slots = policy.select(store, step)
    policy.evict(store, slots)
    store.assign_(slots)
    return slots


def check_selection(policy: CachePolicy, store: Store, slots: Tensor) -> None:
    """Raise `ArkvError` unless slots are what `select` owes: distinct, recyclable, the head's own."""
    name = type(policy).__name__
    shape = [store.layers, store.rows, store.kv_heads, store.plan.period]
    if list(slots.shape) != shape or slots.dtype != torch.long:
        raise ArkvError(f"{name}.select gave {slots.dtype} {list(slots.shape)}: expected torch.int64 {shape}")
    ordered = slots.flatten(2).sort(-1).values
    if int(ordered.min()) < 0 or int(ordered.max()) >= store.slots:
        raise ArkvError(f"{name}.select gave a slot outside of 0 to {store.slots - 1}")
    if bool((ordered.diff(dim=-1) == 0).any()):
        raise ArkvError(f"{name}.select gave the same slot twice")
    if not bool(store.recyclable.gather(-1, slots.flatten(2)).all()):
        raise ArkvError(f"{name}.select gave up a condition slot; only store.recyclable ones may be named")
    owner = store.head.expand(store.position.shape).gather(-1, slots.flatten(2)).view(slots.shape)
    if not store.plan.shared and not bool(
        (owner == torch.arange(store.kv_heads, device=slots.device)[:, None]).all()
    ):
        raise ArkvError(
            f"{name}.select gave a head a slot of another; only where the plan is shared may heads lend slots"
        )


def check_mode(mode: str) -> None:
    """Raise `ArkvError` for a compile mode that there is not."""
    if mode not in get_args(Compile):
        raise ArkvError(f"compile is {mode!r}: expected {' or '.join(map(repr, get_args(Compile)))}")


def compiled(function: Function, mode: Compile) -> Function:
    """The function as the compile mode wants it: itself, or one static graph for every shape.

    Dynamo's limits on the graphs of a function are raised for the whole process where they are lower.
    """
    if mode == "none":
        return function
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS_PER_FUNCTION)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * GRAPHS_PER_FUNCTION)
    return cast(Function, torch.compile(function, fullgraph=True, dynamic=False))
