"""How fast attention over slots is on this CPU: prints the table of docs/results/speed.md.

python docs/results/attention_cpu.py --threads 2

Janus-Pro-1B's heads (16 of 128 numbers) in bfloat16 unless asked otherwise. Gigabytes of keys and values a
second, medians of turns: every contender has one turn, then the next round begins. Memory is written before
it is read, since pages that nobody has touched read as fast as one likes. The layers of a model follow each
other, and so do as many stores here as a model has layers, unless --layers 1 keeps everything in the caches.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from arkv.attention import operators, reference
from arkv.attention.blocks import Blocks, blocks_of
from arkv.attention.quantization import KV_DTYPES, quantize
from arkv.machine.description import describe_machine

MASS = frozenset({"mass"})
COPIED = 2**28
"""Bytes of the memory whose bandwidth is measured, far more than caches hold."""
LEAST = 2**27
"""Bytes of a turn: the first call finds in the caches what the contender before has left there."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", default=["64,150", "64,600", "2,150", "2,600"], help="rows,slots"
    )
    parser.add_argument("--layers", type=int, default=24, help="stores that take turns")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="eight bits, with scales")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path, help="JSON lines, added to")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if not operators.available(torch.device("cpu")):
        raise SystemExit("there is no kernel to measure")
    machine = describe_machine(torch.device("cpu"))
    print(f"{machine['cpu']}, {asked.threads} threads, torch {torch.__version__}")
    print(f"reads {bandwidth(asked.rounds):.1f} GB/s")
    for shape in asked.shapes:
        rows, slots = map(int, shape.split(","))
        rates = measure(contenders(rows, slots, asked), asked.rounds)
        print(f"{rows} rows, {slots} slots:", ", ".join(f"{name} {rate:.1f}" for name, rate in rates.items()))
        if asked.json is not None:
            about = {"kind": "attention", "rows": rows, "slots": slots, "threads": asked.threads}
            about |= {"layers": asked.layers, "dtype": asked.kv_dtype or asked.dtype, "gb_a_second": rates}
            with asked.json.open("a") as file:
                file.write(json.dumps(about) + "\n")


def bandwidth(rounds: int) -> float:
    """Gigabytes a second of a sum over memory that was written before."""
    memory = torch.ones(COPIED // 8, dtype=torch.long)
    return statistics.median(COPIED / seconds(lambda: memory.sum()) for _ in range(rounds)) / 1e9


def seconds(work: Callable[[], object]) -> float:
    """How long one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measure(contenders: dict[str, tuple[Callable[[], object], int]], rounds: int) -> dict[str, float]:
    """Gigabytes a second by contender, each a piece of work and its bytes."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 2):
        for name, (work, _) in contenders.items():
            spent = seconds(work)
            if number >= 2:  # the first compiles
                times[name].append(spent)
    return {name: bytes / statistics.median(times[name]) / 1e9 for name, (_, bytes) in contenders.items()}


def contenders(
    rows: int, slots: int, asked: argparse.Namespace
) -> dict[str, tuple[Callable[[], object], int]]:
    """What attends over the same slots."""
    dtype, kv_heads = getattr(torch, asked.dtype), asked.kv_heads
    query = torch.randn(rows, asked.heads, asked.head_dim, dtype=dtype)
    visible = torch.ones(rows, kv_heads * slots, dtype=torch.bool)
    leaves = [
        tuple(torch.randn(rows, kv_heads * slots, asked.head_dim, dtype=dtype) for _ in range(2))
        for _ in range(asked.layers)
    ]
    scales: list[tuple[Tensor | None, Tensor | None]] = [(None, None)] * asked.layers
    if asked.kv_dtype is not None:
        narrow = [[quantize(leaf, KV_DTYPES[asked.kv_dtype]) for leaf in pair] for pair in leaves]
        leaves = [(key, value) for (key, _), (value, _) in narrow]
        scales = [(key, value) for (_, key), (_, value) in narrow]
    owner = torch.arange(kv_heads).repeat_interleave(slots)[None]
    blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner[None], kv_heads)))
    compiled = torch.compile(reference.slot_attention, dynamic=False)
    mask = visible.unflatten(1, (kv_heads, 1, slots))
    bytes = sum(leaf.nbytes for pair in leaves for leaf in pair)
    passes = max(1, round(LEAST / bytes))

    def over_layers(attend: Callable[..., object]) -> tuple[Callable[[], object], int]:
        @torch.inference_mode()
        def work() -> None:
            for _ in range(passes):
                for pair, scale in zip(leaves, scales, strict=True):
                    attend(*pair, *scale)

        return work, passes * bytes

    def by_kernel(blocks: Blocks | None) -> Callable[..., object]:
        return lambda k, v, ks, vs: operators.slot_attention(
            query, k, v, visible, kv_heads, MASS, ks, vs, blocks=blocks
        )

    def by_sdpa(keys: Tensor, values: Tensor, *_: object) -> Tensor:
        k, v = (leaf.unflatten(1, (kv_heads, slots)) for leaf in (keys, values))
        return scaled_dot_product_attention(query[:, :, None], k, v, mask, enable_gqa=asked.heads > kv_heads)

    found = {
        "kernel": over_layers(by_kernel(None)),
        "kernel, unequal heads": over_layers(by_kernel(blocks)),
        "compiled expression": over_layers(
            lambda k, v, ks, vs: compiled(query, k, v, visible, kv_heads, MASS, ks, vs)
        ),
    }
    return found | ({"sdpa, no mass": over_layers(by_sdpa)} if asked.kv_dtype is None else {})


if __name__ == "__main__":
    main()
