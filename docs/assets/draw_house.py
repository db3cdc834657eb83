"""Draws the rooms of the package, one below the other as they may import each other.

The floors are those of the table in pyproject.toml that `make lint` holds, so the drawing is never
older than it.
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]

WORDS = {
    "cli": "the commands",
    "bulk": "engines of a job",
    "study": "what a policy does to pictures",
    "speed": "how fast it is",
    "jobs": "what is to be drawn, and how",
    "testing": "the suite that policies pass",
    "decoder": "prompts in, pictures out",
    "decoding": "one batch: memory, steps, graphs, draws",
    "policies": "one file a policy",
    "models": "one file a family; transformer, picture decoder",
    "attention": "specification, operators, kernels",
    "machine": "memory, clocks",
    "pictures": "prompts, files, sheets",
    "weights": "files into modules",
    "model": "what the runtime asks of a model",
    "errors": "one line each",
    "grid": "rows and columns",
}
STOPS = {
    "decoder": "1",
    "models": "2 8",
    "decoding": "3 7",
    "store": "4",
    "attention": "5",
    "policies": "6",
    "pictures": "9",
}
"""Where a picture comes by, in this order."""

WIDTH, LEFT, RIGHT, TOP, FLOOR, HEIGHT, GAP = 866, 14, 58, 12, 56, 44, 10
FILL = {True: "#6c9df0", False: "#98a2b3"}


def floors() -> list[list[list[str]]]:
    """Floors from the top, rooms from the left; a room may be several files."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [each["layers"] for each in table["contracts"] if each["type"] == "layers"]
    return [
        [[name.strip(" ()") for name in room.split(":")] for room in layer.split("|")] for layer in layers
    ]


def draw() -> str:
    """The drawing as SVG, in the ink of its page."""
    house = floors()
    height = TOP + FLOOR * len(house) + 8
    parts = [
        f'<svg class="arkv-figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'role="img" aria-label="Rooms of the package: each imports from those below it only" '
        'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="13" '
        'fill="currentColor">'
    ]
    for level, rooms in enumerate(house):
        width = (WIDTH - LEFT - RIGHT - GAP * (len(rooms) - 1)) / len(rooms)
        for index, names in enumerate(rooms):
            parts.append(box(names, LEFT + index * (width + GAP), TOP + level * FLOOR, width))
    x, end = WIDTH - 26, height - 20
    parts.append(
        f'<path d="M{x} {TOP}V{end}" stroke="currentColor" stroke-width="1.4" fill="none"/>'
        f'<path d="M{x - 5} {end - 2}h10l-5 9z"/>'
        f'<text transform="translate({x + 16} {height / 2}) rotate(90)" text-anchor="middle" font-size="12">'
        "imports go down only</text>"
    )
    return "\n".join([*parts, "</svg>"])


def box(names: list[str], x: float, y: float, width: float) -> str:
    stops = " ".join(STOPS[name] for name in names if name in STOPS).split()
    color = FILL[bool(stops)]
    title = ", ".join(names) if len(names) > 1 else folder(names[0])
    words = "what policies and others are written against" if len(names) > 1 else WORDS.get(names[0], "")
    parts = [
        f'<rect x="{x:g}" y="{y}" width="{width:g}" height="{HEIGHT}" rx="5" fill="{color}" '
        f'fill-opacity=".2" stroke="{color}"/>',
        f'<text x="{x + 12:g}" y="{y + 18}" font-weight="600">{escape(title)}</text>',
        f'<text x="{x + 12:g}" y="{y + 35}" font-size="11.5" opacity=".8">{escape(words)}</text>',
    ]
    for place, stop in enumerate(reversed(stops)):
        at = x + width - 20 - 26 * place
        parts.append(
            f'<circle cx="{at:g}" cy="{y + HEIGHT / 2:g}" r="11" fill="{color}"/>'
            f'<text x="{at:g}" y="{y + HEIGHT / 2 + 4.5:g}" text-anchor="middle" font-weight="600" '
            f'fill="#10141c">{stop}</text>'
        )
    return "".join(parts)


def folder(name: str) -> str:
    """The room as a reader finds it in the repository."""
    if (ROOT / name).is_dir() and name != "arkv":
        return f"{name}/"
    return f"arkv/{name}/" if (ROOT / "arkv" / name).is_dir() else f"arkv/{name}.py"
