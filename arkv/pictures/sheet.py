"""Contact sheets: rows of labelled pictures on one canvas.

A row has a title and notes to its left, a picture has a caption above it and a verdict on its corner; all
of them may be missing. Small pictures are enlarged by a whole factor with hard edges, so that a reader
sees the pixels that the model made and not an interpolation of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw, ImageFont

SMALLEST_SIDE = 192
"""Pixels that the longer side of a picture has on a sheet, at least."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
Rgb = tuple[int, int, int]

# Neither white nor black nor gray, which are backgrounds that pictures themselves may have.
PAPER: Rgb = (244, 246, 250)
FRAME: Rgb = (196, 203, 214)
INK: Rgb = (24, 31, 43)
FADED: Rgb = (96, 107, 124)
GOOD: Rgb = (22, 148, 72)
BAD: Rgb = (212, 48, 48)

HEADING, TITLE, CAPTION, NOTE = 28, 24, 17, 16  # sizes of type, px
LEADING = 1.3  # height of a line of text in sizes of its type
MARGIN, GAP, CAPTION_GAP, TITLE_GAP, LABEL_GAP = 36, 20, 8, 4, 32  # px
CAPTION_LINES = 4  # a longer caption ends in dots
BADGE = 15  # radius of a verdict, px
SUPERSAMPLING = 4  # Pillow draws shapes without anti-aliasing


@dataclass(frozen=True)
class Cell:
    """A picture on a sheet.

    Attributes:
        image: of any size, the same for all pictures of a sheet.
        caption: above the picture, wrapped to its width.
        verdict: a green tick for True, a red cross for False, nothing for None.
    """

    image: Image.Image
    caption: str = ""
    verdict: bool | None = None


@dataclass(frozen=True)
class Row:
    """Pictures side by side.

    Attributes:
        cells: from left to right.
        title: to the left of the pictures.
        notes: lines in small type under the title.
    """

    cells: Sequence[Cell]
    title: str = ""
    notes: Sequence[str] = ()


def enlarge(image: Image.Image) -> Image.Image:
    """The picture at the smallest whole factor that brings its longer side to `SMALLEST_SIDE` pixels."""
    factor = max(1, math.ceil(SMALLEST_SIDE / max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def in_rows(cells: Sequence[Cell]) -> list[Row]:
    """Spread pictures over rows without titles, about as many rows as columns, at most eight columns."""
    columns = min(8, math.ceil(math.sqrt(len(cells))))
    return [Row(cells[start : start + columns]) for start in range(0, len(cells), columns)]


def contact_sheet(rows: Sequence[Row], heading: str = "", note: str = "") -> Image.Image:
    """Draw a sheet.

    Args:
        rows: from top to bottom, at least one, each with at least one picture.
        heading: a line above everything.
        note: a line below everything, in small type.

    Returns:
        An RGB image as large as it needs to be.
    """
    pictures = [[enlarge(cell.image.convert("RGB")) for cell in row.cells] for row in rows]
    width = max(picture.width for line in pictures for picture in line)
    height = max(picture.height for line in pictures for picture in line)
    captions = [[wrap(cell.caption, CAPTION, width) for cell in row.cells] for row in rows]
    caption_heights = [_text_height(max(map(len, line)), CAPTION, CAPTION_GAP) for line in captions]
    labels = max(
        max(text_width(row.title, TITLE), *(text_width(n, NOTE) for n in ("", *row.notes))) for row in rows
    )
    left = MARGIN + (labels + LABEL_GAP if labels else 0)
    top = MARGIN + _text_height(bool(heading), HEADING, GAP)
    columns = max(map(len, pictures))
    right = left + columns * width + (columns - 1) * GAP
    bottom = top + sum(caption_heights) + len(rows) * height + (len(rows) - 1) * GAP
    total_width = (
        max(right, *(MARGIN + text_width(t, s) for t, s in ((heading, HEADING), (note, NOTE)))) + MARGIN
    )
    total_height = bottom + (_text_height(1, NOTE, GAP) if note else 0) + MARGIN

    sheet = Image.new("RGB", (total_width, total_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, MARGIN, MARGIN, [heading], HEADING, INK)
    y = top
    for row, line, texts, caption_height in zip(rows, pictures, captions, caption_heights, strict=True):
        y += caption_height
        title_height = _text_height(1, TITLE, TITLE_GAP)
        label_top = y + (height - title_height - _text_height(len(row.notes), NOTE, 0)) // 2
        _write(draw, MARGIN, label_top, [row.title], TITLE, INK)
        _write(draw, MARGIN, label_top + title_height, row.notes, NOTE, FADED)
        for column, (cell, picture, text) in enumerate(zip(row.cells, line, texts, strict=True)):
            x = left + column * (width + GAP)
            # Captions of one line and of three both stand right above their pictures.
            _write(draw, x, y - _text_height(len(text), CAPTION, CAPTION_GAP), text, CAPTION, INK)
            sheet.paste(picture, (x, y))
            draw.rectangle((x - 1, y - 1, x + picture.width, y + picture.height), outline=FRAME)
            if cell.verdict is not None:
                badge = _badge(cell.verdict)
                # Over the corner, mostly outside: pictures are small enough without something on them.
                sheet.paste(badge, (x + picture.width - BADGE - 6, y + picture.height - BADGE - 6), badge)
        y += height + GAP
    _write(draw, MARGIN, bottom + GAP, [note], NOTE, FADED)
    return sheet


def text_width(text: str, size: int) -> int:
    """Pixels that a line of text takes at a size of type."""
    return math.ceil(_font(size).getlength(text))


def wrap(text: str, size: int, width: int) -> list[str]:
    """Break a text into lines.

    Args:
        text: words with any white space between them.
        size: of the type, px.
        width: that no line exceeds, px; a single word may.

    Returns:
        At most `CAPTION_LINES` lines, the last one ending in dots if something was left out.
    """
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > CAPTION_LINES:
        lines = [*lines[: CAPTION_LINES - 1], lines[CAPTION_LINES - 1] + " ..."]
    return lines


@cache
def _font(size: int) -> Font:
    """The typeface that comes with Pillow: on every machine the same."""
    return ImageFont.load_default(size)


def _text_height(lines: int, size: int, gap: int) -> int:
    """Pixels of so many lines and the gap that follows them; none for no lines."""
    return round(lines * size * LEADING) + gap if lines else 0


def _write(draw: ImageDraw.ImageDraw, x: int, y: int, lines: Sequence[str], size: int, color: Rgb) -> None:
    for index, line in enumerate(lines):
        draw.text((x, y + _text_height(index, size, 0)), line, font=_font(size), fill=color)


@cache
def _badge(good: bool) -> Image.Image:
    """A tick or a cross in a disc, RGBA, as it lies on a sheet."""
    radius = BADGE * SUPERSAMPLING
    badge = Image.new("RGBA", (2 * radius, 2 * radius), (255, 255, 255, 0))
    draw = ImageDraw.Draw(badge)
    draw.ellipse((0, 0, 2 * radius - 1, 2 * radius - 1), fill=PAPER)
    rim = radius // 7
    draw.ellipse((rim, rim, 2 * radius - 1 - rim, 2 * radius - 1 - rim), fill=GOOD if good else BAD)
    strokes = [[(-0.42, 0.04), (-0.12, 0.34), (0.44, -0.30)]]
    if not good:
        strokes = [[(-0.32, -0.32), (0.32, 0.32)], [(-0.32, 0.32), (0.32, -0.32)]]
    for stroke in strokes:
        points = [(radius * (1 + x), radius * (1 + y)) for x, y in stroke]
        draw.line(points, fill=(255, 255, 255), width=radius // 5, joint="curve")
    return badge.resize((2 * BADGE, 2 * BADGE), Image.Resampling.LANCZOS)
