"""Prints the table of the page on kernels: what they become for GPUs, compiled without one.

python docs/results/kernels.py

Takes some minutes. Needs Triton, which comes with `pip install arkv[test]` and with torch for CUDA.
"""

from dataclasses import replace

import arkv
from arkv.registry import names
from arkv.speed.machine_code import calls_for, table


def main() -> None:
    shapes = {}
    for entry in names("model"):
        drawn = entry.name != "scenes"  # whose tables cannot be drawn, but come with the package
        spec = arkv.load_model(
            entry.name, **({"device": "meta", "random_weights": True} if drawn else {})
        ).spec
        shapes.setdefault((spec.heads // spec.kv_heads, spec.head_dim), spec)
    # Larger models share a key head among four and among eight query heads.
    for group in (4, 8):
        shapes[group, 128] = replace(shapes[1, 128], kv_heads=shapes[1, 128].heads // group)
    for line in table(call for spec in shapes.values() for call in calls_for(spec)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
