"""Where the time of a step goes: prints the table of docs/results/speed.md.

python docs/results/profile_step.py --policy linear:ratio=1/6 --batch-size 32 --compile inductor

On a GPU these are kernels, by the time that they took there; on a CPU operators, by their own time. What is
drawn is drawn in the step, and with cudagraphs the graph of a whole line is replayed, as `generate` does.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import arkv
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.speed.engine import PolicyEngine

PRINTED = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="janus-pro-1b")
    parser.add_argument("--policy", default="linear:ratio=1/6")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--compile", default="none", choices=("none", "inductor", "cudagraphs"))
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--json", type=Path, help="JSON lines, added to: every kernel or operator")
    asked = parser.parse_args()
    random = asked.model != "scenes"  # whose weights come with the package
    model = arkv.load_model(asked.model, random_weights=random, dtype="bfloat16", device=asked.device)
    engine = PolicyEngine(model, arkv.load_policy(asked.policy), asked.compile, guided=True)
    cuda, line = asked.device.type == "cuda", model.spec.grid.line
    middle = model.spec.grid.rows // 2 * line
    with torch.inference_mode():
        condition = model.condition(model.example_prompts(asked.batch_size, seed=0), guided=True)
        keys = seed_keys(range(asked.batch_size)).to(model.device)
        engine.begin(condition, keys, Sampling(model.spec.guidance, top_k=model.spec.top_k or None))
        engine.skip(middle)
        for start in (middle, middle + line):  # compiles, and captures
            engine.decode(range(start, start + line))
        engine.check()  # waits for the device
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as seen:
            engine.decode(range(middle + 2 * line, middle + 3 * line))
            engine.check()
    rows = sorted(times(seen, cuda), reverse=True)
    total = sum(spent for spent, _, _ in rows)
    print(f"{asked.model}, {asked.policy}, {2 * asked.batch_size} rows, {asked.compile}, {asked.device}:")
    print(f"{total / line / 1e3:.1f} ms a step, in the middle of a picture")
    for spent, count, name in rows[:PRINTED]:
        print(f"{spent / total:6.1%} {count / line:7.1f} a step  {name[:70]}")
    if asked.json is not None:
        with asked.json.open("a") as file:
            for spent, count, name in rows:
                row = {
                    "kind": "profile",
                    "name": name,
                    "share": spent / total,
                    "microseconds_a_step": spent / line,
                    "a_step": count / line,
                }
                file.write(json.dumps(row) + "\n")


def times(seen: profile, cuda: bool) -> Iterator[tuple[float, int, str]]:
    """Microseconds, calls and name of what ran.

    On a GPU of kernels alone: the operator that launched a kernel is told to have taken its time once more.
    """
    for event in seen.key_averages():
        if not cuda:
            yield event.self_cpu_time_total, event.count, event.key
        elif event.device_type == DeviceType.CUDA:
            yield event.self_device_time_total, event.count, event.key


if __name__ == "__main__":
    main()
