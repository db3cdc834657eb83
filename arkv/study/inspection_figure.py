"""Figures of what a cache holds: where the resident tokens lie in the picture, and how old they are."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
from numpy.typing import NDArray
from PIL import Image
from tqdm.auto import tqdm

from arkv.pictures.figure import new_figure, to_image
from arkv.study.inspection import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Text

Pixels = NDArray[numpy.uint8]

DPI = 100
# Layout in pixels: tiles are drawn cell by cell, and a fraction of a pixel would blur them.
TILE = 120  # longer side of a tile, at most, while its cells have two pixels
MARGIN, GAP, BLOCK_GAP, LABEL, CAPTION = 24, 10, 36, 24, 19
PICTURE = 96
HISTOGRAM, HISTOGRAM_GAP, TICKS = 270, 66, 44
HEADING, LEGEND, SWATCH = 64, 26, 14
LARGE, MEDIUM, SMALL = 13, 9.5, 8.5  # sizes of type, points
LETTER = 1.1  # width of a letter by the size of its type at most, pixels by points
LEAST_WIDTH, WORDS = 980, 220  # what the legend takes, and the words beside a picture

FRAME_MS, LAST_FRAME_MS = 250, 2500

AGES, OLDEST = "plasma", 0.84  # the rest of this scale is too pale for a light ground
GIVEN_UP_INK = 0.3  # how much is left of the picture where a token was given up
AHEAD = (205, 220, 243)
HIDDEN = (112, 120, 134)
INK, FADED = "#181f2b", "#606b7c"


def draw_sheet(
    recording: Recording,
    lines: Sequence[int],
    layers: Sequence[int],
    heads: Sequence[int],
    title: str = "",
    note: str = "",
) -> Image.Image:
    """What chosen heads hold at chosen lines, and how old it is.

    One block a line, with the picture so far above it; in a block a row a layer and a column a head. To the
    right, the ages of what the heads of each layer hold at the last of the lines.

    Args:
        recording: of a picture.
        lines: from 0, at least one, as the others.
        layers: from 0.
        heads: key heads from 0.
        title: above everything.
        note: under the title, in small type.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    return _Sheet(recording, lines, layers, heads, title, note).draw()


def animate(
    recording: Recording,
    layers: Sequence[int],
    heads: Sequence[int],
    title: str = "",
    note: str = "",
    progress: bool = False,
) -> bytes:
    """The sheet of every line by itself, one after the other, as a GIF file.

    Args:
        recording: of a picture.
        layers: as for `draw_sheet`, and so the others.
        heads: key heads from 0.
        title: above everything.
        note: under the title, in small type.
        progress: show a bar.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    lines = tqdm(range(recording.grid.rows), unit="frame", disable=not progress)
    frames = [_Sheet(recording, [line], layers, heads, title, note).draw() for line in lines]
    # One palette for all, or colours would flicker; the legend has every colour.
    palette = frames[-1].quantize(256)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    buffer = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_FRAME_MS]
    frames[0].save(
        buffer, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=False
    )
    return buffer.getvalue()


class _Sheet:
    """A figure whose parts are placed in pixels from its upper left corner."""

    def __init__(
        self,
        recording: Recording,
        lines: Sequence[int],
        layers: Sequence[int],
        heads: Sequence[int],
        title: str,
        note: str,
    ) -> None:
        self.recording, self.grid = recording, recording.grid
        self.lines, self.layers, self.heads = lines, layers, heads
        self.title, self.note = title, note
        grid = self.grid
        self.cell = max(2, TILE // max(grid.rows, grid.line))
        self.tile = (grid.line * self.cell, grid.rows * self.cell)
        self.size = recording.images[-1].size
        self.picture = (PICTURE * self.size[0] // self.size[1], PICTURE)
        # Blocks are wide enough for the words beside their pictures.
        self.block = max(len(heads) * (self.tile[0] + GAP) - GAP, self.picture[0] + GAP + WORDS)
        self.row = self.tile[1] + CAPTION + GAP
        self.top = MARGIN + HEADING + PICTURE + GAP
        self.right = MARGIN + LABEL + len(lines) * (self.block + BLOCK_GAP) - BLOCK_GAP
        self.width = max(LEAST_WIDTH, self.right + HISTOGRAM_GAP + HISTOGRAM + MARGIN)
        self.bottom = self.top + len(layers) * self.row
        self.height = self.bottom + TICKS + LEGEND + MARGIN
        self.figure = new_figure(self.width / DPI, self.height / DPI, DPI)
        self.figure.set_layout_engine("none")

    def draw(self) -> Image.Image:
        from matplotlib import colormaps

        scale = colormaps[AGES](numpy.linspace(0, OLDEST, self.grid.rows))
        self.colours: Pixels = (scale[:, :3] * 255).round().astype(numpy.uint8)
        room = (self.width - 2 * MARGIN) / LETTER
        self._text(MARGIN, MARGIN, self.title, min(LARGE, room / max(1, len(self.title))), weight="bold")
        self._text(MARGIN, MARGIN + 26, self.note, min(MEDIUM, room / max(1, len(self.note))), color=FADED)
        for index, line in enumerate(self.lines):
            self._block(MARGIN + LABEL + index * (self.block + BLOCK_GAP), line)
        for index, layer in enumerate(self.layers):
            y = self.top + index * self.row + CAPTION
            self._text(
                MARGIN + LABEL // 2 - 4,
                y + self.tile[1] // 2,
                f"layer {layer}",
                MEDIUM,
                rotation=90,
                ha="center",
                va="center",
                weight="bold",
            )
            self._histogram(y, layer, last=index == len(self.layers) - 1)
        x, y = self.right + HISTOGRAM_GAP, MARGIN + HEADING
        self._text(x, y + 2, f"ages after line {self.lines[-1]}", LARGE, weight="bold")
        self._text(x, y + 28, "tokens in a head, by age:", MEDIUM, color=FADED)
        self._text(x, y + 46, "mean over the heads of the layer", MEDIUM, color=FADED)
        self._legend()
        return to_image(self.figure)

    def _block(self, x: int, line: int) -> None:
        """The picture so far and the tiles at one line."""
        grid, residents = self.grid, self.recording.residents[line]
        so_far = Image.new("RGB", self.size, AHEAD)
        so_far.paste(self.recording.images[line], (0, 0))
        y = MARGIN + HEADING
        self._image(x, y, *self.picture, numpy.asarray(so_far))
        beside = x + self.picture[0] + GAP
        words = (
            f"{(line + 1) * grid.line:,} of {grid.tokens:,} tokens decoded",
            f"{residents.sum(-1).float().mean():,.0f} of them resident in a head,",
            "mean of all layers and heads",
        )
        self._text(beside, y + 2, f"after line {line}", LARGE, weight="bold")
        for index, text in enumerate(words):
            self._text(beside, y + 28 + 18 * index, text, MEDIUM, color=FADED)
        for i, layer in enumerate(self.layers):
            for j, head in enumerate(self.heads):
                left, top = x + j * (self.tile[0] + GAP), self.top + i * self.row
                count = int(residents[layer, head].sum())
                self._text(left, top + 2, f"head {head}: {count:,}", SMALL)
                self._image(left, top + CAPTION, *self.tile, self._tile(line, layer, head))

    def _tile(self, line: int, layer: int, head: int) -> Pixels:
        """The grid of tokens, `[height, width, 3]`: what is held over what was drawn."""
        grid, cell = self.grid, self.cell
        tile = numpy.full((grid.rows * cell, grid.line * cell, 3), AHEAD, numpy.uint8)
        decoded = tile[: (line + 1) * cell]
        decoded[:] = 255
        size = (grid.columns * cell, (line + 1) * cell)
        gray = self.recording.images[line].convert("L").resize(size, Image.Resampling.BOX)
        decoded[:, : size[0]] = (255 - GIVEN_UP_INK * (255 - numpy.asarray(gray, float)))[..., None]

        age = line - numpy.arange(grid.rows)[:, None]
        colours = numpy.broadcast_to(self.colours[age.clip(0)], (grid.rows, grid.line, 3))
        held, attended = (
            x[line, layer, head].view(grid.rows, grid.line).numpy()
            for x in (self.recording.residents, self.recording.attended)
        )
        # A line between cells, where there is room for one; a hollow cell for what is not looked at.
        edge = (numpy.arange(grid.rows * cell) % cell, numpy.arange(grid.line * cell) % cell)
        inside = _within(edge, cell, 0, 1 if cell > 3 else 0)
        rim = inside & ~_within(edge, cell, 1, 2)
        solid, hollow = (x.repeat(cell, 0).repeat(cell, 1) for x in (attended, held & ~attended))
        tile[solid & inside] = colours.repeat(cell, 0).repeat(cell, 1)[solid & inside]
        tile[hollow & rim] = HIDDEN
        return tile

    def _histogram(self, y: int, layer: int, last: bool) -> None:
        """Tokens by age at the last line, mean over all heads of the layer."""
        grid, line = self.grid, self.lines[-1]
        axes = self._axes(self.right + HISTOGRAM_GAP, y, HISTOGRAM, self.tile[1])
        counts = self.recording.ages(line)[layer].float().mean(0).numpy()
        axes.bar(range(len(counts)), counts, width=0.86, color=self.colours[: len(counts)] / 255)
        axes.set_xlim(-0.8, grid.rows - 0.2)
        axes.set_ylim(0, grid.line * 1.04)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FADED)
        axes.tick_params(labelsize=SMALL, colors=FADED, labelbottom=last)
        axes.locator_params(axis="x", integer=True)
        axes.locator_params(axis="y", integer=True, nbins=4)
        axes.set_ylabel("tokens", fontsize=SMALL, color=FADED)
        if last:
            axes.set_xlabel("age in lines", fontsize=SMALL, color=FADED)

    def _legend(self) -> None:
        """What the colours mean, in a line at the bottom."""
        y, rows = self.height - MARGIN - SWATCH, self.grid.rows
        ages = self.colours[numpy.linspace(0, rows - 1, 5 * SWATCH).round().astype(int)][None]
        entries = [(ages, f"resident, from the newest line to {rows - 1} lines old")]
        if bool((self.recording.residents & ~self.recording.attended).any()):
            hollow = numpy.full((SWATCH, SWATCH, 3), HIDDEN, numpy.uint8)
            hollow[2:-2, 2:-2] = 255
            entries.append((hollow, "resident, not to be looked at"))
        given_up = numpy.full((1, 2, 3), 255, numpy.uint8)
        given_up[:, 1] = round(255 * (1 - GIVEN_UP_INK))
        entries.append((given_up, "given up: the picture, pale"))
        entries.append((numpy.full((1, 1, 3), AHEAD, numpy.uint8), "not yet decoded"))
        x = MARGIN + LABEL
        for pixels, words in entries:
            width = SWATCH * max(1, pixels.shape[1] // SWATCH)
            self._image(x, y, width, SWATCH, pixels)
            text = self._text(x + width + 6, y + SWATCH // 2, words, SMALL, va="center")
            x += width + 30 + round(text.get_window_extent().width)

    def _image(self, x: int, y: int, width: int, height: int, pixels: Pixels) -> None:
        """Pixels as they are, enlarged with hard edges where they are fewer, in a thin frame."""
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST)
        framed = Image.new("RGB", (width + 2, height + 2), FADED)
        framed.paste(image, (1, 1))
        self.figure.figimage(numpy.asarray(framed), x - 1, self.height - y - height - 1)

    def _axes(self, x: int, y: int, width: int, height: int) -> Axes:
        left, bottom = x / self.width, 1 - (y + height) / self.height
        return self.figure.add_axes((left, bottom, width / self.width, height / self.height))

    def _text(self, x: int, y: int, text: str, size: float, color: str = INK, **how: Any) -> Text:
        options: dict[str, Any] = {"va": "top", "parse_math": False}  # a prompt may have dollar signs
        return self.figure.text(
            x / self.width, 1 - y / self.height, text, size=size, color=color, **options | how
        )


def _within(
    edge: tuple[NDArray[numpy.int64], NDArray[numpy.int64]], cell: int, low: int, high: int
) -> NDArray[numpy.bool_]:
    """Pixels that are at least so far from the upper left and the lower right edge of their cell."""
    down, across = ((x >= low) & (x < cell - high) for x in edge)
    return down[:, None] & across
