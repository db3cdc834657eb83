"""What a batch brings and what its steps write, beside the store: tensors at addresses that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.decoding.sampling import Sampling
from arkv.model import Condition
from arkv.store import Store


class Buffers:
    """Memory of one batch shape that captured graphs read and write.

    Args:
        store: whose batch; all is allocated on its device.
        beside: those of a loop whose batch this one goes on with: what belongs to a picture is shared, what
            belongs to a row is allocated.

    Attributes:
        tokens: int64 `[pictures, N]`, drawn so far.
        keys: int32 `[pictures, 2]`, of the pictures' seeds: what tokens are drawn by.
        scale: float32 0-d, of guidance.
        temperature: float32 0-d.
        first_bad: int64 0-d, the first visual token of the batch whose logits were not numbers, or -1.
        places: int64 `[N]`, 0, 1, 2, ...: numbers as tensors.
        step: int64 0-d, position of the token that a step is fed.
        slots: int64 `[layers, rows, kv_heads, period]`, what the last eviction freed.
        rotation: float32 `[rows or 1, condition + N, head_dim]`, of all tokens.
    """

    rotation: Tensor

    def __init__(self, store: Store, beside: Buffers | None = None) -> None:
        spec, device = store.spec, store.position.device
        total, period = spec.grid.tokens, store.plan.period
        if beside is None:
            pictures = store.rows // 2 if store.guided else store.rows
            self.tokens = torch.zeros(pictures, total, dtype=torch.long, device=device)
            self.keys = torch.zeros(pictures, 2, dtype=torch.int32, device=device)
            self.scale, self.temperature = torch.zeros(2, dtype=torch.float32, device=device).unbind()
            self.first_bad = torch.full((), -1, dtype=torch.long, device=device)
            self.places = torch.arange(total, device=device)
        else:
            self.tokens, self.keys = beside.tokens, beside.keys
            self.scale, self.temperature = beside.scale, beside.temperature
            self.first_bad, self.places = beside.first_bad, beside.places
        self.step = torch.zeros((), dtype=torch.long, device=device)
        self.slots = torch.zeros(
            spec.layers, store.rows, spec.kv_heads, period, dtype=torch.long, device=device
        )

    def begin_(self, condition: Condition) -> None:
        """Take in what a batch brings with its condition, and forget the batch before."""
        self.tokens.zero_()
        self.first_bad.fill_(-1)
        self._rotate_by_(condition.rotation)

    def draw_by_(self, keys: Tensor, sampling: Sampling) -> None:
        """Take in what tokens are drawn by."""
        self.keys.copy_(keys)
        self.scale.fill_(sampling.guidance)
        self.temperature.fill_(sampling.temperature)

    def go_on_(self, other: Buffers) -> None:
        """Take over what the first rows of another loop's batch have, as far as it is not shared."""
        rows = self.slots.shape[1]
        self.slots.copy_(other.slots[:, :rows])
        self._rotate_by_(other.rotation[:rows])

    def _rotate_by_(self, rotation: Tensor) -> None:
        if not hasattr(self, "rotation"):  # whether all rows have one in common, the model decides
            self.rotation = torch.empty_like(rotation)
        self.rotation.copy_(rotation)
