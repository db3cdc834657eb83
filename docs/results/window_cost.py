"""Measures what a pass of a window costs by what a pass of one token does, with random weights.

python docs/results/window_cost.py --device cuda --compile cudagraphs
python docs/results/window_cost.py --models scenes --dtype float32 --compile none --windows 1,4 --pictures 1

With random weights no draft is right, so every pass brings one token, and a line takes as many passes as it
has tokens. What is done at the ends of lines is in the time. Adds to docs/results/window-cost.jsonl.
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

import arkv
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.machine.description import describe_run
from arkv.machine.instruments import Clock

FILE = Path(__file__).parent / "window-cost.jsonl"
MODELS = "janus-pro-1b,llamagen-xl-384,lumina-mgpt-7b-768"
WARM = 3
"""Lines that are not counted: they compile and capture."""


@torch.inference_mode()
def seconds_of_a_pass(
    model: arkv.Model, policy: str, pictures: int, window: int, compile: Any, lines: int
) -> float:
    """The median over some lines."""
    guidance = model.spec.guidance
    condition = model.condition(model.example_prompts(pictures, 0), guidance != 1)
    loop = Loop(model, arkv.load_policy(policy), *condition.mask.shape, compile, guidance != 1)
    clock, passes = Clock(model.device), []
    sampling = Sampling(guidance, top_k=model.spec.top_k or None)
    for line in loop.sample_(condition, seed_keys(range(pictures)), sampling, window):
        clock.mark()
        passes.append(loop.passes)
        if line == WARM + lines:
            break
    counts = [after - before for before, after in pairwise(passes)]
    times = zip(clock.seconds(), counts, strict=True)
    return median([seconds / count for seconds, count in times if count][WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--policies", default="full,linear:ratio=1/6")
    parser.add_argument("--windows", default="1,2,4,8,16")
    parser.add_argument("--pictures", default="1,4")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", default="inductor")
    parser.add_argument("--lines", type=int, default=4)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    windows = [int(window) for window in given.windows.split(",")]
    print(
        "|", " | ".join(["model", "policy", "pictures", "ms, one token", *(f"{w}" for w in windows[1:])]), "|"
    )
    print("|---|---|--:|--:|", "--:|" * (len(windows) - 1), sep="")
    rows: list[dict[str, Any]] = []
    for name in given.models.split(","):
        random = {} if name == "scenes" else {"random_weights": True}
        model = arkv.load_model(name, dtype=given.dtype, device=given.device, **random)
        rows.append({"run": describe_run(model, 0, None) | {"compile": given.compile}})
        for policy in given.policies.split(","):
            for pictures in map(int, given.pictures.split(",")):
                seconds = {
                    window: seconds_of_a_pass(model, policy, pictures, window, given.compile, given.lines)
                    for window in windows
                }
                rows.append({"model": name, "policy": policy, "pictures": pictures, "seconds": seconds})
                first, *others = seconds.values()
                cells = [name, f"`{policy}`", str(pictures), f"{first * 1e3:.2f}"]
                print("|", " | ".join([*cells, *(f"{s / first:.2f}" for s in others)]), "|", flush=True)
    with given.out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
