"""What a batch will take of the memory, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from arkv.attention.blocks import BLOCK
from arkv.attention.quantization import PACKED, slot_bytes, storage_dtype
from arkv.errors import MemoryLimitError
from arkv.machine.memory import available_memory
from arkv.model import Model, ModelSpec
from arkv.plan import CachePlan
from arkv.policy import CachePolicy
from arkv.store import sizes_of
from arkv.weights.quantized import layers

WORKSPACE = 32 * 2**20
"""Bytes that torch gives cuBLAS for each stream from compute capability 9.0 on; on older GPUs it is less."""
KEPT_FREE = 0.05  # share of the free memory that a batch leaves alone: allocators and the rest of the program


@dataclass(frozen=True)
class Estimate:
    """Bytes by what they are for.

    Attributes:
        weights: parameters and buffers of the model.
        kv: keys and values of the store.
        full_kv: what keys and values would be with a slot for every token, in the model's own dtype.
        statistics: positions and what the policy remembers of each slot.
        scratch: the largest of what lives beside them at one time, an upper bound: prefill of the
            condition, one step (activations, scores, logits), or the ranking of an eviction; and what steps
            hand on to each other. What a policy's score takes beyond its statistics is not known.
        graphs: what captured lines keep for themselves on a GPU, an upper bound: they share one pool, and
            nothing else may use it.
        workspaces: what cuBLAS keeps on a GPU for each stream that has multiplied.
    """

    weights: int
    kv: int
    full_kv: int
    statistics: int
    scratch: int
    graphs: int = 0
    workspaces: int = 0

    @property
    def total(self) -> int:
        """Weights, keys and values, statistics, scratch, graphs and workspaces together."""
        return self.weights + self.kv + self.statistics + self.scratch + self.graphs + self.workspaces

    @property
    def batch(self) -> int:
        """What grows with the batch: everything but the weights."""
        return self.total - self.weights


def estimate(
    model: Model,
    policy: CachePolicy,
    pictures: int,
    guided: bool = True,
    condition: int | None = None,
    dtype: torch.dtype | None = None,
    kv_dtype: str | None = None,
    window: int = 1,
    compile: str = "none",
) -> Estimate:
    """Compute the memory of one batch.

    Args:
        model: any device, the meta device too.
        policy: planned for the model's grid; its fields and budget decide.
        pictures: pictures decoded at a time.
        guided: whether every picture has an unconditional row too.
        condition: condition tokens of a row; None for the most a prompt can have.
        dtype: of weights, keys and values; None for the model's own.
        kv_dtype: "int8", "fp8" or "int4" for keys and values in eight or four bits; None for `dtype`.
        window: tokens of a picture that a pass takes.
        compile: as for `arkv.Decoder`; what "cudagraphs" keeps is there on a GPU only.

    Returns:
        Bytes. Keys and values are exact.

    Raises:
        BudgetError: the policy cannot be planned for this model.
    """
    spec = model.spec
    dtype = dtype or model.dtype
    condition = spec.max_condition if condition is None else condition
    plan = policy.plan(spec.grid, spec)
    rows = pictures * (2 if guided else 1)
    heads = spec.layers * rows * spec.kv_heads
    pools = [sum(layer) + spec.kv_heads * condition for layer in plan.visual_slots(spec)]
    widest = max(pools)
    slots = spec.layers * rows * widest
    stored = storage_dtype(kv_dtype, dtype)
    field_bytes = torch.int32.itemsize + sum(kind.itemsize for kind in policy.fields.values())

    of_heads = sizes_of(policy.head_fields, spec.grid).values()
    head_bytes = sum(kind.itemsize * prod(size) for kind, size in of_heads)

    # Unequal heads have a table of their blocks, and in a layer each weighs every slot.
    unequal = plan.shared or any(len(set(layer)) > 1 for layer in plan.visual_slots(spec))
    places = widest + BLOCK * spec.kv_heads if unequal else 0
    owners = spec.layers * (rows if plan.shared else 1)
    layout = owners * (8 * widest + 9 * places + 8 * places // BLOCK)
    # As many slots of one layer are turned into the dtype of the products where they are stored narrower.
    widened = 0 if stored == dtype else rows * widest * 2 * spec.head_dim * dtype.itemsize
    # And of keys or values in float32, where two codes share a byte.
    widened += rows * widest * spec.head_dim * 12 if stored == PACKED else 0
    weighed = rows * spec.heads * widest * 4 * 4 if unequal else 0

    # One row's widest activations (inside of the MLP beside the residual stream), in float32 twice over.
    activations = 4 * 4 * (2 * spec.width + 3 * spec.hidden)
    prefill = rows * condition * (activations + 3 * 4 * spec.heads * condition)
    scores = rows * spec.heads // spec.kv_heads * widest * 4
    # Slots that are named, checked once a batch; and what their worth, as numbers of 64 bits, is ranked by.
    named = heads * plan.period * 8
    ranking = 6 * named + (0 if policy.in_order else slots * _ranked_bytes(plan, spec))
    seen = slots * 4 * len(policy.needs & {"mass", "scores"})
    seen += spec.layers * rows * spec.heads * spec.head_dim * 4 * ("queries" in policy.needs)
    logits = rows * spec.vocabulary * 4 * 6
    # On a GPU a weight of few bits is a plain matrix while it is multiplied with many rows.
    matrices = [layer.weight.numel() * (2 * dtype.itemsize + 2) for _, layer in layers(model)]
    widest_weight = 0 if model.device.type == "cpu" else max(matrices, default=0)
    step = window * (rows * activations + 3 * scores + weighed + logits) + widened + 2 * seen
    if window > 1 and plan.period > 1:
        # What the policy is to be shown of every token, until it is; and which token sees which slot.
        step += plan.period * seen + slots * 4
    captured = compile == "cudagraphs"
    cuda = captured or model.device.type == "cuda"
    # Tokens, the slots that were named and, where kernels write it, what a policy is shown.
    handed_on = pictures * spec.grid.tokens * 8 + named + (seen if cuda else 0)
    return Estimate(
        # What has a dtype of its own, such as a picture decoder in float32, keeps it.
        weights=sum(
            p.numel() * (dtype if p.dtype == model.dtype else p.dtype).itemsize for p in model.parameters()
        )
        + sum(b.numel() * b.element_size() for b in model.buffers()),
        kv=rows * sum(pools) * 2 * slot_bytes(stored, spec.head_dim),
        full_kv=heads * (condition + spec.grid.tokens) * 2 * spec.head_dim * dtype.itemsize,
        statistics=slots * field_bytes + heads * head_bytes + layout,
        scratch=max(prefill, step, ranking) + widest_weight + handed_on,
        graphs=max(step, ranking) + widest_weight if captured else 0,
        workspaces=WORKSPACE * (1 + captured) if cuda else 0,
    )


def _ranked_bytes(plan: CachePlan, spec: ModelSpec) -> int:
    """Bytes a slot that a ranking takes at the most, counted on eager runs (tests hold them).

    Heads of a few sizes are ranked by top-k, others by sorts of the pool with their orders and copies.
    """
    sizes = {slots for layer in plan.visual_slots(spec) for slots in layer}
    return 110 if plan.shared or len(sizes) > spec.layers else 64


def pictures_within(
    memory: int,
    model: Model,
    policy: CachePolicy,
    guided: bool,
    condition: int,
    kv_dtype: str | None = None,
    window: int = 1,
    compile: str = "none",
) -> int:
    """The most pictures whose batch takes no more than some memory, weights not counted; maybe none.

    Args:
        memory: bytes.
        model: what draws.
        policy: decides what a picture takes.
        guided: whether every picture has an unconditional row too.
        condition: condition tokens of a row.
        kv_dtype: as for `estimate`.
        window: likewise.
        compile: likewise.
    """

    def needed(pictures: int) -> int:
        return estimate(model, policy, pictures, guided, condition, None, kv_dtype, window, compile).batch

    # An estimate is a constant and so much a picture, except for what rounds or takes turns in being largest.
    fits = memory // needed(1)
    while needed(fits + 1) <= memory:
        fits = max(fits + 1, memory * (fits + 1) // needed(fits + 1))
    while fits and needed(fits) > memory:
        fits -= 1
    return fits


def usable_memory(device: torch.device, held: int = 0) -> int | None:
    """Bytes that batches may take of what is free, or None where nobody can say how much that is.

    Args:
        device: whose memory.
        held: bytes that will be free before a batch begins.
    """
    free = available_memory(device)
    return None if free is None else int((free + held) * (1 - KEPT_FREE))


def check_memory(
    model: Model,
    policy: CachePolicy,
    pictures: int,
    guided: bool,
    condition: int,
    kv_dtype: str | None = None,
    window: int = 1,
    compile: str = "none",
    held: int = 0,
) -> None:
    """Refuse a batch that does not fit beside the weights already loaded.

    The arguments are those of `estimate`, and `held` is that of `usable_memory`.

    Raises:
        MemoryLimitError: says what is needed, what there is, and the largest batch that fits.
    """
    usable = usable_memory(model.device, held)
    if usable is None:
        return
    needed = estimate(model, policy, pictures, guided, condition, None, kv_dtype, window, compile).batch
    if needed <= usable:
        return
    fits = pictures_within(usable, model, policy, guided, condition, kv_dtype, window, compile)
    advice = (
        f"the largest batch that fits is {fits}" if fits else "not even one picture fits: lower the ratio"
    )
    raise MemoryLimitError(
        f"a batch of {pictures} needs {format_bytes(needed)} beside the weights and "
        f"{format_bytes(usable)} is free on {model.device}; {advice}"
    )


def format_bytes(count: float) -> str:
    """A byte count with three significant digits and a decimal unit, such as "3.54 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def rows_of(estimated: Estimate) -> Mapping[str, int]:
    """The lines of a printed estimate, name to bytes."""
    return {
        "weights": estimated.weights,
        "keys and values": estimated.kv,
        "(full cache)": estimated.full_kv,
        "statistics": estimated.statistics,
        "scratch": estimated.scratch,
        **({"graphs": estimated.graphs} if estimated.graphs else {}),
        **({"workspaces": estimated.workspaces} if estimated.workspaces else {}),
        "total": estimated.total,
    }
