"""Figures drawn with matplotlib, which is an optional dependency: installed with `arkv[viz]`."""

from __future__ import annotations

import io
import re
import textwrap
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

import numpy
from PIL import Image

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart, but for yellow, which is too light for a line,
# and black, which is near the full cache's. The points' shapes say the same once more, and so do the lines
# where colours come round again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "-.", ":")
FULL = "#444444"
"""Colour of the full cache."""
FAINT = "#9aa1ac"
"""Colour of what only frames the data; seen on white and on near black."""

TITLE_LETTERS = 13
"""Letters of a title that have room on an inch of a figure."""

# Alone an SVG brings its own paper, light or dark with the reader's colour scheme; inside a page its ink is
# that of the page.
STYLE = """<style>
svg.arkv-plot:root { color: #1f2430 }
svg.arkv-plot:root .paper { fill: #fff }
@media (prefers-color-scheme: dark) {
  svg.arkv-plot:root { color: #e3e6ec }
  svg.arkv-plot:root .paper { fill: #1e2129 }
}
</style>"""


def new_figure(width: float, height: float, dpi: int = 120) -> Figure:
    """An empty figure that is laid out when it is drawn; no window and no global state comes with it.

    Args:
        width: in inches.
        height: in inches.
        dpi: pixels an inch.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ArkvError(
            "figures are drawn with matplotlib, which is not installed: pip install 'arkv[viz]'"
        ) from None
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")


def to_image(figure: Figure) -> Image.Image:
    """The figure as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.fromarray(numpy.asarray(canvas.buffer_rgba())).convert("RGB")  # type: ignore[no-untyped-call]


def to_svg(figure: Figure, title: str) -> str:
    """The figure as SVG: for the same data the same text, with the ink of the page that it stands in.

    Args:
        figure: whose black and `FULL` become that ink.
        title: what a reader who cannot see it is told.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        # No date and no version of the library: they would change the file and not the picture.
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    drawn = buffer.getvalue()
    (box,) = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # several figures may stand in one page
    body = body.replace(FULL.lower(), "currentColor").replace("#000000", "currentColor")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, Segoe UI, Roboto, Helvetica, Arial, sans-serif", body)
    body = "\n".join(line.rstrip() for line in body.splitlines() if line.strip())
    namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return (
        f'<svg class="arkv-plot" {namespaces} viewBox="0 0 {box[0]} {box[1]}" role="img" '
        f'aria-label={quoteattr(title)} fill="currentColor">\n{STYLE}\n'
        f'<rect class="paper" width="{box[0]}" height="{box[1]}" fill="none"/>\n{body}\n'
    )


def line_style(index: int) -> dict[str, Any]:
    """Colour, points and dashes of the line with this index, told apart without colours too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.4,
    }


def add_title(figure: Figure, title: str) -> None:
    """Put a title above everything, in as many lines as it needs."""
    width = int(TITLE_LETTERS * figure.get_size_inches()[0])
    lines = [textwrap.fill(line, width) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize=9.5, x=0.01, ha="left")


def add_legend(figure: Figure) -> None:
    """Put the names of all lines below the panels, each once."""
    drawn: dict[str, Any] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    if drawn:
        columns = max(1, int(figure.get_size_inches()[0] / 2.2))
        figure.legend(
            drawn.values(),
            drawn.keys(),
            loc="outside lower left",
            ncols=min(columns, len(drawn)),
            frameon=False,
            fontsize=8.5,
        )


def dress(axes: Axes) -> None:
    """No more ink than needed."""
    axes.tick_params(labelsize=8, length=3, color=FAINT)
    axes.grid(axis="y", color=FAINT, alpha=0.3, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
