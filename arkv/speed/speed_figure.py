"""Figures of how fast policies are, drawn with matplotlib (see `arkv.pictures.figure`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from arkv.pictures.figure import FULL, add_legend, add_title, dress, line_style, new_figure, to_image
from arkv.speed.measurement import Measurement

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_speed(rows: Sequence[Measurement], title: str) -> Image.Image:
    """`speed_figure` as an image."""
    return to_image(speed_figure(rows, title))


def speed_figure(rows: Sequence[Measurement], title: str) -> Figure:
    """Tokens a second against the batch, a step's time against what it moves, pictures against memory.

    A panel only for what was measured. In the second, a line of pictures is a small point and a configuration
    a large one; below the line from the origin no step can get but with the help of the processor's caches.

    Args:
        rows: of one model; at least one.
        title: stands above.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    by_batch = [row for row in rows if row.memory is None]
    by_memory = [row for row in rows if row.memory is not None and row.pictures_per_second is not None]
    panels = [(_draw_batches, by_batch), (_draw_roofline, rows), (_draw_memory, by_memory)]
    panels = [(draw, shown) for draw, shown in panels if shown]
    figure = new_figure(0.4 + 3.4 * len(panels), 3.9, dpi=200)
    add_title(figure, title)
    order = list(dict.fromkeys(row.policy for row in rows))
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (draw, shown) in zip(all_axes, panels, strict=True):
        draw(axes, shown, order)
        axes.set_ylim(0, 1.06 * axes.dataLim.y1)
        dress(axes)
    add_legend(figure)
    return figure


def _draw_batches(axes: Axes, rows: Sequence[Measurement], order: Sequence[str]) -> None:
    axes.set_title("visual tokens a second", fontsize=9)
    axes.set_xlabel("pictures at a time", fontsize=9)
    for index, policy in enumerate(order):
        line = sorted((row.batch_size, row.tokens_per_second) for row in rows if row.policy == policy)
        axes.plot([x for x, _ in line], [y for _, y in line], label=policy, **line_style(index))
    axes.set_xscale("log", base=2)
    sizes = sorted({row.batch_size for row in rows})
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)


def _draw_roofline(axes: Axes, rows: Sequence[Measurement], order: Sequence[str]) -> None:
    axes.set_title("milliseconds a step", fontsize=9)
    axes.set_xlabel("GB moved a step: weights, and keys and values held", fontsize=9)
    for index, policy in enumerate(order):
        style = line_style(index)
        mine = [row for row in rows if row.policy == policy]
        for row in mine:
            axes.plot(
                [line.bytes / 1e9 for line in row.by_line],
                [line.milliseconds for line in row.by_line],
                color=style["color"],
                marker=".",
                markersize=2.5,
                linewidth=0.6,
                alpha=0.6,
            )
        axes.plot(
            [row.step_bytes / 1e9 for row in mine],
            [row.milliseconds_per_step for row in mine],
            label=policy,
            **style | {"linestyle": ""},
        )
    far = max([row.step_bytes for row in rows] + [line.bytes for row in rows for line in row.by_line])
    bandwidth = rows[0].bandwidth
    axes.plot(
        [0, far / 1e9],
        [0, 1000 * far / bandwidth],
        color=FULL,
        linestyle="--",
        linewidth=1.2,
        label=f"copying: {bandwidth / 1e9:,.0f} GB/s",
    )
    axes.axvline(rows[0].weight_bytes / 1e9, color=FULL, linestyle=":", linewidth=1, label="weights alone")
    axes.set_xlim(left=0)


def _draw_memory(axes: Axes, rows: Sequence[Measurement], order: Sequence[str]) -> None:
    axes.set_title("pictures a second, the largest batch that fits", fontsize=9)
    axes.set_xlabel("GB of memory, with the weights", fontsize=9)
    for index, policy in enumerate(order):
        line = sorted(
            (row.memory / 1e9, row.pictures_per_second)
            for row in rows
            if row.policy == policy and row.memory is not None and row.pictures_per_second is not None
        )
        axes.plot([x for x, _ in line], [y for _, y in line], label=policy, **line_style(index))
