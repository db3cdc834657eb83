"""Figures drawn with matplotlib, which is an optional dependency: installed with `arkv[viz]`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy
from PIL import Image

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
