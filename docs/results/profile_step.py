"""Where the time of a step goes: prints the table of docs/results/speed.md.

python docs/results/profile_step.py --policy linear:ratio=1/6 --batch-size 32 --compile inductor
"""

import argparse

import torch
from torch.profiler import ProfilerActivity, profile

import arkv
from arkv.speed.engine import PolicyEngine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="janus-pro-1b")
    parser.add_argument("--policy", default="linear:ratio=1/6")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--compile", default="none", choices=("none", "inductor"))
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    model = arkv.load_model(asked.model, random_weights=True, dtype="bfloat16", device=asked.device)
    engine = PolicyEngine(model, arkv.load_policy(asked.policy), asked.compile, guided=True)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if asked.device != "cpu" else [])]
    line = model.spec.grid.line
    middle = model.spec.grid.rows // 2 * line
    with torch.inference_mode():
        condition = model.condition(model.example_prompts(asked.batch_size, seed=0), guided=True)
        engine.begin(condition)
        tokens = torch.zeros(len(condition.mask), dtype=torch.long, device=model.device)
        engine.skip(middle)
        for position in range(middle, middle + line):  # compiles
            engine.advance(tokens, position)
        with profile(activities=activities) as seen:
            for position in range(middle + line, middle + 2 * line):
                engine.advance(tokens, position)
    events = seen.key_averages()

    def spent(event: object) -> float:
        return event.self_cpu_time_total if asked.device == "cpu" else event.self_device_time_total

    total = sum(map(spent, events))
    print(f"{asked.model}, {asked.policy}, {2 * asked.batch_size} rows, {asked.compile}, {asked.device}:")
    print(f"{total / line / 1e3:.1f} ms a step, in the middle of a picture")
    for event in sorted(events, key=spent, reverse=True)[:12]:
        print(f"{spent(event) / total:6.1%} {event.count / line:7.1f} a step  {event.key[:70]}")


if __name__ == "__main__":
    main()
