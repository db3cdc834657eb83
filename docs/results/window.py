"""Counts the passes of windows on `scenes`, and compares every token with those of one a pass.

python docs/results/window.py --prompts 500           draws, and writes docs/results/window.jsonl
python docs/results/window.py --prompts 0             prints the table of what was drawn

In float32, eagerly: passes are the same on every machine, and nothing is measured in seconds. What the file
has already is not drawn again, so the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import arkv
from arkv.machine.description import describe_run

FILE = Path(__file__).parent / "window.jsonl"
TOGETHER = 8
"""Pictures of a batch, and of a line of the file."""


def measured(
    policies: list[str], windows: list[int], prompts: int, done: set[tuple[str, int, int]]
) -> Iterator[dict[str, Any]]:
    """Draw what is not done yet, some prompts at a time: alone, and as one batch."""
    model = arkv.load_model("scenes", dtype="float32")
    texts = model.example_prompts(max(1, prompts), seed=0)
    if not done:
        yield {"run": describe_run(model, 0, None)}

    @lru_cache(maxsize=1)
    def one_a_pass(policy: str, first: int) -> torch.Tensor:
        decoder = arkv.Decoder(model, policy)
        batch = range(first, min(first + TOGETHER, prompts))
        return decoder.generate([texts[i] for i in batch], seeds=batch, window=1, pixels=False).tokens

    for first in range(0, prompts, TOGETHER):
        for policy in policies:
            for window in windows:
                if (policy, window, first) in done:
                    continue
                expected = one_a_pass(policy, first)
                decoder = arkv.Decoder(model, policy)
                seeds = range(first, first + len(expected))
                alone = [decoder.generate([texts[i]], seeds=[i], window=window, pixels=False) for i in seeds]
                batch = decoder.generate([texts[i] for i in seeds], seeds=seeds, window=window, pixels=False)
                yield {
                    "policy": policy,
                    "window": window,
                    "first": first,
                    "pictures": len(expected),
                    "steps": expected.shape[1],
                    "alone": [each.stats.passes for each in alone],
                    "batch": batch.stats.passes,
                    "different": sum(
                        int((tokens != other).sum())
                        for each, tokens, other in zip(alone, expected, batch.tokens, strict=True)
                        for other in (each.tokens[0], other)
                    ),
                }


def tabulate(rows: list[dict[str, Any]]) -> None:
    """Print what was drawn, by policy and window."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["policy"], row["window"]].append(row)
    table = []
    for (policy, window), group in sorted(groups.items()):
        alone = [passes for row in group for passes in row["alone"]]
        steps, full = group[0]["steps"], [row for row in group if row["pictures"] == TOGETHER]
        batch = [row["batch"] for row in full]
        table.append(
            (
                f"`{policy}`",
                str(window),
                str(len(alone)),
                f"{sum(alone) / len(alone):.0f} ({min(alone)} to {max(alone)})",
                f"{steps * len(alone) / sum(alone):.2f}",
                f"{steps * len(batch) / sum(batch):.2f}" if batch else "",
                str(sum(row["different"] for row in group)),
            )
        )
    header = (
        *("policy", "window", "pictures", "passes of a picture", "tokens a pass"),
        *(f"tokens a pass, {TOGETHER} at a time", "tokens that differ"),
    )
    for cells in (header, ("---", *["--:"] * (len(header) - 1)), *table):
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500)
    parser.add_argument("--policies", default="full,linear:ratio=1/6,streaming:ratio=1/6,h2o:ratio=1/6")
    parser.add_argument("--windows", default="8,16,32")
    parser.add_argument("--out", type=Path, default=FILE)
    given = parser.parse_args()
    lines = given.out.read_text().splitlines() if given.out.exists() else []
    rows = [row for row in map(json.loads, lines) if "policy" in row]
    done = {(row["policy"], row["window"], row["first"]) for row in rows}
    windows = [int(window) for window in given.windows.split(",")]
    for row in measured(given.policies.split(","), windows, given.prompts, done):
        with given.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        rows += [row] if "policy" in row else []
    tabulate(rows)


if __name__ == "__main__":
    main()
