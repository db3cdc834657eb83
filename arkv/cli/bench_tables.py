"""The tables of `arkv bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arkv.cli.tables import print_table

if TYPE_CHECKING:
    from arkv.model import Model
    from arkv.speed.measurement import Measurement, Refusal


def print_bench(model: Model, rows: Sequence[Measurement | Refusal], run: Mapping[str, Any]) -> str:
    """Tables of what was measured, what could not be, and what others have published; the title."""
    from arkv.estimate import format_bytes
    from arkv.speed.measurement import Measurement, Refusal, speedups
    from arkv.speed.published import published_for

    done = [row for row in rows if isinstance(row, Measurement)]
    guidance = model.spec.guidance if run["guidance"] is None else run["guidance"]
    settings = f"compile {run['compile']}, guidance {guidance:g}, median of {run['repeats']}"
    if run["tokens"] is not None:
        settings += f", first {run['tokens']} tokens only"
    if run["lines"] is not None:
        settings += f", lines {', '.join(map(str, run['lines']))} timed and the others interpolated"
    machine = f"{run['device']} ({run['cpu']}, {run['threads']} threads)"
    if done:
        machine += f" that copies {format_bytes(done[0].bandwidth)}/s"
    title = f"{model.spec.name}, {run['dtype']}, {machine}, {settings}"
    print(title)
    header = ["policy", "batch", "tokens/s", "vs full", "pictures/s", "ms/step", "p95"]
    header += ["roofline", "KV", "of full", "peak", "cold s"]
    lines: list[Sequence[object]] = [
        (
            row.policy,
            row.batch_size,
            _number(row.tokens_per_second),
            "-" if faster is None else f"{faster:.2f}x",
            "-" if row.pictures_per_second is None else f"{row.pictures_per_second:.3g}",
            f"{row.milliseconds_per_step:.2f}",
            f"{row.milliseconds_per_step_p95:.2f}",
            f"{row.roofline_share:.0%}",
            format_bytes(row.kv_bytes),
            f"{row.kv_bytes / row.full_kv_bytes:.0%}",
            "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            f"{row.cold_seconds:.1f}",
        )
        for row, faster in zip(done, speedups(done), strict=True)
    ]
    print_table(header, lines, right=range(1, len(header)))
    if not all(row.turns for row in done):
        print("caches do not fit into memory together: policies were timed one after the other")
    for row in rows:
        if isinstance(row, Refusal):
            print(f"{row.policy} x {row.batch_size} is left out: {row.error}")
    others = published_for(model.spec.name, {row.batch_size for row in rows})
    if others:
        print("\npublished, on other hardware:")
        base = {(row.table, row.batch_size): row for row in others if row.policy == "full"}
        lines = [
            (
                row.method,
                row.batch_size,
                _number(row.pictures_per_second * model.spec.grid.tokens),
                f"{row.pictures_per_second / base[row.table, row.batch_size].pictures_per_second:.2f}x",
                f"{row.pictures_per_second:.3g}",
                f"{row.gigabytes:g} GB",
                row.table,
            )
            for row in others
        ]
        print_table((*header[:5], "memory", "from"), lines, right=range(1, 6))
        told = [text for row in others for text in (row.hardware, row.note) if text]
        print("\n".join(dict.fromkeys(told)))
    return title


def _number(value: float) -> str:
    """Whole, but with three significant digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
