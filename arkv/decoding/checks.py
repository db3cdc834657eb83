"""What is looked at before numbers are believed: a policy's needs, its selections, and the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.attention.reference import ragged_attention
from arkv.errors import ArkvError
from arkv.model import Model
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


def note_(first_bad: Tensor, logits: Tensor, step: Tensor) -> None:
    """Note the first token whose logits are not numbers; whatever went wrong before it shows in them.

    Args:
        first_bad: int64 0-d, the token, or -1.
        logits: float32 `[rows, vocabulary]`, of the token at `step`.
        step: int64 0-d.
    """
    first_bad.copy_(torch.where(is_finite(logits) | (first_bad >= 0), first_bad, step))


def search(
    model: Model, policy: CachePolicy, store: Store, rotation: Tensor, tokens: Tensor, step: Tensor
) -> int | None:
    """Feed a token once more, in the store as it is by now, and look at what each layer makes of it.

    Args:
        model: went wrong at this token first, and may have since.
        policy: says what the token may look at.
        store: not written to.
        rotation: float32 `[rows or 1, condition + N, head_dim]`.
        tokens: int64 `[rows]`.
        step: int64 0-d, their position.

    Returns:
        The first layer whose output is not finite, and `layers` if all are but the logits are not; None if
        nothing is wrong up to the logits.
    """
    visible = store.resident & (store.position <= step)
    limit = policy.visible(store, step)
    visible = visible if limit is None else visible & limit
    hidden = model.embed(tokens, step)
    rotation = rotation.index_select(1, (store.condition + step)[None])
    for layer, block in enumerate(model.blocks):
        query, _, _ = block.project(hidden, rotation)
        pool = store.pools[layer]
        seen = visible[layer, :, :pool]
        # What came later may be bad, and zero times that is bad, too.
        keys, values = (x.masked_fill(~seen[..., None], 0) for x in (store.keys[layer], store.values[layer]))
        key_scale, value_scale = (
            None if x is None else x.masked_fill(~seen, 0)
            for x in (store.key_scales[layer], store.value_scales[layer])
        )
        owner = store.head[layer, :, :pool]
        attended = ragged_attention(
            query[:, 0], keys, values, seen, owner, store.kv_heads, frozenset(), key_scale, value_scale
        )
        hidden = block.merge(hidden, attended.output[:, None])
        if not bool(hidden.isfinite().all()):
            return layer
    return None if is_finite(model.head(hidden, step + 1)) else len(model.blocks)


def is_finite(logits: Tensor) -> Tensor:
    """Whether logits are numbers, bool 0-d: the greatest of each row is, because others may be forbidden."""
    return logits.amax(-1).isfinite().all()
