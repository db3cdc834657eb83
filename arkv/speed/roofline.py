"""What a decoding step has to move, and how fast this machine moves it.

A step reads every weight that it uses once and every resident key and value once, and writes one key and
value a head. Arithmetic is small beside that, so the time of a step has a floor: these bytes by the bandwidth
of memory. The roofline share says how near to the floor a step comes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arkv.machine.instruments import Clock
from arkv.model import Model, ModelSpec
from arkv.store import CachePlan

COPIED = {"cpu": 2**27, "cuda": 2**30}
"""Bytes of the tensor that is copied: more than the processor's own caches hold, by far."""
COPIES = 5


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a step moves, by what they are.

    Attributes:
        weights: read once, however large the batch is.
        read: resident keys and values, read once.
        written: the new token's keys and values.
    """

    weights: int
    read: float
    written: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.read + self.written


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second, read and written ones counted, of the fastest of a few copies of one large tensor.

    Args:
        device: whose memory it is.
        size: bytes of the tensor; None for as many as suit the device.
    """
    size = COPIED.get(device.type, COPIED["cpu"]) if size is None else size
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # the system hands out pages when they are touched for the first time
    clock = Clock(device)
    clock.mark()
    for _ in range(COPIES):
        target.copy_(source)
        clock.mark()
    return 2 * size / min(clock.seconds())


@torch.inference_mode()
def weight_bytes(model: Model) -> int:
    """Bytes of the weights that a step reads: of the blocks and the head, and a row of an embedding.

    Found by running a step for one row and looking at what it touches, so that tables for the prompt,
    picture decoders and the like do not count.

    Args:
        model: with weights, on any device but meta.
    """
    device, spec = model.device, model.spec
    position = torch.zeros((), dtype=torch.long, device=device)
    rotation = torch.zeros(1, 1, spec.head_dim, device=device)
    with _Touched(model) as touched:
        hidden = model.embed(position[None], position)
        for block in model.blocks:
            query, _, _ = block.project(hidden, rotation)
            hidden = block.merge(hidden, query)
        model.head(hidden, position)
    return touched.total


def resident_slots(plan: CachePlan, spec: ModelSpec, position: int) -> float:
    """Visual slots of a head that the step at a position attends to, its own included: the mean of all heads.

    Args:
        plan: budgets and period.
        spec: the model's shape.
        position: place of the new token in raster order.
    """
    since = position % plan.period
    budgets = [budget for layer in plan.budgets(spec) for budget in layer]
    kept = sum(min(position - since, budget) for budget in budgets) / len(budgets)
    return kept + since + 1


class _Touched(TorchDispatchMode):
    """Notes which weights operations read, and how much of them; taking a view reads nothing."""

    def __init__(self, model: Model) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        held = [*model.parameters(), *model.buffers()]
        self._known = {_memory(tensor) for tensor in held}
        self._parts: dict[tuple[int, int], int] = {}

    @property
    def total(self) -> int:
        return sum(self._parts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = list(_tensors((args, tuple(kwargs.values()))))
        made = {_memory(tensor) for tensor in _tensors((result,))}
        for tensor in given:
            storage = _memory(tensor)
            if storage in self._known and storage not in made:
                size = tensor.nbytes
                if func is torch.ops.aten.embedding.default and tensor is args[0]:
                    size = tensor[0].nbytes * args[1].numel()
                part = (storage, 0 if tensor.is_mkldnn else int(tensor.storage_offset()))
                self._parts[part] = max(size, self._parts.get(part, 0))
        return result


def _memory(tensor: Tensor) -> int:
    """Where a tensor's numbers are; a packed weight does not tell, and is in no other tensor."""
    return id(tensor) if tensor.is_mkldnn else tensor.untyped_storage().data_ptr()


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
