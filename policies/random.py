"""A control: keep tokens without looking at anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arkv.policy import RankedPolicy
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class Random(RankedPolicy):
    """A uniform sample of all visual tokens decoded so far, drawn for each layer and head.

    Every token has one random priority for good and the best are kept, which at any time is a uniform
    sample (reservoir sampling by keys). Priorities are a hash, not draws, so a picture does not depend on
    the batch that it is in and nothing random happens inside a compiled graph.

    Attributes:
        seed: another one gives other samples.
    """

    source: ClassVar[str] = "control"

    seed: int = 0

    def score(self, store: Store, step: Tensor) -> Tensor:
        """A number in [0, 2^24) that looks random, from seed, layer, head and position."""
        layer = torch.arange(store.layers, device=store.position.device)[:, None, None]
        place = layer * store.kv_heads + store.head
        mixed = _mix(_mix(place + (self.seed * 1_000_003 & 0xFFFFFFFF)) ^ store.position.long())
        return (mixed & 0xFFFFFF).float()


def _mix(x: Tensor) -> Tensor:
    """Scramble the low 32 bits of integers: two rounds of xor-shift and multiply."""
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
