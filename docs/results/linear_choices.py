"""Scores what LineAR's paper leaves open: how many anchors, how many recent lines, which score.

python docs/results/linear_choices.py --out docs/results/linear.jsonl
python docs/results/linear_choices.py --out docs/results/linear.jsonl --ratios 1/8

Rows that the file has are not run again. `make results` prints the tables.
"""

import argparse
from itertools import product

from arkv.cli import main

LINE = 24
ANCHORS = (0, 4, LINE)
RECENT = (LINE, 2 * LINE, 3 * LINE)
SCORING = ("softmax", "raw")
RATIOS = ("1/6",)


def choices() -> list[str]:
    """LineAR in every combination."""
    return [
        f"linear:anchors={anchors},recent={recent},scoring={scoring}"
        for scoring, recent, anchors in product(SCORING, RECENT, ANCHORS)
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--prompts", default="60")
    parser.add_argument("--ratios", default=",".join(RATIOS))
    given = parser.parse_args()
    prompts = ["--prompts", given.prompts, "--forced-prompts", "0", "--batch-size", "60"]
    policies = ["--policies", ",".join(["full", *choices()]), "--ratios", given.ratios]
    main(["eval", *policies, *prompts, "--dtype", "bfloat16", "--compile", "inductor", "--out", given.out])
