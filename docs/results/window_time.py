"""Measures pictures of `scenes` with windows and without, in turns: a table of docs/guide/window.md.

python docs/results/window_time.py --pictures 1,64
python docs/results/window_time.py --pictures 8 --window 4

Seconds of a whole batch, tokens only; what is compiled is compiled before. Every contender has one turn, then
the next round begins. Adds to docs/results/window-time.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

import arkv
from arkv.machine.description import describe_run

FILE = Path(__file__).parent / "window-time.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--policies", default="full,linear:ratio=1/6")
    parser.add_argument("--pictures", default="1,8,64", help="batches")
    parser.add_argument("--window", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", default="inductor")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    model = arkv.load_model("scenes", dtype=given.dtype, device=given.device)
    rows: list[dict[str, Any]] = [
        {"run": describe_run(model, 0, None) | {"dtype": given.dtype, "compile": given.compile}}
    ]
    window = int(given.window) if given.window.isdecimal() else given.window
    print("| policy | pictures | window | s, one token a pass | s | times as fast | tokens a pass |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for policy in given.policies.split(","):
        for pictures in map(int, given.pictures.split(",")):
            row = {"policy": policy, "pictures": pictures, "window": window} | in_turns(
                arkv.Decoder(model, policy, compile=given.compile), pictures, window, given.rounds
            )
            rows.append(row)
            alone, several = median(row["one"]), median(row["several"])
            ratio = median(one / many for one, many in zip(row["one"], row["several"], strict=True))
            cells = [
                f"`{policy}`",
                str(pictures),
                str(window),
                f"{alone:.2f}",
                f"{several:.2f}",
                f"{ratio:.2f}",
            ]
            print("|", " | ".join([*cells, f"{row['tokens_per_pass']:.2f}"]), "|", flush=True)
    with given.out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def in_turns(decoder: arkv.Decoder, pictures: int, window: Any, rounds: int) -> dict[str, Any]:
    """Seconds of a batch by round, with other prompts in each, and the tokens that a pass brought."""
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    prompts = decoder.model.example_prompts(pictures * (rounds + 1), 0)
    brought = []
    for number in range(rounds + 1):
        seeds = range(number * pictures, (number + 1) * pictures)
        texts = [prompts[i] for i in seeds]
        for name, width in (("one", 1), ("several", window)):
            start = time.perf_counter()
            result = decoder.generate(texts, seeds=seeds, window=width, pixels=False)
            if decoder.model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
        brought.append(result.stats.tokens_per_pass)
    # The first round compiles.
    return {name: taken[1:] for name, taken in seconds.items()} | {"tokens_per_pass": median(brought[1:])}


if __name__ == "__main__":
    main()
