"""The plots of the results pages as SVG, from the JSON lines beside them."""

from __future__ import annotations

from tables import HERE, evaluated, timed

from arkv.pictures.figure import to_svg
from arkv.speed.speed_figure import speed_figure
from arkv.study.evaluation_figure import comparison_figure

EVALUATED = {"scenes": "Every policy on scenes: 200 prompts, judged; four pictures beside a full cache"}
TIMED = {
    "speed-cpu": "Janus-Pro-1B's shape, 32 pictures, two cores of a CPU",
    "few-cpu": "Janus-Pro-1B's shape, one picture and four, two cores of a CPU",
    "memory-cpu": "Janus-Pro-1B's shape, the largest batch in 6 and in 12 GB, two cores of a CPU",
    "growth": "Janus-Pro-1B's shape, the last line of 8 pictures by ratio, two cores of a CPU",
    "grid-64-cpu": "Lumina-mGPT-7B's shape on 64 x 64 tokens, one picture, two cores of a CPU",
}


def plots() -> dict[str, str]:
    """SVG by the name of its file."""
    drawn = {}
    for name, title in EVALUATED.items():
        drawn[f"{name}.svg"] = to_svg(comparison_figure(list(evaluated(name).values()), title), title)
    for name, title in TIMED.items():
        drawn[f"{name}.svg"] = to_svg(speed_figure(timed(name), title), title)
    return drawn


__all__ = ["HERE", "plots"]
