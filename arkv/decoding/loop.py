"""The decoding loop of one batch: prefill, then one token at a time through a static store.

    every P tokens:   slots = policy.select(store, step);  policy.evict(store, slots)
    every token:      claim a slot in every head
                      each layer: write key and value, attend over the slots
                      policy.observe(store, seen, step)
                      logits of the next token

A line of tokens is one piece of work (`Loop.sample_`): whatever changes within it, the place of the token
too, is a tensor at a fixed address, and nothing comes back to Python before its end. With
`compile="inductor"` one block is compiled and every layer reuses it, as the head and the policy's verbs are
compiled once each. With `compile="cudagraphs"` the whole line, compiled so, is captured as one CUDA graph
and replayed for the lines after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar, cast, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention import operators
from arkv.attention.blocks import Blocks
from arkv.attention.quantization import storage_dtype
from arkv.attention.reference import causal_attention, ragged_attention, slot_attention
from arkv.decoding.graphs import Replayed
from arkv.decoding.sampling import Sampling, draw, guide
from arkv.errors import ArkvError, NumericalError
from arkv.model import Block, Condition, Model
from arkv.policy import CachePolicy, Observation
from arkv.store import Store, write_

Compile = Literal["none", "inductor", "cudagraphs"]
Function = TypeVar("Function", bound=Callable[..., Any])

# Every batch shape, budget and policy is a graph of its own; Dynamo's default of eight for a function is
# soon used up by somebody who compares policies.
GRAPHS_PER_FUNCTION = 256


class Leaves(NamedTuple):
    """Where one layer's keys and values lie: `[rows, pool, head_dim]`, written in place.

    Attributes:
        keys: of the layer.
        values: of the layer.
        key_scale: float32 `[rows, pool]` beside keys of eight bits, else None.
        value_scale: likewise for values.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None


class Loop:
    """Model, policy and store of one batch shape.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        rows: sequences, both guidance rows of a picture counted.
        condition: condition tokens of a row, padding included.
        compile: "none" runs eagerly, "inductor" through `torch.compile`, "cudagraphs" replays whole lines.
        guided: whether the second half of the rows are the unconditional ones of the first half.
        kv_dtype: "int8" or "fp8" to store keys and values in eight bits; None for the model's own dtype.
        beside: a loop whose first rows this one goes on with, in the same keys and values; None for a loop
            of its own.

    Attributes:
        store: where keys and values lie.
        shape: rows, condition tokens, guidance, dtype and device that the loop was made for.
        tokens: int64 `[pictures, N]`, what `sample_` has drawn so far.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        rows: int,
        condition: int,
        compile: Compile,
        guided: bool = False,
        kv_dtype: str | None = None,
        beside: Loop | None = None,
    ) -> None:
        spec, device = model.spec, model.device
        self.model, self.policy, self.guided = model, policy, guided
        if unknown := policy.needs - set(Observation._fields):
            raise ArkvError(
                f"{type(policy).__name__} needs {sorted(unknown)[0]!r}: a policy can be shown "
                f"{', '.join(Observation._fields)}"
            )
        self.store: Store = Store(
            spec,
            policy.plan(spec.grid, spec),
            rows,
            condition,
            policy.fields,
            storage_dtype(kv_dtype, model.dtype),
            device,
            policy.head_fields,
            guided,
            None if beside is None else beside.store,
        )
        self.shape = (rows, condition, guided, model.dtype, device)
        self._compile, self._kv_dtype = compile, kv_dtype
        self._blocks = list(model.blocks)
        store = self.store
        self._leaves = [
            Leaves(*of_layer)
            for of_layer in zip(store.keys, store.values, store.key_scales, store.value_scales, strict=True)
        ]
        self._steps = torch.arange(spec.grid.tokens, device=device)
        self._step = torch.zeros((), dtype=torch.long, device=device)
        self._slots = torch.zeros(
            spec.layers, rows, spec.kv_heads, store.plan.period, dtype=torch.long, device=device
        )
        pictures = rows // 2 if guided else rows
        if beside is None:
            self.tokens = torch.zeros(pictures, spec.grid.tokens, dtype=torch.long, device=device)
            self._uniforms = torch.zeros(pictures, spec.grid.tokens, device=device)
            self._scale, self._temperature = torch.zeros(2, device=device).unbind()
            self._first_bad = torch.full((spec.layers + 1,), -1, device=device)
        else:
            self.tokens, self._uniforms = beside.tokens, beside._uniforms
            self._scale, self._temperature = beside._scale, beside._temperature
            self._first_bad = beside._first_bad
        self._rotation: Tensor | None = None
        self._unguided: Loop | None = None
        self._lines = Replayed(compile == "cudagraphs")
        if self._lines.captures:  # what a captured `advance_` reads and writes
            self._fed = torch.zeros(rows, dtype=torch.long, device=device)
            self._logits = torch.zeros(rows, spec.vocabulary, device=device)
        # Where there are kernels, they write what a policy is shown to where it reads it.
        self._kernels = operators.available(device)
        self._layouts = [layout_of_layer(store, layer, self._kernels) for layer in range(spec.layers)]
        self._rooms = {
            name: torch.zeros(spec.layers, rows, store.slots, device=device)
            for name in sorted(policy.needs & {"mass", "scores"})
            if self._kernels
        }
        self._rooms_of = [
            {name: room[layer] for name, room in self._rooms.items()} for layer in range(spec.layers)
        ]
        # A length is no tensor and cannot change within a graph; kernels pass over empty slots by themselves.
        # The CPU's products of narrow numbers copy what is not contiguous, which costs more than it saves.
        copies = compile == "none" and self.store.keys[0].dtype != torch.float32
        self._reaches: list[Tensor | None] = [None] * spec.grid.rows
        if policy.in_order and store.equal and not (self._kernels or copies or self._lines.captures):
            self._reaches = reaches(store)
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
        self._rotate_by_(condition.rotation)
        hidden = condition.embeddings
        rotation = condition.rotation[:, : store.condition]
        sums = []
        for layer, block in enumerate(self._blocks):
            query, key, value = block.project(hidden, rotation)
            store.fill_condition_(layer, key, value)
            hidden = block.merge(hidden, causal_attention(query, key, value, condition.mask))
            # Padding attends to nothing real; only the last column speaks for a row.
            sums.append(hidden[:, -1].float().sum())
        logits = self._finish(hidden[:, -1:], sums, self._steps[0])
        check_selection(self.policy, store, self.policy.select(store, self._steps[0]))
        return logits

    def advance_(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one token further.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order; from 0 to N - 2, one after the other.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """
        if not self._lines.captures:
            return self._advance(tokens, self._steps[position], position)

        def run() -> None:
            self._logits.copy_(self._advance(self._fed, self._step, position))

        self._fed.copy_(tokens)
        self._step.fill_(position)
        self._lines.run(("step", position % self.store.plan.period), run)
        return self._logits.clone()

    def sample_(self, condition: Condition, uniforms: Tensor, sampling: Sampling) -> Iterator[int]:
        """Decode a batch of pictures into `tokens`.

        Args:
            condition: of all rows.
            uniforms: float32 `[pictures, N]`, what each token is drawn by.
            sampling: how; guided exactly if the loop is.

        Yields:
            The index of each line as soon as it is drawn and in the cache, its numbers checked.

        Raises:
            NumericalError: a number was not finite.
        """
        line, total = self.model.spec.grid.line, self.model.spec.grid.tokens
        self._uniforms.copy_(uniforms)
        self._scale.fill_(sampling.guidance)
        self._temperature.fill_(sampling.temperature)
        self._draw_(self.prefill_(condition), self._steps[0], 0, sampling)
        for start in range(0, total, line):
            # The last token of the picture enters no cache.
            stop = min(start + line, total - 1)
            for part in split(start, stop, self._guided_steps(sampling)):
                self._loop_at(part.start, sampling)._decode_(part, sampling)
            self.check()
            yield start // line

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

    def _decode_(self, steps: range, sampling: Sampling) -> None:
        """Feed the tokens at `steps`, one after the other, and draw the one after each."""

        def run() -> None:
            for position in steps:
                token = self.tokens.index_select(1, self._step[None])[:, 0]
                if self.guided:
                    token = token.repeat(2)
                logits = self._advance(token, self._step, position)
                self._step.add_(1)
                self._draw_(logits, self._step, position + 1, sampling)

        self._step.fill_(steps.start)
        # What a graph has for good; guidance and temperature are tensors.
        period = self.store.plan.period
        self._lines.run(("line", len(steps), steps.start % period, sampling.frozen), run)

    def _advance(self, tokens: Tensor, step: Tensor, position: int) -> Tensor:
        """`advance_`, with the position as a tensor for what is captured and as a number for what is not."""
        store, policy = self.store, self.policy
        offset = position % store.plan.period
        if offset == 0:
            self._slots.copy_(self._recycle(policy, store, step))
        assert self._rotation is not None
        hidden, rotation, index, visible = self._enter(
            self.model, policy, store, tokens, self._slots, self._steps[offset], self._rotation, step
        )
        reach = self._reaches[self.model.spec.grid.row(position)]
        sums, seen = [], []
        for layer, block in enumerate(self._blocks):
            hidden, total, observed = self._step_block(
                block,
                hidden,
                rotation,
                self._leaves[layer],
                index[layer],
                visible[layer],
                self._layouts[layer],
                store.kv_heads,
                policy.needs,
                reach,
                self._kernels,
                self._rooms_of[layer],
            )
            sums.append(total)
            seen.append(observed)
        if policy.needs:
            self._observe(policy, store, seen, self._rooms, step)
        return self._finish(hidden, sums, step + 1)

    def _draw_(self, logits: Tensor, step: Tensor, position: int, sampling: Sampling) -> None:
        """Draw the token at a place."""
        if sampling.guides(position):
            logits = guide(logits, self._scale)
        uniforms = self._uniforms.index_select(1, step[None])[:, 0]
        drawn = draw(logits[: len(self.tokens)], uniforms, sampling, self._temperature)
        self.tokens.index_copy_(1, step[None], drawn[:, None])

    def _guided_steps(self, sampling: Sampling) -> int:
        """From which step on the unconditional rows are not fed: what they would say is not used."""
        total = len(self._steps)
        return total if sampling.guided_tokens is None else max(0, sampling.guided_tokens - 1)

    def _loop_at(self, position: int, sampling: Sampling) -> Loop:
        """This loop, or once guidance is over the one of the conditional rows alone."""
        over = self._guided_steps(sampling)
        if not self.guided or position < over:
            return self
        if self._unguided is None:
            _, condition, *_ = self.shape
            self._unguided = Loop(
                self.model,
                self.policy,
                len(self.tokens),
                condition,
                self._compile,
                kv_dtype=self._kv_dtype,
                beside=self,
            )
        if position == over:
            rest = self._unguided
            rest.store.copy_statistics_(self.store)
            rest._slots.copy_(self._slots[:, : len(self.tokens)])
            assert self._rotation is not None
            rest._rotate_by_(self._rotation[: len(self.tokens)])
        return self._unguided

    def _rotate_by_(self, rotation: Tensor) -> None:
        """Keep the rotations of all tokens where captured graphs look for them."""
        if self._rotation is None:
            self._rotation = torch.empty_like(rotation)
        self._rotation.copy_(rotation)

    def _finish(self, hidden: Tensor, sums: list[Tensor], step: Tensor) -> Tensor:
        logits: Tensor = self._head(hidden, step)
        # A sum is finite only if all its terms are; the greatest logit, because others may be forbidden.
        finite = torch.stack([*sums, logits.amax(-1).sum()]).isfinite()
        self._first_bad.copy_(torch.where(finite | (self._first_bad >= 0), self._first_bad, step))
        return logits


def reaches(store: Store) -> list[Tensor | None]:
    """How many slots of a head have been claimed when a line is drawn, of slots that are claimed in order.

    Args:
        store: whose heads are equal.

    Returns:
        By line of the grid, `[n, 0]`, a length that compiled graphs take as it comes; None where all slots
        are claimed.
    """
    line, capacity = store.grid.line, store.slots // store.kv_heads
    lengths: list[Tensor | None] = []
    for row in range(store.grid.rows):
        claimed = store.condition + (row + 1) * line
        if claimed >= capacity:
            lengths.append(None)
            continue
        length = torch.empty(claimed, 0)
        # Not `mark_dynamic`, which refuses the second graph that Inductor makes beyond 4,096.
        torch._dynamo.maybe_mark_dynamic(length, 0)
        lengths.append(length)
    return lengths


def split(start: int, stop: int, at: int) -> list[range]:
    """The range, in two where `at` lies inside of it."""
    return [part for part in (range(start, min(stop, at)), range(max(start, at), stop)) if part]


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
        write, int64 `[rows * kv_heads]`, and what to look at, bool `[rows, pool]`.
    """
    chosen = slots.index_select(-1, offset[None])[..., 0]
    index = store.claim_(chosen, step)
    visible = store.resident
    limit = policy.visible(store, step)
    if limit is not None:
        visible = visible & limit
    return (
        model.embed(tokens, step),
        rotation.index_select(1, (store.condition + step)[None]),
        index,
        [v[:, :n] for v, n in zip(visible, store.pools, strict=True)],
    )


def step_block(
    block: Block,
    hidden: Tensor,
    rotation: Tensor,
    leaves: Leaves,
    index: Tensor,
    visible: Tensor,
    layout: Blocks | Tensor | None,
    kv_heads: int,
    needs: frozenset[str],
    reach: Tensor | None,
    with_kernels: bool,
    rooms: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Observation]:
    """One block for one token: write its key and value, attend over the slots.

    Args:
        block: the weights.
        hidden: `[rows, 1, width]`.
        rotation: float32 `[rows or 1, 1, head_dim]`.
        leaves: the layer's keys and values, written in place.
        index: int64 `[rows * kv_heads]`, the slots to write, from `Store.claim_`.
        visible: bool `[rows, pool]`, the new token's slots included.
        layout: whose each slot is (see `layout_of_layer`); None if the heads are equal and lie one after the
            other.
        kv_heads: key heads.
        needs: what the policy wants to see.
        reach: `[n, 0]` where only the first `n` slots of a head can hold anything; None to read all. A
            length and not a number, so that one graph serves every `n`.
        with_kernels: whether attention is `arkv.attention.operators`'.
        rooms: what kernels write mass and scores to, as far as there are `needs`: float32 `[rows, slots]`.

    Returns:
        The next hidden state, its sum (float32 0-d, finite only if all of it is), and what the policy needs
        of this layer, as far as there is no room for it.
    """
    query, key, value = block.project(hidden, rotation)
    keys, values, key_scale, value_scale = leaves
    write_(keys, index, key, key_scale)
    write_(values, index, value, value_scale)
    leaf = (query[:, 0], keys, values, visible)
    scales = (key_scale, value_scale)
    if isinstance(layout, Blocks):
        attended = operators.block_attention(*leaf, *layout, kv_heads, needs, *scales, **rooms)
    elif layout is not None:
        attended = ragged_attention(*leaf, layout, kv_heads, needs, *scales)
    elif with_kernels:
        attended = operators.slot_attention(*leaf, kv_heads, needs, *scales, **rooms)
    else:
        extent = None if reach is None else reach.shape[0]
        attended = slot_attention(*leaf, kv_heads, needs, *scales, extent)
    hidden = block.merge(hidden, attended.output[:, None])
    seen = Observation(cast(Tensor, attended.mass), cast(Tensor, attended.scores), query[:, 0])
    observed = Observation(**{name: getattr(seen, name) for name in sorted(needs - rooms.keys())})
    return hidden, hidden.float().sum(), observed


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


def layout_of_layer(store: Store, layer: int, with_kernels: bool) -> Blocks | Tensor | None:
    """Views that say whose each slot of a layer is; they follow the store.

    Args:
        store: whose slots.
        layer: which of its layers.
        with_kernels: whether attention is `arkv.attention.operators`'.

    Returns:
        None where attention is dense; blocks of each head's slots for kernels, the head of each slot, int64
        `[1 or rows, pool]`, for the plain function.
    """
    if store.dense[layer] or store.blocks is None:
        return None
    if with_kernels:
        return Blocks(*(leaf[layer] for leaf in store.blocks))
    return store.head[layer, :, : store.pools[layer]]


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


def check_mode(mode: str, device: torch.device) -> None:
    """Raise `ArkvError` for a compile mode that there is not, at all or on this device."""
    if mode not in get_args(Compile):
        raise ArkvError(f"compile is {mode!r}: expected {' or '.join(map(repr, get_args(Compile)))}")
    if mode == "cudagraphs" and device.type != "cuda":
        raise ArkvError(
            f"compile is 'cudagraphs' and the model is on {device}: take 'inductor', or a CUDA device"
        )


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
