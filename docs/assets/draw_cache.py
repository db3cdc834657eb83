"""Draws cache.svg: the slots of one head while three lines of a small grid are decoded.

The figure is not arranged by hand. A toy head runs through the lines with made-up scores and the
rule of a line-wise policy (anchors and the last line are protected, the rest competes), and what
it holds is drawn. Run it without arguments to write the figure, with --check to compare.
"""

from __future__ import annotations

import argparse
import random
import sys
from dataclasses import dataclass
from pathlib import Path

COLUMNS = 6  # tokens in a line, and the period: one eviction a line
CONDITION = 4  # slots of condition tokens
ANCHORS = 2  # first visual tokens, never given up
BUDGET = 12  # visual slots right after an eviction
FIRST, LAST = 2, 4  # the lines whose ends are drawn

FILL = {"condition": "#98a2b3", "anchor": "#e3a13a", "middle": "#45b08c", "recent": "#6c9df0"}
INK = "#10141c"  # on a filled cell, in light and dark mode alike
PITCH, CELL, HEIGHT = 31, 26, 30
LEFT, GAP = 14, 14
PANEL, TOP = 122, 62
GRID_X, GRID_CELL = 762, 15
WIDTH, TOTAL = 866, 454

# Inside a page the ink is that of the page. Alone, or as an image, the figure brings its own paper,
# because the reader's colour scheme need not be that of what stands around it.
STYLE = """<style>
svg.arkv-figure:root { color: #1f2430 }
svg.arkv-figure:root .paper { fill: #fff }
@media (prefers-color-scheme: dark) {
  svg.arkv-figure:root { color: #e3e6ec }
  svg.arkv-figure:root .paper { fill: #1e2129 }
}
</style>"""


@dataclass
class Moment:
    """The head at the end of a line: what lies where, what is new and what is chosen to go."""

    line: int
    slots: list[int]  # position of the token in each visual slot
    written: set[int]  # slots that this line wrote
    freed: set[int]  # slots that the eviction names

    def role(self, position: int) -> str:
        if position < ANCHORS:
            return "anchor"
        return "recent" if position // COLUMNS == self.line else "middle"


def decode() -> list[Moment]:
    """Lets the toy head run and records it at the ends of the drawn lines."""
    score = random.Random(7)
    slots = [-1] * (BUDGET + COLUMNS)
    free = list(range(len(slots)))
    moments = []
    for line in range(LAST + 1):
        targets, free = free[:COLUMNS], free[COLUMNS:]
        for column, slot in enumerate(targets):
            slots[slot] = line * COLUMNS + column
        moment = Moment(line, list(slots), set(targets), set())
        if not free:
            middle = [s for s, position in enumerate(slots) if moment.role(position) == "middle"]
            middle.sort(key=lambda _: score.random())
            free = sorted(middle[:COLUMNS])
            moment.freed = set(free)
        if line >= FIRST:
            moments.append(moment)
    return moments


def slot_x(slot: int) -> float:
    """Left edge of a visual slot; negative numbers count the condition slots back from the gap."""
    return LEFT + (slot + CONDITION) * PITCH + (GAP if slot >= 0 else 0)


def text(x: float, y: float, words: str, **attributes: str) -> str:
    rest = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in attributes.items())
    return f'<text x="{x:g}" y="{y:g}"{rest}>{words}</text>'


def cell(x: float, y: float, role: str, label: str, freed: bool = False, new: bool = False) -> str:
    parts = []
    if new:
        parts.append(
            f'<rect x="{x - 2:g}" y="{y - 2:g}" width="{CELL + 4}" height="{HEIGHT + 4}" rx="5" '
            'fill="none" stroke="currentColor" stroke-width="1.6"/>'
        )
    look = ' fill-opacity=".28" stroke-dasharray="3 2"' if freed else ""
    parts.append(
        f'<rect x="{x:g}" y="{y:g}" width="{CELL}" height="{HEIGHT}" rx="3.5" fill="{FILL[role]}" '
        f'stroke="{FILL[role]}"{look}/>'
    )
    if freed:
        ends = f'x1="{x + 4:g}" y1="{y + HEIGHT - 5:g}" x2="{x + CELL - 4:g}" y2="{y + 5:g}"'
        parts.append(f'<line {ends} stroke="currentColor" stroke-width="1.2" opacity=".75"/>')
    ink = "currentColor" if freed else INK
    parts.append(
        text(
            x + CELL / 2,
            y + HEIGHT / 2 + 4.5,
            label,
            fill=ink,
            text_anchor="middle",
            font_size="12.5",
        )
    )
    return "".join(parts)


def strip(moment: Moment, y: float) -> list[str]:
    parts = [cell(slot_x(s - CONDITION), y, "condition", "c") for s in range(CONDITION)]
    for slot, position in enumerate(moment.slots):
        parts.append(
            cell(
                slot_x(slot),
                y,
                moment.role(position),
                str(position),
                freed=slot in moment.freed,
                new=slot in moment.written,
            )
        )
    return parts


def picture(moment: Moment, y: float) -> list[str]:
    """The grid of the image, with the cells that the head still holds after the eviction."""
    kept = {p for s, p in enumerate(moment.slots) if s not in moment.freed}
    parts = []
    for position in range(COLUMNS * COLUMNS):
        row, column = divmod(position, COLUMNS)
        size = GRID_CELL - 2
        box = f'x="{GRID_X + column * GRID_CELL}" y="{y + row * GRID_CELL:g}" width="{size}"'
        if position in kept:
            look = f'fill="{FILL[moment.role(position)]}"'
        elif row <= moment.line:
            look = 'fill="none" stroke="currentColor" stroke-opacity=".55"'
        else:
            look = 'fill="currentColor" fill-opacity=".1"'
        parts.append(f'<rect {box} height="{size}" rx="2" {look}/>')
    return parts


def legend(y: float) -> list[str]:
    parts = []
    x = float(LEFT)
    for role, words in [
        ("condition", "condition token, always kept"),
        ("anchor", "anchor, protected"),
        ("middle", "middle, ranked by attention"),
        ("recent", "the line just decoded, protected"),
    ]:
        parts.append(f'<rect x="{x:g}" y="{y - 11:g}" width="13" height="13" rx="2.5" fill="{FILL[role]}"/>')
        parts.append(text(x + 19, y, words))
        x += 38 + 6.35 * len(words)
    y += 25
    box = f'y="{y - 11:g}" width="13" height="13" rx="2.5"'
    parts.append(f'<rect x="{LEFT}" {box} fill="none" stroke="currentColor" stroke-width="1.6"/>')
    parts.append(text(LEFT + 19, y, "slot that this line has written"))
    x = LEFT + 262.0
    parts.append(
        f'<rect x="{x:g}" {box} fill="{FILL["middle"]}" fill-opacity=".28" '
        f'stroke="{FILL["middle"]}" stroke-dasharray="3 2"/>'
        f'<line x1="{x + 2:g}" y1="{y - 0.5:g}" x2="{x + 11:g}" y2="{y - 8.5:g}" '
        'stroke="currentColor"/>'
    )
    parts.append(text(x + 19, y, "token given up: its slot is a write slot of the next line"))
    return parts


def draw() -> str:
    """The figure as SVG; light or dark with the page that it stands in, else with the reader."""
    parts = [
        f'<svg class="arkv-figure" xmlns="http://www.w3.org/2000/svg" '
        f'viewBox="0 0 {WIDTH} {TOTAL}" '
        'role="img" aria-labelledby="arkv-cache-title" '
        'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="13" '
        'fill="currentColor">',
        '<title id="arkv-cache-title">Slots of one head at the ends of three lines: tokens stay '
        "where they are, and each line overwrites the slots that the eviction before it freed."
        "</title>",
        STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{TOTAL}" rx="6" fill="none"/>',
    ]
    small = {"font_size": "10.5", "opacity": ".75"}
    parts.append(text(LEFT, 20, "condition", **small))
    parts.append(text(slot_x(0), 20, f"visual slots: budget {BUDGET} + period {COLUMNS}", **small))
    parts.append(text(GRID_X, 20, "kept in the image", **small))
    moments = decode()
    for index, moment in enumerate(moments):
        y = TOP + index * PANEL
        first = moment.line * COLUMNS
        how = f"into exactly those {COLUMNS} slots" if index else "and every slot is taken"
        more = "more" if index else "of them"
        title = f"Tokens {first} to {first + COLUMNS - 1} are written {how}; "
        title += f"the eviction names {COLUMNS} {more}"
        parts.append(text(LEFT, y - 14, title, font_weight="600"))
        parts += strip(moment, y)
        parts += picture(moment, y - 23)
        if index + 1 < len(moments):
            top, bottom = y + HEIGHT + 4, y + PANEL - 34
            for slot in sorted(moment.freed):
                x = slot_x(slot) + CELL / 2
                parts.append(
                    f'<line x1="{x:g}" y1="{top:g}" x2="{x:g}" y2="{bottom - 5:g}" '
                    'stroke="currentColor" stroke-dasharray="2 3" opacity=".6"/>'
                    f'<path d="M{x - 3.5:g} {bottom - 6:g}h7l-3.5 6z" opacity=".75"/>'
                )
    parts += legend(TOP + (len(moments) - 1) * PANEL + HEIGHT + 78)
    return "\n".join([*parts, "</svg>"]) + "\n"


def write_or_check(figure: str, target: Path, script: str, about: str) -> None:
    """The command of a script that draws: write its figure, or compare it with --check.

    Args:
        figure: the SVG.
        target: its file.
        script: path of the script.
        about: what the script says of itself.
    """
    parser = argparse.ArgumentParser(description=about.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help=f"fail if {target.name} is not up to date")
    if not parser.parse_args().check:
        target.write_text(figure, encoding="utf-8")
    elif target.read_text(encoding="utf-8") != figure:
        sys.exit(f"{target} is out of date: run python {Path(script).name}")


if __name__ == "__main__":
    write_or_check(draw(), Path(__file__).with_name("cache.svg"), __file__, __doc__)
