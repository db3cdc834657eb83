"""Figures drawn with matplotlib, which is an optional dependency: installed with `arkv[viz]`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy
from PIL import Image

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart, but for yellow, which is too light for a line,
# and black, which is near the full cache's. The points' shapes say the same once more, and so do the lines
# where colours come round again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "-.", ":")
FULL = "#444444"
"""Colour of the full cache."""


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


def line_style(index: int) -> dict[str, Any]:
    """Colour, points and dashes of the line with this index, told apart without colours too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "markersize": 4.5,
        "linewidth": 1.4,
    }
