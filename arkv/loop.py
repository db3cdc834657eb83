"""The decoding loop of one batch: prefill, then one token at a time through a static store.

    every P tokens:   slots = policy.select(store, step);  policy.evict(store, slots)
    every token:      claim a slot in every head
                      each layer: write key and value, attend over the slots
                      policy.observe(store, mass, step)
                      logits of the next token

With `compile="inductor"` one block is compiled and every layer reuses it, as the head and the policy's
verbs are compiled once each. Whatever changes from token to token is a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor

from arkv.attention import causal_attention, slot_attention
from arkv.errors import ArkvError, NumericalError
from arkv.model import Block, Condition, Model
from arkv.policy import CachePolicy
from arkv.store import Store, write_

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

    Attributes:
        store: where keys and values lie.
        shape: rows, condition tokens, dtype and device that the loop was made for.
    """

    def __init__(
        self, model: Model, policy: CachePolicy, rows: int, condition: int, compile: Compile
    ) -> None:
        spec = model.spec
        self.model, self.policy = model, policy
        self.store = Store(
            spec, policy.plan(spec.grid, spec), rows, condition, policy.fields, model.dtype, model.device
        )
        self.shape = (rows, condition, model.dtype, model.device)
        self._blocks = list(model.blocks)
        self._steps = torch.arange(spec.grid.tokens, device=model.device)
        self._first_bad = torch.full((spec.layers + 1,), -1, device=model.device)
        self._step_block = compiled(step_block, compile)
        self._head = compiled(model.head, compile)
        self._enter = compiled(enter_, compile)
        self._observe = compiled(policy.observe, compile)
        self._recycle = compiled(recycle_, compile)

    def prefill_(self, condition: Condition) -> Tensor:
        """Start a batch: empty the store, fill in the condition tokens.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.
        """
        store = self.store
        store.reset_(condition.mask)
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
        hidden, index, resident = self._enter(self.model, store, tokens, self._slots, offset, step)
        place = store.condition + position
        rotation = self._rotation[:, place : place + 1]
        sums, masses = [], []
        for layer, block in enumerate(self._blocks):
            hidden, total, mass = self._step_block(
                block,
                hidden,
                rotation,
                store.keys[layer],
                store.values[layer],
                index[layer],
                resident[layer],
                policy.needs_mass,
            )
            sums.append(total)
            if mass is not None:
                masses.append(mass)
        if masses:
            self._observe(store, torch.stack(masses), step)
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
    model: Model, store: Store, tokens: Tensor, slots: Tensor, offset: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Give a new token its slots and its embedding.

    Args:
        model: embeds the token.
        store: positions and statistics are written in place.
        tokens: int64 `[rows]`.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        offset: int64 0-d, which of them is next.
        step: int64 0-d, position of the token.

    Returns:
        Hidden `[rows, 1, width]`, where to write int64 `[layers, rows * kv_heads]`, and where a token is
        held, bool `[layers, rows, kv_heads, capacity]`.
    """
    chosen = slots.index_select(-1, offset[None])[..., 0]
    index = store.claim_(chosen, step)
    return model.embed(tokens, step), index, store.resident


def step_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    keys: Tensor,
    values: Tensor,
    index: Tensor,
    resident: Tensor,
    needs_mass: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One block for one token: write its key and value, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, 1, width]`.
        rotation: float32 `[rows or 1, 1, head_dim]`.
        keys: `[rows, slots, head_dim]`, the layer's leaf, written in place.
        values: as `keys`.
        index: int64 `[rows * kv_heads]`, the slots to write, from `Store.claim_`.
        resident: bool `[rows, kv_heads, capacity]`, the new token's slot included.
        needs_mass: whether to return the attention mass.

    Returns:
        The next hidden state, its sum (float32 0-d, finite only if all of it is), and the mass float32
        `[rows, kv_heads, capacity]` or None.
    """
    query, key, value = block.project(hidden, rotation)
    write_(keys, index, key)
    write_(values, index, value)
    attended, mass = slot_attention(query[:, 0], keys, values, resident, needs_mass)
    hidden = block.merge(hidden, attended[:, None])
    return hidden, hidden.float().sum(), mass


def recycle_(policy: CachePolicy, store: Store, step: Tensor) -> Tensor:
    """Let the policy select and evict; the slots int64 `[layers, rows, kv_heads, period]` to write next."""
    slots = policy.select(store, step)
    policy.evict(store, slots)
    return slots


def check_selection(policy: CachePolicy, store: Store, slots: Tensor) -> None:
    """Raise `ArkvError` unless slots are what `select` owes: right shape, distinct and recyclable."""
    name = type(policy).__name__
    shape = [*store.position.shape[:3], store.plan.period]
    if list(slots.shape) != shape or slots.dtype != torch.long:
        raise ArkvError(f"{name}.select gave {slots.dtype} {list(slots.shape)}: expected torch.int64 {shape}")
    ordered = slots.sort(-1).values
    if int(ordered.min()) < 0 or int(ordered.max()) >= store.capacity:
        raise ArkvError(f"{name}.select gave a slot outside of 0 to {store.capacity - 1}")
    if bool((ordered.diff(dim=-1) == 0).any()):
        raise ArkvError(f"{name}.select gave the same slot of a head twice")
    if not bool(store.recyclable.gather(-1, slots).all()):
        raise ArkvError(f"{name}.select gave up a condition slot; only store.recyclable ones may be named")


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
