"""Scores `front` beside LineAR and the full cache at equal bytes, and without each of its parts.

python docs/results/front.py --out docs/results/front.jsonl

500 prompts that it was not tuned on. Rows that the file has are not run again. `make results` prints the
tables.
"""

import argparse

from arkv.cli import main

SEED = 2026
"""`front` was tuned on pictures of seed 777."""
TWELFTH, TWENTY_FOURTH = "front:budget=118", "front:budget=38"
"""Of the full cache's bytes in bfloat16, when stored in four bits."""
FEWEST = "front:budget=32"
"""With how few it was seen to draw as well while it was tuned (`front_limits.py`)."""
WITHOUT = {
    "windows": f"{TWENTY_FOURTH},tau=0.0",
    "a line of newest tokens": f"{TWENTY_FOURTH},recent=0",
    "what the last line looked at": f"{TWENTY_FOURTH},recent=34",  # all that a ranked head has room for
}
"""A part of it, and the policy without that part in as many slots."""
LINEAR_BESIDE = {
    TWELFTH: "linear:budget=118",
    TWENTY_FOURTH: "linear:budget=38",
    FEWEST: "linear:budget=32",
}
"""LineAR in as many slots."""
RUNS = (
    ("own", ("full",)),
    ("int4", (*LINEAR_BESIDE, *LINEAR_BESIDE.values(), *WITHOUT.values())),
    ("int8", (TWENTY_FOURTH,)),
    ("own", (TWENTY_FOURTH,)),
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--prompts", default="500")
    given = parser.parse_args()
    shared = ["--seed", str(SEED), "--prompts", given.prompts, "--batch-size", "125", "--out", given.out]
    shared += ["--dtype", "bfloat16", "--compile", "inductor"]
    for kv_dtype, policies in RUNS:
        main(["eval", "--policies", ",".join(policies), "--kv-dtypes", kv_dtype, *shared])
