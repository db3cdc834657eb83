"""Asks a GPU everything that only a GPU can answer, and writes docs/results/gpu.md from the answers.

python docs/results/gpu [--step N] [--out runs/gpu] [--dry]

Parts that are done are not done again: a run that was cut goes on where it was. Nothing is installed: this
tree's arkv is linked together under the output folder. `--dry` does all on a CPU, with tiny models.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from layout import ROOT, lay_out, missing
from page import page
from steps import DRY, GPU, LONGEST, STEPS, Part, Step

HERE = Path(__file__).resolve().parent
PAGE = ROOT / "docs/results/gpu.md"


def main() -> int:
    asked = _parser().parse_args()
    if absent := missing():
        sys.exit(f"{sys.executable} has no {', '.join(absent)}: install them, or say make PYTHON=...")
    if not asked.dry:
        import torch

        if not torch.cuda.is_available():
            sys.exit("torch finds no GPU here: make gpu-dry does all of it on the CPU, with tiny models")
    out = (asked.out or ROOT / ("runs/gpu-dry" if asked.dry else "runs/gpu")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    # What is measured is this tree, whatever else is installed.
    path = os.pathsep.join(filter(None, [str(lay_out(out / "path")), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path}
    if asked.dry:
        environment["ARKV_GPU_TESTS"] = "dry"
    failed, target = [], out / "gpu.md" if asked.dry else PAGE
    for number, step in enumerate(STEPS, 1):
        if asked.step in (None, number):
            failed += _run_step(number, step, out, environment, asked.dry)
            target.write_text(page(out, STEPS))  # at every step: the machine may be gone at the next
    print(f"written: {target}")
    if failed:
        print(f"failed: {', '.join(failed)}; their logs are in {out}")
    return min(len(failed), 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--step", type=int, choices=range(1, len(STEPS) + 1), help="this one only")
    parser.add_argument("--out", type=Path, help="where rows and logs go (default: runs/gpu)")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny models")
    return parser


def _run_step(number: int, step: Step, out: Path, environment: dict[str, str], dry: bool) -> list[str]:
    """The names of the parts that failed."""
    expected = "" if dry else f" ({step.seconds / 60:.1f} minutes)"
    print(f"\n== {number}. {step.question}{expected}", flush=True)
    failed, begun = [], time.monotonic()
    for part in step.parts:
        done = out / f"{part.name}.done"
        if done.exists():
            print(f"-- {part.name}: done before", flush=True)
            continue
        left = LONGEST - (time.monotonic() - begun)
        if left <= 0 and not dry:
            print(f"-- {part.name}: no time is left in this step; run it again", flush=True)
            failed.append(part.name)
            continue
        # A CPU may be shared with anything; what is too slow there is seen by who waits for it.
        seconds = _run_part(part, out, environment, dry, None if dry else min(left, 2 * part.seconds))
        if seconds is None:
            failed.append(part.name)
        else:
            done.write_text(json.dumps({"seconds": seconds}))
    return failed


def _run_part(
    part: Part, out: Path, environment: dict[str, str], dry: bool, limit: float | None
) -> float | None:
    """Seconds, or None if it failed; what it printed is in its log."""
    words = {**(DRY if dry else GPU), "json": str(out / f"{part.name}.jsonl")}
    command = shlex.split(part.command.format(**words))
    log = out / f"{part.name}.log"
    print(f"-- {part.name}: {'' if dry else f'about {part.seconds} s: '}{shlex.join(command)}", flush=True)
    begun = time.monotonic()
    with log.open("a") as file:
        try:
            code = subprocess.run(
                [sys.executable, str(HERE / "part.py"), *(["--shrunk"] if dry else []), *command],
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit,
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
    seconds = time.monotonic() - begun
    print(f"   {'done' if code == 0 else f'FAILED ({code})'} in {seconds:.0f} s", flush=True)
    if code == 0:
        return seconds
    print("\n".join(f"   | {line}" for line in log.read_text().splitlines()[-15:]), flush=True)
    return None


if __name__ == "__main__":
    sys.exit(main())
