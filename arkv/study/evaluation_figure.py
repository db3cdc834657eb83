"""Figures of what policies score, drawn with matplotlib (see `arkv.pictures.figure`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from PIL import Image

from arkv.pictures.figure import (
    COLOURS,
    FAINT,
    FULL,
    add_legend,
    add_title,
    dress,
    line_style,
    new_figure,
    to_image,
)
from arkv.study.evaluation import Accuracy, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Denominators of the ratios that get a tick, as far as they are within the data.
TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
COARSE_TICKS = (1, 2, 4, 8, 16, 32, 64, 128)

# Octaves between the intervals of two policies at the same ratio, which would hide each other.
APART = 0.02


COLUMNS = 4
"""Panels in a row, where every policy has one."""

Against = Literal["ratio", "bytes"]
AXIS: dict[Against, str] = {
    "ratio": "ratio: visual tokens kept / all",
    "bytes": "bytes of keys and values / the full cache's",
}
"""What scores are drawn against."""


def draw_comparison(rows: Sequence[Evaluation], title: str, against: Against = "ratio") -> Image.Image:
    """`comparison_figure` as an image."""
    return to_image(comparison_figure(rows, title, against))


def comparison_figure(rows: Sequence[Evaluation], title: str, against: Against = "ratio") -> Figure:
    """What policies score against the ratio: accuracy, lost attention and, without a judge, divergence.

    Up to six policies share a panel for each of what was measured, and a line is told from another by its
    colour. More of them get a panel each, the best first, with all the others in gray.

    Args:
        rows: those that a policy has refused are left out.
        title: stands above.
        against: the horizontal axis. Bytes count what lies beside the budget, too: the condition, the tokens
            of a period, and scales.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    if against == "bytes":
        rows = [replace(row, ratio=row.share_of_bytes) for row in rows]
    rows = [row for row in rows if row.ratio is not None]
    judged = any(row.accuracy is not None for row in rows)
    forced = any(row.attention_lost is not None for row in rows)
    if len(_lines(rows)) > len(COLOURS) and (judged or forced):
        return _small_multiples(rows, f"{title}\n{AXIS[against]}; gray: the other policies", judged, forced)
    draws = [_draw_accuracy] * judged + [_draw_attention_lost] * forced
    if any(row.kl for row in rows) and not judged:
        draws.append(_draw_divergence)
    figure = new_figure(0.4 + 3.4 * max(1, len(draws)), 3.7, dpi=200)
    add_title(figure, title)
    panels = figure.subplots(1, len(draws), squeeze=False)[0] if draws else []
    for draw, axes in zip(draws, panels, strict=True):
        draw(axes, rows)
        _by_ratio(axes, rows, TICKS)
        axes.set_xlabel(AXIS[against], fontsize=9)
    add_legend(figure)
    return figure


def _small_multiples(rows: Sequence[Evaluation], title: str, judged: bool, forced: bool) -> Figure:
    """A panel a policy, from the best to the worst: its own lines in colour, those of all others in gray."""
    lines = _lines(rows)
    score = _share if judged else _lost

    def merit(name: str) -> float:
        values = [value for value in map(score, lines[name]) if value is not None]
        mean = sum(values) / max(1, len(values))
        return mean if judged else -mean

    order = sorted(lines, key=merit, reverse=True)
    height = -(-len(order) // COLUMNS)
    figure = new_figure(0.3 + 1.75 * COLUMNS, 1.1 + 1.5 * height, dpi=200)
    add_title(figure, title)
    panels = figure.subplots(height, COLUMNS, sharex=True, sharey=True, squeeze=False)
    for index, axes in enumerate(panels.flat):
        if index >= len(order):
            axes.set_visible(False)
            continue
        for other in order[:index] + order[index + 1 :]:
            axes.plot(*_points(lines[other], score), color=FAINT, alpha=0.45, linewidth=0.7)
        if judged:
            _draw_own_accuracy(axes, lines[order[index]], _full(rows))
        if forced:
            label = "the full cache's attention to tokens given up"
            axes.plot(*_points(lines[order[index]], _lost), label=label, **_own(1))
        axes.set_title(order[index], fontsize=9, fontweight="bold")
        _by_ratio(axes, rows, COARSE_TICKS)
        # Shared axes name their ticks at the edge only, and below the last row there may be no panel.
        axes.tick_params(labelbottom=index + COLUMNS >= len(order))
    add_legend(figure)
    return figure


def _draw_own_accuracy(axes: Axes, line: Sequence[Evaluation], full: Evaluation | None) -> None:
    if full is not None and full.accuracy is not None:
        label = f"{full.name}, right"
        axes.axhline(full.accuracy.share, color=FULL, linestyle="--", linewidth=0.9, label=label)
    points = [(row.ratio, row.accuracy) for row in line if row.ratio and row.accuracy]
    axes.fill_between(
        [ratio for ratio, _ in points],
        [accuracy.low for _, accuracy in points],
        [accuracy.high for _, accuracy in points],
        color=COLOURS[0],
        alpha=0.2,
        linewidth=0,
    )
    axes.plot(*_points(line, _share), label="right, with the 95% interval", **_own(0))


def _share(row: Evaluation) -> float | None:
    return None if row.accuracy is None else row.accuracy.share


def _lost(row: Evaluation) -> float | None:
    return row.attention_lost


def _own(index: int) -> dict[str, Any]:
    return line_style(index) | {"markersize": 3.2, "linewidth": 1.5}


def _points(
    line: Sequence[Evaluation], value: Callable[[Evaluation], float | None]
) -> tuple[list[float], list[float]]:
    """Ratios and values of the rows that have both."""
    points = [(row.ratio, value(row)) for row in line if row.ratio]
    return [x for x, y in points if y is not None], [y for _, y in points if y is not None]


def _draw_accuracy(axes: Axes, rows: Sequence[Evaluation]) -> None:
    axes.set_title("pictures that show what was asked for (95% interval)", fontsize=9)
    axes.set_ylim(-0.02, 1)
    full = _full(rows)
    if full is not None and full.accuracy is not None:
        axes.axhspan(full.accuracy.low, full.accuracy.high, color=FULL, alpha=0.1, linewidth=0)
        axes.axhline(full.accuracy.share, color=FULL, linestyle="--", linewidth=1.2, label=full.name)
    lines = _lines(rows)
    for index, (name, line) in enumerate(lines.items()):
        points = [(row.ratio, row.accuracy) for row in line if row.ratio and row.accuracy]
        apart = 2.0 ** (APART * (index - (len(lines) - 1) / 2))
        below, above = zip(*(_reach(accuracy) for _, accuracy in points), strict=True) if points else ((), ())
        axes.errorbar(
            [ratio * apart for ratio, _ in points],
            [accuracy.share for _, accuracy in points],
            yerr=(below, above),
            label=name,
            elinewidth=0.8,
            **line_style(index),
        )


def _draw_attention_lost(axes: Axes, rows: Sequence[Evaluation]) -> None:
    axes.set_title("the full cache's attention to tokens given up", fontsize=9)
    full = _full(rows)
    if full is not None and full.attention_lost is not None:
        axes.axhline(full.attention_lost, color=FULL, linestyle="--", linewidth=1.2, label=full.name)
    for index, (name, line) in enumerate(_lines(rows).items()):
        axes.plot(*_points(line, _lost), label=name, **line_style(index))
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])


def _draw_divergence(axes: Axes, rows: Sequence[Evaluation]) -> None:
    axes.set_title("KL divergence of the guided predictions, nats", fontsize=9)
    for index, (name, line) in enumerate(_lines(rows).items()):
        # Nothing has no place on a logarithmic axis.
        axes.plot(*_points(line, lambda row: row.kl or None), label=name, **line_style(index))
    axes.set_yscale("log")


def _by_ratio(axes: Axes, rows: Sequence[Evaluation], ticks: Sequence[int]) -> None:
    """Ratios by octaves, and shares in percent."""
    ratios = [row.ratio for row in rows if row.ratio]
    low, high = min(ratios) * 0.85, max(ratios) * 1.18
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    shown = [n for n in ticks if low <= 1 / n <= high]
    axes.set_xticks([1 / n for n in shown], ["1" if n == 1 else f"1/{n}" for n in shown])
    axes.set_xticks([], minor=True)
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    dress(axes)


def _full(rows: Sequence[Evaluation]) -> Evaluation | None:
    """The policy that keeps everything without being told a ratio."""
    return next((row for row in rows if row.ratio == 1 and row.policy == row.name), None)


def _lines(rows: Sequence[Evaluation]) -> dict[str, list[Evaluation]]:
    """The rows of every policy but the full cache, by name, from the smallest ratio."""
    lines: dict[str, list[Evaluation]] = {}
    full = _full(rows)
    for row in sorted(rows, key=lambda row: row.ratio or 0):
        if row is not full:
            lines.setdefault(row.name, []).append(row)
    order = list(dict.fromkeys(row.name for row in rows))
    return {name: lines[name] for name in order if name in lines}


def _reach(accuracy: Accuracy) -> tuple[float, float]:
    """How far the interval goes down and up; rounding may take an end past the share itself."""
    return max(0.0, accuracy.share - accuracy.low), max(0.0, accuracy.high - accuracy.share)
