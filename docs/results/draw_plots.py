"""Draws the plots of the results pages as SVG from the JSON lines beside them.

python docs/results/draw_plots.py
"""

from pathlib import Path

from arkv.jobs.journal import read_journal
from arkv.pictures.figure import to_svg
from arkv.speed.measurement import Measurement, from_dict
from arkv.speed.speed_figure import speed_figure
from arkv.study.evaluation import Evaluation
from arkv.study.evaluation_figure import comparison_figure

HERE = Path(__file__).parent
EVALUATED = {"scenes": "Every policy on scenes: 200 prompts, judged; four pictures beside a full cache"}
TIMED = {
    "speed-cpu": "Janus-Pro-1B's shape, 32 pictures, two cores of a CPU",
    "few-cpu": "Janus-Pro-1B's shape, one picture and four, two cores of a CPU",
    "memory-cpu": "Janus-Pro-1B's shape, the largest batch in 6 and in 12 GB, two cores of a CPU",
    "growth": "Janus-Pro-1B's shape, the last line of 8 pictures by ratio, two cores of a CPU",
    "grid-64-cpu": "Lumina-mGPT-7B's shape on 64 x 64 tokens, one picture, two cores of a CPU",
}


def plots() -> dict[str, str]:
    """SVG by name."""
    drawn = {}
    for name, title in EVALUATED.items():
        rows = [Evaluation.from_dict(row) for row in lines(name, "policy")]
        drawn[name] = to_svg(comparison_figure(rows, title), title)
    for name, title in TIMED.items():
        timed = [row for row in map(from_dict, lines(name, "case")) if isinstance(row, Measurement)]
        drawn[name] = to_svg(speed_figure(timed, title), title)
    return drawn


def lines(name: str, key: str) -> list[dict]:
    _, rows, _ = read_journal(HERE / f"{name}.jsonl", key)
    return list(rows.values())


if __name__ == "__main__":
    for name, drawn in plots().items():
        (HERE / f"{name}.svg").write_text(drawn, encoding="utf-8")
