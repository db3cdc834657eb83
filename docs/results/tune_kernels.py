"""Measures sizes of the attention kernels on the GPU at hand and prints a table for `tunables`.

python docs/results/tune_kernels.py --rows 256

Run it before anything is captured in a graph; nothing is measured while a model draws.
"""

import argparse
import itertools
from collections.abc import Iterator
from math import inf

import torch

from arkv.attention.blocks import Blocks, blocks_of
from arkv.attention.triton_kernels import attend
from arkv.attention.tunables import TABLE, Shape, Tuning

SLOTS = (144, 600)
"""Slots of a head that sizes are tried with: a small cache, and the full one of a small picture."""
WINDOW = 16
RUNS = 20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch (default: 256)")
    parser.add_argument("--window-rows", type=int, default=8, help="the same, of windows (default: 8)")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU here, and that is what sizes are measured on")
    name = torch.cuda.get_device_name()
    print(f"# {name}, {given.rows} rows, of windows {given.window_rows}, torch {torch.__version__}")
    print("TABLE: dict[Shape, Tuning] = {")
    for shape, present in TABLE.items():
        if shape.key_bytes < 512:  # which only float32 has
            rows = given.window_rows if shape.window else given.rows
            print(f"    {shape}: {best(shape, present, rows)},", flush=True)
    print("}")


def best(shape: Shape, present: Tuning, rows: int) -> Tuning:
    """The quickest sizes: what there is stays, unless others are quicker by more than a hundredth."""
    chosen, least = present, seconds(shape, present, rows) * 0.99
    for tuning in around(present):
        taken = seconds(shape, tuning, rows)
        if taken < least:
            chosen, least = tuning, taken
    return chosen


def around(present: Tuning) -> Iterator[Tuning]:
    """Sizes like those that there are."""
    tiles = {max(present.tile // 2, 8), present.tile, present.tile * 2}
    for tile, threads, warps, part in itertools.product(
        sorted(tiles), (4, 8, 16), (1, 2, 4), (64, 128, 256, 512)
    ):
        yield Tuning(tile, threads, warps, present.stages, part)


def seconds(shape: Shape, tuning: Tuning, rows: int) -> float:
    """For one call at each of `SLOTS`, together; infinite where the sizes cannot be compiled."""
    try:
        return sum(call_seconds(shape, tuning, rows, capacity) for capacity in SLOTS)
    except Exception as error:  # Triton has many, for too many registers or too little shared memory
        print(f"# {shape} {tuning}: {type(error).__name__}")
        return inf


def call_seconds(shape: Shape, tuning: Tuning, rows: int, capacity: int) -> float:
    """Mean of some calls after a first one, which compiles."""
    narrow = shape.key_bytes == 64
    head_dim = 64 if narrow else shape.key_bytes // 2
    heads, slots = 16, 16 * capacity
    stored = torch.int8 if narrow else torch.bfloat16

    def room(*size: int) -> torch.Tensor:
        return torch.rand(size, device="cuda")

    tokens = (WINDOW,) if shape.window else ()
    query = room(rows, *tokens, heads * (4 if shape.grouped else 1), head_dim).bfloat16()
    keys, values = ((room(rows, slots, head_dim) * 100).to(stored) for _ in range(2))
    scales = [room(rows, slots) if narrow else None for _ in range(2)]
    visible = torch.ones(rows, *tokens, slots, dtype=torch.bool, device="cuda")
    blocks = None
    if shape.unequal:
        owner = torch.arange(slots, device="cuda")[None, None] // capacity
        blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner, heads)))
    mass = room(rows, *tokens, slots)

    def call() -> None:
        attend(query, keys, values, visible, blocks, heads, mass, None, *scales, tuning)

    call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(RUNS):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / RUNS


if __name__ == "__main__":
    main()
