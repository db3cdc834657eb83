"""What is looked at before numbers are believed: a policy's needs, its selections, and the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.errors import ArkvError, NumericalError
from arkv.policy import CachePolicy, Observation
from arkv.store import Store


def check_needs(policy: CachePolicy) -> None:
    """Raise `ArkvError` for a need that no policy can be shown."""
    if unknown := policy.needs - set(Observation._fields):
        raise ArkvError(
            f"{type(policy).__name__} needs {sorted(unknown)[0]!r}: a policy can be shown "
            f"{', '.join(Observation._fields)}"
        )


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


def check_numbers(first_bad: Tensor, tokens: int) -> None:
    """Raise `NumericalError` if a number was not finite; waits for the device.

    Args:
        first_bad: `[layers + 1]`, by layer, and last of the output head, the first visual token at which a
            number was not finite, or -1.
        tokens: visual tokens of a picture.
    """
    *layers, _ = by_layer = first_bad.tolist()
    bad = [(step, layer) for layer, step in enumerate(by_layer) if step >= 0]
    if bad:
        step, layer = min(bad)
        where = f"layer {layer}" if layer < len(layers) else "the output head"
        raise NumericalError(
            f"NaN or infinity at visual token {step} of {tokens}, first in {where}: "
            "the weights are damaged, or the dtype is too narrow for them (try float32)"
        )
