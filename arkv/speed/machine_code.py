"""What the attention kernels become for a GPU: compiled ahead of time, on a machine that needs none.

Registers decide how many programs a processor holds, a spill is a detour over memory, and the width of loads
says whether the bus is kept busy. All of it stands in the machine code.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from arkv.attention.blocks import BLOCK, Blocks
from arkv.attention.quantization import KV_DTYPES, can_store, scale_shape, stored_width
from arkv.errors import ArkvError
from arkv.model import ModelSpec

if TYPE_CHECKING:
    from arkv.launch import Launch

ARCHITECTURES = (80, 90, 100)
"""Compute capabilities, times ten: A100, H100 and H200, B200."""

FLOAT8_FROM = 89
"""The first that converts float8; Triton compiles no kernel that reads it for those before."""

WIDTHS = {"U8", "S8", "U16", "S16", "64", "128", "256"}
WIDE = 64
"""Bits of a load that keeps the bus busy."""
WINDOW = 16
"""Tokens of a window as most are."""
CAPTION = 24
"""Condition tokens of a prompt that is no longer than most."""
SOME = 4
"""Wide loads that make a loop one over slots."""


@dataclass(frozen=True)
class Call:
    """What of a call of attention decides about the code that is compiled for it.

    Attributes:
        heads: query heads.
        kv_heads: key heads.
        head_dim: numbers of a key.
        capacity: slots of a key head; on average, where the heads are unequal.
        dtype: of the query.
        stored: of keys and values; one of few bits has scales.
        needs: "mass" and "scores", as far as they are wanted.
        unequal: whether the slots of the heads lie in blocks.
        tokens: of a window; None for a step.
    """

    heads: int
    kv_heads: int
    head_dim: int
    capacity: int
    dtype: torch.dtype = torch.bfloat16
    stored: torch.dtype = torch.bfloat16
    needs: frozenset[str] = frozenset()
    unequal: bool = False
    tokens: int | None = None


class Code(NamedTuple):
    """The machine code of one kernel.

    Attributes:
        kernel: its name.
        warps: of a program.
        registers: of a thread.
        spills: instructions that take registers to memory or back.
        shared: bytes of shared memory of a program.
        instructions: of all of it.
        loads: bits of loads from global memory, to how many instructions load as many.
        wide: loads of 64 bits or more in the loop over the slots; 0 without such a loop.
        ahead: as many of them stand before the first instruction that needs what one of them brings.
    """

    kernel: str
    warps: int
    registers: int
    spills: int
    shared: int
    instructions: int
    loads: dict[int, int]
    wide: int
    ahead: int


def machine_code(call: Call, architecture: int) -> list[Code]:
    """Compile what a call launches.

    Args:
        call: its shapes.
        architecture: one of `ARCHITECTURES`, or another that this Triton knows.

    Returns:
        The kernels in the order of their launches.

    Raises:
        ArkvError: Triton is not installed.
    """
    try:
        from arkv.attention.triton_kernels import launches_of
    except ImportError:
        raise ArkvError(
            "kernels are compiled by Triton, and it is not installed: pip install triton"
        ) from None

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    # So many rows that none of the numbers of a launch is one, which would be compiled apart.
    rows, slots = 256, call.kv_heads * call.capacity
    tokens = () if call.tokens is None else (call.tokens,)
    query = empty(rows, *tokens, call.heads, call.head_dim, dtype=call.dtype)
    width = stored_width(call.stored, call.head_dim)
    keys, values = (empty(rows, slots, width, dtype=call.stored) for _ in range(2))
    beside = scale_shape(call.stored, call.head_dim)
    key_scale, value_scale = (
        None if beside is None else empty(rows, slots, *beside[1], dtype=beside[0]) for _ in range(2)
    )
    mass, scores = (
        empty(rows, *tokens, slots) if name in call.needs else None for name in ("mass", "scores")
    )
    blocks = None
    if call.unequal:
        count = slots // BLOCK + call.kv_heads
        slot = empty(1, count * BLOCK, dtype=torch.int64)
        blocks = Blocks(slot, slot.bool(), empty(1, count, dtype=torch.int64))
    visible = empty(rows, *tokens, slots, dtype=torch.bool)
    _, launches = launches_of(
        query, keys, values, visible, blocks, call.kv_heads, mass, scores, key_scale, value_scale
    )
    return compiled(launches, architecture)


def compiled(launches: Iterable[Launch], architecture: int) -> list[Code]:
    """The machine code of launches whose tensors are on the meta device, in order.

    Args:
        launches: of kernels of Triton's.
        architecture: as for `machine_code`.
    """
    with _without_device(architecture):
        kernels = [
            launch.kernel.warmup(**launch.arguments, **launch.options, grid=launch.grid)
            for launch in launches
        ]
    return [_inspected(kernel) for kernel in kernels]


def calls_for(spec: ModelSpec) -> list[Call]:
    """What a model asks of the kernels in bfloat16 and in every storage of few bits that fits.

    A full cache; a sixth of it under a policy that looks; and under one that has unequal heads besides; the
    two of a sixth for a window of tokens, too.
    """
    heads = spec.heads, spec.kv_heads, spec.head_dim
    least = min(spec.max_condition, CAPTION) + spec.grid.line
    full, sixth = least + spec.grid.tokens, least + spec.grid.tokens // 6
    looks = frozenset({"mass"})
    return [
        Call(*heads, capacity, torch.bfloat16, stored, needs, unequal, tokens)
        for stored in (torch.bfloat16, *KV_DTYPES.values())
        if can_store(stored, spec.head_dim)
        for capacity, needs, unequal, tokens in (
            (full, frozenset(), False, None),
            (sixth, looks, False, None),
            (sixth, looks, True, None),
            (sixth, looks, False, WINDOW),
            (sixth, looks, True, WINDOW),
        )
    ]


def table(calls: Iterable[Call]) -> Iterator[str]:
    """Lines of a table in Markdown, a kernel each; calls whose code is the same are compiled once."""
    columns = [f"sm_{architecture}" for architecture in ARCHITECTURES]
    yield "| tokens | queries a key head | head_dim | stored | heads | kernel | warps | " + (
        " | ".join(columns) + " |"
    )
    yield "|---|---|---|---|---|---|---|" + "---|" * len(columns)
    done = set()
    for call in calls:
        group = call.heads // call.kv_heads
        codes = [
            machine_code(call, architecture) for architecture in ARCHITECTURES if runs_on(call, architecture)
        ]
        absent = [""] * (len(ARCHITECTURES) - len(codes))
        for versions in zip(*codes, strict=True):
            kernel = versions[0].kernel
            stored = str(call.stored).removeprefix("torch.")
            line = (
                f"| {call.tokens or 1} | {group} | {call.head_dim} | {stored} "
                f"| {'unequal' if call.unequal else 'equal'} | `{kernel}`"
                f"{', mass' if 'mass' in call.needs else ''} | {versions[0].warps} | "
                + " | ".join([*absent, *map(_cell, versions)])
                + " |"
            )
            if line not in done:
                done.add(line)
                yield line


def runs_on(call: Call, architecture: int) -> bool:
    """Whether Triton compiles the call for an architecture."""
    return architecture >= FLOAT8_FROM or call.stored != torch.float8_e4m3fn


def _cell(code: Code) -> str:
    """Registers, spills if there are any, and the loads of a tile."""
    spills = f", {code.spills} spills" if code.spills else ""
    width = max((bits for bits, count in code.loads.items() if count >= SOME), default=0)
    ahead = f", {code.ahead} of {code.wide} loads ahead, {width} bits" if code.wide else ""
    return f"{code.registers}{spills}{ahead}"


@contextmanager
def _without_device(architecture: int) -> Iterator[None]:
    """Let Triton compile for a GPU that is not there."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class NoDevice:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", architecture, 32)

        def get_current_device(self) -> str:
            return f"sm_{architecture}"  # the key of a cache, which no real device has

        def get_current_stream(self, device: str) -> int:
            return 0

    before = driver._active
    driver.set_active(NoDevice())
    try:
        yield
    finally:
        driver._active = before


def _inspected(kernel: object) -> Code:
    """What the disassembler says about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])  # type: ignore[attr-defined]
        file.flush()
        resources = _disassembled("--dump-resource-usage", file.name)
        listing = _disassembled("-sass", file.name)
    found = re.search(r"REG:(\d+)", resources)
    assert found is not None, resources
    # "/*0a50*/  @!P6 BRA 0xb90 ;" after its address: a predicate, an operation and what it is about.
    lines = [
        Instruction(int(address, 16), operation, operands)
        for address, operation, operands in re.findall(
            r"^\s+/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", listing, re.M
        )
    ]
    loads: dict[int, int] = {}
    for line in lines:
        if line.bits:
            loads[line.bits] = loads.get(line.bits, 0) + 1
    wide, ahead = _ahead(_loop(lines))
    metadata = kernel.metadata  # type: ignore[attr-defined]
    return Code(
        kernel=metadata.name,
        warps=metadata.num_warps,
        registers=int(found[1]),
        spills=sum(line.operation.startswith(("LDL", "STL")) for line in lines),
        shared=metadata.shared,
        instructions=len(lines),
        loads=dict(sorted(loads.items(), reverse=True)),
        wide=wide,
        ahead=ahead,
    )


class Instruction(NamedTuple):
    """One line of a listing: where it stands, what it does, and with what."""

    address: int
    operation: str
    operands: str

    @property
    def bits(self) -> int:
        """That each thread loads from global memory, as LDG.E.128 does."""
        name, *parts = self.operation.split(".")
        sizes = [int(part.lstrip("US")) for part in parts if part in WIDTHS]
        return (sizes or [32])[0] if name in ("LDG", "LDGSTS") else 0

    @property
    def back_to(self) -> int | None:
        """The address before its own that it jumps to, if it does."""
        target = re.search(r"0x([0-9a-f]+)\s*$", self.operands)
        if not self.operation.startswith("BRA") or target is None or int(target[1], 16) >= self.address:
            return None
        return int(target[1], 16)


def _loop(lines: list[Instruction]) -> list[Instruction]:
    """The shortest loop with some wide loads in it: that over the slots."""
    loops = [
        [line for line in lines if end.back_to <= line.address <= end.address]
        for end in lines
        if end.back_to is not None
    ]
    reading = [loop for loop in loops if sum(line.bits >= WIDE for line in loop) >= SOME]
    return min(reading, key=len, default=[])


def _ahead(loop: list[Instruction]) -> tuple[int, int]:
    """The wide loads of a loop, and those that stand before the first use of one."""
    coming: set[int] = set()
    ahead = 0
    for line in loop:
        registers = [int(number) for number in re.findall(r"\bR(\d+)", line.operands)]
        if line.bits >= WIDE:
            ahead += 1
            coming.update(range(registers[0], registers[0] + line.bits // 32))
        elif coming.intersection(registers):
            break
    return sum(line.bits >= WIDE for line in loop), ahead


def _disassembled(option: str, file: str) -> str:
    """What cuobjdump says; it comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
