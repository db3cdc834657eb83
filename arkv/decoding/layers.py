"""What one layer of a store is to a step: where it writes, what it reads, and what it shows the policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from arkv.attention import operators
from arkv.attention.blocks import Blocks
from arkv.model import Model
from arkv.store import Store


class Layer(NamedTuple):
    """Views of one layer, which follow the store. `pool` is the layer's number of slots.

    Attributes:
        keys: `[rows, pool, head_dim]`, or codes, written in place.
        values: as `keys`.
        key_scale: what stands beside keys in codes, else None.
        value_scale: likewise for values.
        layout: whose each slot is (see `layout_of_layer`); None if the heads are equal and lie one after the
            other.
        rooms: where kernels write what the policy is shown, "mass" and "scores" as far as it needs them:
            float32 `[rows, slots]`. Empty where there are no kernels.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    layout: Blocks | Tensor | None
    rooms: dict[str, Tensor]


def has_kernels(model: Model, store: Store) -> bool:
    """Whether attention over a store is the operators' (`arkv.attention.operators.available`)."""
    return operators.available(store.position.device, model.dtype)


def layers_of(store: Store, rooms: dict[str, Tensor], with_kernels: bool) -> list[Layer]:
    """Every layer of a store.

    Args:
        store: whose layers.
        rooms: those of all layers, `[layers, rows, slots]`.
        with_kernels: whether attention is `arkv.attention.operators`'.
    """
    return [
        Layer(
            store.keys[layer],
            store.values[layer],
            store.key_scales[layer],
            store.value_scales[layer],
            layout_of_layer(store, layer, with_kernels),
            {name: room[layer] for name, room in rooms.items()},
        )
        for layer in range(store.layers)
    ]


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
