"""Draws window.svg: the slots of one line while a window of five tokens goes over it.

The figure is not arranged by hand. A toy model draws a line of ten tokens, by the decoder's own rule of what
is accepted and what is guessed. Run it without arguments to write the figure, with --check to compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from draw_cache import CELL, HEIGHT, INK, STYLE, text, write_or_check

from arkv.decoding.drafts import accept_
from arkv.grid import Grid

ABOVE, LINE = "aaaaabbbaa", "aaaabbbbca"  # the line before, and the one that is drawn
WIDTH_OF_PASS = 5
FILL = {"accepted": "#45b08c", "draft": "#e3a13a", "wrong": "#98a2b3"}
LEFT, PITCH, TOP, PANEL = 152, 46, 66, 108
WIDTH = LEFT + len(LINE) * PITCH + 14


@dataclass
class Pass:
    """What a pass was fed and what came of it, by place in the line."""

    at: int  # the last token that was accepted before
    fed: dict[int, str]
    drawn: dict[int, str]
    accepted: int  # draws that were


def decode() -> list[Pass]:
    """Lets the toy model draw the line."""
    count, codes = len(LINE), sorted(set(ABOVE + LINE))
    truth = torch.tensor([[codes.index(code) for code in ABOVE + LINE]])
    tokens = truth.clone()
    tokens[:, count + 1 :] = tokens[:, count : count + 1]  # the first guesses
    at, stop, passes = torch.tensor([count]), torch.tensor([2 * count - 1]), []
    while at < stop:
        start = int(at)
        places = torch.minimum(at[:, None] + torch.arange(WIDTH_OF_PASS), stop[:, None] - 1)
        fed = tokens.gather(1, places)
        # After a right token the toy draws the right one, and after a wrong one what stands above.
        is_right = fed == truth.gather(1, places)
        drawn = torch.where(is_right, truth.gather(1, places + 1), truth.gather(1, places + 1 - count))
        last = int(places.max())
        inside = range(last - start + 1)
        accept_(tokens, at, places, drawn, stop, Grid(2, count))
        passes.append(
            Pass(
                start - count,
                {start + i - count: codes[int(fed[0, i])] for i in inside},
                {start + i + 1 - count: codes[int(drawn[0, i])] for i in inside},
                int(at) - start,
            )
        )
    return passes


def box(place: int, y: float, kind: str, label: str, dashed: bool = False) -> str:
    x = LEFT + place * PITCH
    look = ' fill-opacity=".28" stroke-dasharray="3 2"' if dashed else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{CELL + 8}" height="{HEIGHT}" rx="3.5" fill="{FILL[kind]}" '
        f'stroke="{FILL[kind]}"{look}/>'
        + text(
            x + CELL / 2 + 4,
            y + HEIGHT / 2 + 4.5,
            label,
            fill="currentColor" if dashed else INK,
            text_anchor="middle",
        )
    )


def panel(number: int, done: Pass, y: float) -> list[str]:
    bold, small = {"font_weight": "600"}, {"font_size": "11.5", "opacity": ".8"}
    parts = [text(14, y + 20, f"pass {number}", **bold), text(70, y + 20, "is fed", **small)]
    parts.append(text(70, y + HEIGHT + 32, "draws", **small))
    for place in range(len(LINE)):
        if place < done.at:
            parts.append(box(place, y, "accepted", LINE[place]))
        elif place not in done.fed:
            x = LEFT + place * PITCH
            parts.append(
                f'<rect x="{x:g}" y="{y:g}" width="{CELL + 8}" height="{HEIGHT}" rx="3.5" fill="none" '
                'stroke="currentColor" stroke-opacity=".35"/>'
            )
        else:
            right = place < done.at + done.accepted
            parts.append(
                box(place, y, "accepted" if place == done.at else "draft", done.fed[place], not right)
            )
        if place in done.fed:
            x = LEFT + place * PITCH - 3
            parts.append(
                f'<rect x="{x:g}" y="{y - 3:g}" width="{CELL + 14}" height="{HEIGHT + 6}" rx="5.5" '
                'fill="none" stroke="currentColor" stroke-width="1.4"/>'
            )
        if place in done.drawn:
            taken = place <= done.at + done.accepted
            kind = "accepted" if taken else "wrong"
            parts.append(box(place, y + HEIGHT + 12, kind, done.drawn[place], not taken))
    return parts


def legend(y: float) -> list[str]:
    parts = []
    for row, (kind, dashed, words) in enumerate(
        [
            ("accepted", False, "accepted: the token that one at a time would have drawn"),
            ("draft", False, "draft that was right: its key and its value stay in their slot"),
            ("draft", True, "wrong draft: the next pass overwrites its slot"),
            ("wrong", True, "draw after a wrong draft: the draft of the next pass"),
        ]
    ):
        look = ' fill-opacity=".28" stroke-dasharray="3 2"' if dashed else ""
        top = y + 21 * row
        parts.append(
            f'<rect x="14" y="{top - 11:g}" width="13" height="13" rx="2.5" fill="{FILL[kind]}" '
            f'stroke="{FILL[kind]}"{look}/>'
        )
        parts.append(text(34, top, words))
    return parts


def draw() -> str:
    """The figure as SVG; light or dark with the page that it stands in, else with the reader."""
    passes = decode()
    total = TOP + len(passes) * PANEL + 84
    parts = [
        f'<svg class="arkv-figure" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {total}" '
        'role="img" aria-labelledby="arkv-window-title" '
        'font-family="system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif" font-size="13" '
        'fill="currentColor">',
        '<title id="arkv-window-title">The slots of one line over '
        f"{len(passes)} passes: drafts lie in slots of their own, right ones stay, and wrong ones are "
        "overwritten.</title>",
        STYLE,
        f'<rect class="paper" width="{WIDTH}" height="{total}" rx="6" fill="none"/>',
        text(14, 30, "line above", font_size="11.5", opacity=".8"),
    ]
    for place, code in enumerate(ABOVE):
        middle = LEFT + place * PITCH + CELL / 2 + 4
        parts.append(text(middle, 30, code, text_anchor="middle", opacity=".8"))
    for number, done in enumerate(passes):
        parts += panel(number + 1, done, TOP - 16 + number * PANEL)
    parts += legend(TOP + len(passes) * PANEL + 4)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    write_or_check(draw(), Path(__file__).with_name("window.svg"), __file__, __doc__)
