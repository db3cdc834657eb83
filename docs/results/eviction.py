"""What an eviction takes, up to 9,312 tokens: a table of docs/results/speed.md.

python docs/results/eviction.py

The stores are those of whole models; no weights are needed. Slots are given up and claimed as up to the
middle of a picture, with random keys, values and statistics, and then the evictions of seven lines are timed:
what a policy selects in all layers, and what is made free. Medians, in milliseconds.
"""

from __future__ import annotations

import argparse
from statistics import median

import torch

import arkv
from arkv.decoding.compiling import compiled
from arkv.decoding.step import recycle_
from arkv.machine.instruments import Clock
from arkv.store import Store

WARM, LINES, CONDITION = 2, 7, 64
MODES = ("none", "inductor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default="janus-pro-1b,emu3-gen,lumina-mgpt-2")
    parser.add_argument("--policies", default="linear,headkv,rkv")
    parser.add_argument("--ratio", default="1/8")
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--device", default="cpu", type=torch.device)
    asked = parser.parse_args()
    print("| model | tokens | policy | slots of a head | eager | compiled |")
    print("|---|--:|---|--:|--:|--:|")
    with torch.inference_mode():
        for name in asked.models.split(","):
            spec = arkv.load_model(name, random_weights=True, device="meta").spec
            for text in asked.policies.split(","):
                policy = arkv.load_policy(text, ratio=asked.ratio)
                slots = policy.plan(spec.grid, spec).budgets(spec)[0][0]
                found = [
                    1e3 * seconds(spec, policy, 2 * asked.pictures, mode, asked.device) for mode in MODES
                ]
                told = " | ".join(f"{each:.1f}" for each in found)
                print(f"| {name} | {spec.grid.tokens:,} | `{text}` | {slots:,} | {told} |", flush=True)


def seconds(
    spec: arkv.ModelSpec, policy: arkv.CachePolicy, rows: int, mode: str, device: torch.device
) -> float:
    """Of an eviction from all layers, in the middle of a picture."""
    torch._dynamo.reset()
    plan = policy.plan(spec.grid, spec)
    store = Store(
        spec, plan, rows, CONDITION, policy.fields, torch.bfloat16, device, policy.head_fields, guided=True
    )
    store.reset_(torch.ones(rows, CONDITION, dtype=torch.bool, device=device))
    policy.begin(store)
    for leaf in (*store.keys, *store.values, *(store[name] for name in policy.fields)):
        if leaf.is_floating_point():
            leaf.uniform_()
    recycle, clock = compiled(recycle_, mode), Clock(device)
    middle = spec.grid.rows // 2 * spec.grid.line // plan.period * plan.period
    taken = []
    for start in range(0, middle + (WARM + LINES) * plan.period, plan.period):
        step = torch.tensor(start, device=device)
        evict = recycle_ if start < middle else recycle
        clock.mark()
        slots = evict(policy, store, step)
        clock.mark()
        taken.append(start >= middle + WARM * plan.period)
        for offset in range(plan.period):
            store.claim_(slots[..., offset], step + offset)
    times = clock.seconds()[::2]
    return median(each for each, counts in zip(times, taken, strict=True) if counts)


if __name__ == "__main__":
    main()
