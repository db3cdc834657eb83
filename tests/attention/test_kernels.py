"""The Triton kernels without a GPU: in the interpreter, and as machine code for GPUs that are not there."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arkv
from arkv.attention.blocks import BLOCK
from arkv.attention.quantization import PACKED
from arkv.attention.tunables import TABLE, Shape, Tuning, parts_of, tuning_of
from arkv.speed.machine_code import (
    ARCHITECTURES,
    Call,
    Code,
    calls_for,
    compiled,
    machine_code,
    runs_on,
    table,
)
from arkv.weights.quantization import WeightDtype, codes_shape, scales_shape

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; a CPU build of torch does not bring it"
)
needs_compiler = pytest.mark.skipif(
    find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton, and not its interpreter, which does not compile",
)


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    """All of `kernels_interpreted.py`, in one process."""
    file = Path(__file__).with_name("kernels_interpreted.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)],
        cwd=file.parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (summary,) = re.findall(r"^.*\d+ passed.*$", done.stdout, re.M)
    assert "skipped" not in summary


# Sizes


@given(capacity=st.integers(1, 10_000), part=st.integers(1, 64))
def test_the_slots_of_a_head_are_cut_into_even_parts_of_whole_blocks(capacity: int, part: int) -> None:
    parts, share = parts_of(capacity, Tuning(16, 8, 1, 1, part * BLOCK))
    assert share % BLOCK == 0
    assert share <= part * BLOCK
    assert (parts - 1) * share < capacity <= parts * share
    assert parts >= -(-capacity // (part * BLOCK))
    assert parts == 1 or share < 2 * BLOCK or parts * (share - BLOCK) < capacity


@given(
    group=st.integers(1, 16),
    head_dim=st.integers(1, 512),
    itemsize=st.sampled_from([1, 2, 4]),
    unequal=st.booleans(),
)
def test_every_shape_has_sizes(group: int, head_dim: int, itemsize: int, unequal: bool) -> None:
    found = tuning_of(Shape.of(group, head_dim, itemsize, unequal))
    assert found in TABLE.values()
    assert found.part % BLOCK == 0


# Machine code

MASS = frozenset({"mass"})
JANUS = {"heads": 16, "kv_heads": 16, "head_dim": 128}
HOT = [
    Call(**JANUS, capacity=144, needs=MASS),
    Call(**JANUS, capacity=144, needs=MASS, unequal=True),
    Call(**JANUS, capacity=144, stored=torch.float8_e4m3fn),
    Call(**JANUS, capacity=144, stored=PACKED, needs=MASS),
    Call(heads=20, kv_heads=20, head_dim=64, capacity=600),
]


def ident(call: Call) -> str:
    return f"{call.head_dim}-{str(call.stored).removeprefix('torch.')}-{'un' * call.unequal}equal"


@needs_compiler
@pytest.mark.parametrize("call", HOT, ids=ident)
def test_a_tile_is_on_its_way_before_any_of_it_is_used_and_nothing_spills(call: Call) -> None:
    first, *second = machine_code(call, 90)
    assert first.spills == 0
    assert all(code.spills == 0 for code in second)
    # Sixteen bytes at a time, or the bus is not kept busy.
    packed = call.stored == PACKED  # what stands beside the codes is loaded when they are widened
    assert first.loads[128] >= first.ahead >= 8
    assert packed or first.wide == first.ahead
    # With equal heads of few slots there is nothing to put together.
    assert len(second) == (call.unequal or call.capacity > 256)


@needs_compiler
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.int8], ids=str)
def test_queries_that_share_a_key_head_are_multiplied_without_spills(stored: torch.dtype) -> None:
    call = Call(heads=32, kv_heads=8, head_dim=128, capacity=144, stored=stored, needs=MASS)
    (code,) = machine_code(call, 90)
    assert code.spills == 0
    # Twelve warps of a processor, each with half of its tile under way, are more than the bus can bring.
    assert code.registers <= 168
    assert code.loads[128] >= code.wide > 0


@needs_compiler
def test_a_window_spills_nothing() -> None:
    for code in machine_code(Call(**JANUS, capacity=144, needs=MASS, tokens=16), 90):
        assert code.spills == 0


@needs_compiler
@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != 90])
def test_other_gpus_do_not_spill_either(architecture: int) -> None:
    (code,) = machine_code(HOT[0], architecture)
    assert code.spills == 0
    assert code.wide == code.ahead == 16


@needs_compiler
def test_eight_bits_are_read_by_fewer_instructions_than_bytes() -> None:
    """About as many instructions for a tile as for one of sixteen bits, which has as many bytes."""
    wide, narrow = (
        machine_code(Call(**JANUS, capacity=144, stored=stored), 90)[0]
        for stored in (torch.bfloat16, torch.int8)
    )
    assert narrow.instructions < 2 * wide.instructions


@needs_compiler
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [2, 64])
def test_weights_of_few_bits_are_read_by_wide_loads_without_spills(kind: WeightDtype, rows: int) -> None:
    from arkv.weights.triton_kernels import launch_of

    shape = (4096, 4096, kind)
    codes = torch.empty(
        codes_shape(*shape), dtype=torch.uint8 if kind == "int4" else torch.int8, device="meta"
    )
    scales = torch.empty(scales_shape(*shape), dtype=torch.bfloat16, device="meta")
    _, launch = launch_of(scales.new_empty(rows, 4096), codes, scales)
    (code,) = compiled([launch], 90)
    assert code.spills == 0
    assert code.loads[64 if kind == "int4" else 128] >= 8


def test_a_gpu_that_cannot_convert_float8_is_not_compiled_for() -> None:
    call = Call(**JANUS, capacity=144, stored=torch.float8_e4m3fn)
    assert [runs_on(call, architecture) for architecture in ARCHITECTURES] == [False, True, True]


@pytest.mark.parametrize(("name", "packed"), [("llamagen-3b-256", False), ("janus-pro-1b", True)])
def test_what_a_model_asks_for_is_what_it_can_store(name: str, packed: bool) -> None:
    """Heads of 100 numbers are no whole groups of four bits."""
    spec = arkv.load_model(name, device="meta", random_weights=True).spec
    assert (PACKED in {call.stored for call in calls_for(spec)}) == packed


def test_a_table_has_a_line_for_every_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cells stand under their architecture, and calls of the same code are one line."""

    def compiled(call: Call, architecture: int) -> list[Code]:
        spills = 3 if architecture == 100 else 0
        code = Code("_attend_slots", 4, architecture, spills, 0, 900, {128: 16, 8: 9}, 16, 12)
        return [code, code._replace(kernel="_combine", wide=0, ahead=0)][: 1 + call.unequal]

    monkeypatch.setattr("arkv.speed.machine_code.machine_code", compiled)
    lines = list(table([HOT[0], HOT[0], HOT[1], HOT[2]]))
    assert lines[0].endswith("| sm_80 | sm_90 | sm_100 |")
    assert len({line.count("|") for line in lines}) == 1
    assert len(lines) == 2 + 1 + 2 + 1
    assert lines[2].endswith(
        "| `_attend_slots`, mass | 4 | 80, 12 of 16 loads ahead, 128 bits "
        "| 90, 12 of 16 loads ahead, 128 bits | 100, 3 spills, 12 of 16 loads ahead, 128 bits |"
    )
    assert lines[4].endswith("| `_combine`, mass | 4 | 80 | 90 | 100, 3 spills |")
    assert "| 4 |  | 90, 12" in lines[5]
