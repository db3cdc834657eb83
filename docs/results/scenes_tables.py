"""Prints the tables of the page on policies from what `arkv eval` has written.

python docs/results/scenes_tables.py docs/results/scenes.jsonl
"""

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from arkv.jobs.journal import read_journal
from arkv.study.evaluation import Accuracy, Evaluation

CLOSELY = "1/6"
"""The ratio that groups of prompts are shown for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    _, lines, _ = read_journal(parser.parse_args().file)
    rows = {policy: Evaluation.from_dict(line) for policy, line in lines.items()}
    full = rows.pop("full")
    found: dict[str, dict[str, Evaluation]] = {}
    for policy, row in rows.items():
        (ratio,) = re.findall(r"ratio=([0-9/]+)", policy)
        found.setdefault(row.name, {})[ratio] = row
    ratios = sorted({ratio for cells in found.values() for ratio in cells}, key=Fraction, reverse=True)
    found = dict(sorted(found.items(), key=lambda item: -share(item[1][CLOSELY])))

    def table(cell: Callable[[Evaluation], str], first: str) -> None:
        print("| policy |", " | ".join(ratios), "|\n" + "|---" * (1 + len(ratios)) + "|")
        print(f"| `full`, all tokens | {first} |" + " |" * (len(ratios) - 1))
        for name, cells in found.items():
            print(f"| `{name}` |", " | ".join(cell(cells[r]) if r in cells else "" for r in ratios), "|")
        print()

    print("Right, with the 95% interval:\n")
    table(lambda row: right(row.accuracy), right(full.accuracy))
    print("Attention lost, and KL divergence in nats:\n")
    table(
        lambda row: f"{row.attention_lost:.1%}, {row.kl:.1g}" if row.kl is not None else refused(row), "0, 0"
    )
    print(f"Right by group of prompts, the likeliest token kept, KV of a batch, at {CLOSELY}:\n")
    print("| policy |", " | ".join(each.replace("_", " ") for each in full.groups), "| top 1 | KV |")
    print("|---" * (3 + len(full.groups)) + "|")
    for name, row in {"full": full, **{name: cells[CLOSELY] for name, cells in found.items()}}.items():
        shares = " | ".join(f"{group.share:.0%}" for group in row.groups.values())
        print(f"| `{name}` | {shares} | {row.top1_agreement:.1%} | {row.kv_bytes / 1e6:.0f} MB |")


def share(row: Evaluation) -> float:
    """The share of pictures that are right; less than any of them if the policy refuses."""
    return -1.0 if row.accuracy is None else row.accuracy.share


def right(accuracy: Accuracy | None) -> str:
    """A share and its interval in percent."""
    if accuracy is None:
        return "refused"
    # The space is one that does not break: in a narrow cell an interval stays in one piece.
    return f"{accuracy.share:.1%} [{100 * accuracy.low:.0f},\N{NO-BREAK SPACE}{100 * accuracy.high:.0f}]"


def refused(row: Evaluation) -> str:
    """What stands where there is nothing."""
    return "refused" if row.error else ""


if __name__ == "__main__":
    main()
