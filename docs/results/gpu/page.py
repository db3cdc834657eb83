"""docs/results/gpu.md, made from the rows of all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rows import read
from steps import GPU, STEPS, Part, Step

HEAD = """\
# On a GPU

Made by `make gpu` ([what it does](#what-is-asked-and-how)). `make gpu STEP=3` runs one step, `make gpu-dry`
all of them on the CPU with tiny models.

"""
NOTHING = """\
**Nothing has been measured on a GPU so far.** The code for GPUs is tested without one: kernels in Triton's
interpreter, the code that Inductor writes for CUDA by reading it, every command below by `make gpu-dry`. On a
machine with a GPU, PyTorch and the other libraries, nothing has to be installed:

```bash
make gpu PYTHON=python3          # about three quarters of an hour; what is done is not done again
make gpu PYTHON=python3 STEP=1   # a minute and a half: does it work at all?
```

Where the tree has no `.git`, say `ARKV_COMMIT=...` before it, so that results know what was measured.
"""


def page(out: Path, steps: Sequence[Step]) -> str:
    """The page from the rows in a folder."""
    found = {part.name: _read(out / f"{part.name}.jsonl") for step in steps for part in step.parts}
    text = HEAD
    machine = next((row for row in found.get("smoke", []) if row.get("kind") == "machine"), None)
    if machine is None:
        text += NOTHING
    else:
        date, speed = machine["date"][:10], machine["copy_bytes_per_s"] / 1e9
        text += (
            f"{machine['device']}, torch {machine['torch']}, {date}, commit {machine['commit']}; "
            f"a large copy moves {speed:,.0f} GB/s.\n"
        )
        for number, step in enumerate(steps, 1):
            text += f"\n## {number}. {step.question}\n"
            for part in step.parts:
                said = _end_of_log(out, part)
                text += "".join(f"\n{table}" for table in [*said, *_tables(found[part.name])])
    return text + _asked(steps)


def _end_of_log(out: Path, part: Part) -> list[str]:
    """The last line that a part has printed, if it failed or has no rows to show."""
    log, done = out / f"{part.name}.log", (out / f"{part.name}.done").exists()
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    last = next((line.strip(" =") for line in reversed(lines) if line.strip(" =")), "")
    if done:
        return [] if part.writes else [f"`{part.name}`: {last}\n"]
    return [f"**`{part.name}` did not end well**: {last}\n"] if log.exists() else []


def _asked(steps: Sequence[Step]) -> str:
    """The commands, so that anybody can run one by hand."""
    lines = ["\n## What is asked, and how\n", "`--json FILE` and `--quiet` are left out.\n"]
    for number, step in enumerate(steps, 1):
        lines.append(f"{number}. {step.question} About {max(1, round(step.seconds / 60))} min.")
        for part in step.parts:
            command = part.command.format(**GPU, json="").replace(" --json ", " ").replace(" --quiet", "")
            lines.append(f"    - `{part.name}`: `{' '.join(command.split())}`")
    return "\n".join(lines) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows so far; of two about the same the later one counts."""
    rows = {tuple(row.get(name) for name in TOLD_APART_BY): row for row in read(path)}
    return [row for row in rows.values() if "run" not in row]


TOLD_APART_BY = ("case", "kind", "name", "rows", "call")


BENCH = {
    "model": "model",
    "policy": "policy",
    "pictures": "batch_size",
    "tokens/s": "tokens_per_second",
    "ms a step": "milliseconds_per_step",
    "share of the roofline": "roofline_share",
    "KV, bytes": "kv_bytes",
    "peak, bytes": "peak_bytes",
    "error": "error",
}


def _tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table for each kind of row; the machine is told above."""
    kinds = dict.fromkeys(row.get("kind") for row in rows)
    return [_table([row for row in rows if row.get("kind") == kind]) for kind in kinds if kind != "machine"]


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table; those of `arkv bench` by the columns that matter, all others by all of theirs."""
    bench = any("roofline_share" in row for row in rows)
    names = BENCH if bench else {name: name for row in rows for name in row if name != "kind"}
    names = {title: name for title, name in names.items() if any(row.get(name) is not None for row in rows)}
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in names.values()) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


if __name__ == "__main__":
    print(page(Path("nowhere"), STEPS), end="")
