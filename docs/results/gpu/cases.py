"""Attention over slots at the shapes of real models: inputs, what it should give, how long it takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from arkv.attention import operators, reference
from arkv.attention.blocks import Blocks, blocks_of
from arkv.attention.quantization import KV_DTYPES, quantize
from arkv.attention.reference import Attended

FEW = 8
"""Rows that the plain function is asked for."""


@dataclass(frozen=True)
class Case:
    """One layer's attention for one token of every row.

    Attributes:
        name: of the model and its budget.
        rows: sequences, guidance counted.
        heads: query heads.
        kv_heads: key heads.
        capacity: slots of a head.
        head_dim: of a head.
        needs: what a policy is shown.
        unequal: whether slots belong to heads by a table.
        kv_dtype: "int8", "fp8" or "int4" for keys and values of few bits.
    """

    name: str
    rows: int
    heads: int
    kv_heads: int
    capacity: int
    head_dim: int
    needs: frozenset[str] = frozenset()
    unequal: bool = False
    kv_dtype: str | None = None


MASS = frozenset({"mass"})


def published(rows: int) -> list[Case]:
    """The shapes of the models that are measured."""
    return [
        Case("janus-pro-1b 1/6", rows, 16, 16, 144, 128, MASS),
        Case("janus-pro-1b 1/6, unobserved", rows, 16, 16, 144, 128),
        Case("janus-pro-1b full", rows, 16, 16, 600, 128),
        Case("janus-pro-1b 1/6, unequal", rows, 16, 16, 144, 128, MASS, unequal=True),
        Case("janus-pro-1b 1/6, int8", rows, 16, 16, 144, 128, MASS, kv_dtype="int8"),
        Case("janus-pro-1b 1/6, fp8", rows, 16, 16, 144, 128, MASS, kv_dtype="fp8"),
        Case("janus-pro-1b 1/6, int4", rows, 16, 16, 144, 128, MASS, kv_dtype="int4"),
        Case("llamagen-xl 1/6", rows, 20, 20, 121, 64, MASS),
        Case("llamagen-3b 1/6", rows, 32, 32, 121, 100, MASS),
        Case("lumina-mgpt-7b 1/6", max(2, rows // 8), 32, 32, 471, 128, MASS),
        Case("four queries a key head", rows, 32, 8, 144, 128, MASS),
        Case("four queries a key head, int8", rows, 32, 8, 144, 128, MASS, kv_dtype="int8"),
    ]


class Inputs:
    """Random inputs of a case, several layers of them: one alone would stay in the processor's own cache.

    Args:
        case: the shapes.
        device: where.
        layers: keys and values to make.
    """

    def __init__(self, case: Case, device: torch.device, layers: int) -> None:
        self.case = case
        slots = case.kv_heads * case.capacity
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).bfloat16()

        self.query = normal(case.rows, case.heads, case.head_dim)
        self.layers: list[tuple[Tensor, Tensor]] = []
        self.scales: dict[str, Tensor] = {}
        for _ in range(layers):
            keys, values = (normal(case.rows, slots, case.head_dim) for _ in range(2))
            if case.kv_dtype is not None:
                dtype = KV_DTYPES[case.kv_dtype]
                (keys, key_scale), (values, value_scale) = quantize(keys, dtype), quantize(values, dtype)
                self.scales = {"key_scale": key_scale, "value_scale": value_scale}
            self.layers.append((keys, values))
        self.visible = torch.ones(case.rows, slots, dtype=torch.bool, device=device)
        self.blocks: Blocks | None = None
        if case.unequal:
            owner = torch.arange(slots, device=device)[None, None] // case.capacity
            self.blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner, case.kv_heads)))
        self.rooms = {name: torch.zeros(case.rows, slots, device=device) for name in case.needs}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that a layer reads."""
        keys, values = self.layers[0]
        return keys.nbytes + values.nbytes + sum(scale.nbytes for scale in self.scales.values())

    def attend(self, layer: int) -> Attended:
        """By the operators."""
        case, (keys, values) = self.case, self.layers[layer]
        return operators.slot_attention(
            self.query,
            keys,
            values,
            self.visible,
            case.kv_heads,
            case.needs,
            **self.scales,
            **self.rooms,
            blocks=self.blocks,
        )

    def errors(self) -> tuple[float, float | None]:
        """How far the operators are from the plain function: of the output relative, of the mass absolute."""
        got = self.attend(-1)
        keys, values = (x[:FEW] if self.scales else x[:FEW].float() for x in self.layers[-1])
        want = reference.slot_attention(
            self.query[:FEW].float(),
            keys,
            values,
            self.visible[:FEW],
            self.case.kv_heads,
            self.case.needs,
            **{name: scale[:FEW] for name, scale in self.scales.items()},
        )
        error = (got.output[:FEW].float() - want.output).norm() / want.output.norm()
        if got.mass is None or want.mass is None:
            return float(error), None
        return float(error), float((got.mass[:FEW] - want.mass).abs().max())


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int = 20) -> float:
    """Median of some work; on CUDA of replays of a graph of it, between events of the device."""
    work()
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    from arkv.machine.instruments import Clock

    beside = torch.cuda.Stream(device)
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        work()
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=beside):
        work()
    graph.replay()
    clock = Clock(device)
    clock.mark()
    for _ in range(repeats):
        graph.replay()
        clock.mark()
    return statistics.median(clock.seconds())
