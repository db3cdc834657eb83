"""Figures of what policies score, drawn with matplotlib (see `arkv.pictures.figure`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from arkv.pictures.figure import FULL, line_style, new_figure, to_image
from arkv.study.evaluation import Accuracy, Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Denominators of the ratios that get a tick, as far as they are within the data.
TICKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

# Octaves between the intervals of two policies at the same ratio, which would hide each other.
APART = 0.02


def draw_comparison(rows: Sequence[Evaluation], title: str) -> Image.Image:
    """Accuracy and lost attention against the ratio, a line a policy; a panel only for what was measured.

    Args:
        rows: those that a policy has refused are left out.
        title: stands above.

    Raises:
        ArkvError: matplotlib is not installed.
    """
    rows = [row for row in rows if row.ratio is not None]
    judged = any(row.accuracy is not None for row in rows)
    forced = any(row.attention_lost is not None for row in rows)
    panels = judged + forced
    figure = new_figure(1.8 + 4.1 * max(1, panels), 3.8, dpi=150)
    figure.suptitle(title, fontsize=10)
    axes = list(figure.subplots(1, panels, squeeze=False)[0]) if panels else []
    drawn: dict[str, Any] = {}
    for index, each in enumerate(axes):
        if judged and index == 0:
            _draw_accuracy(each, rows)
        else:
            _draw_attention_lost(each, rows)
        _dress(each, rows)
        handles, labels = each.get_legend_handles_labels()
        drawn |= dict(zip(labels, handles, strict=True))
    if drawn:
        figure.legend(drawn.values(), drawn.keys(), loc="outside right upper", frameon=False, fontsize=9)
    return to_image(figure)


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
        points = [
            (row.ratio, row.attention_lost) for row in line if row.ratio and row.attention_lost is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], label=name, **line_style(index))
    axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])


def _dress(axes: Axes, rows: Sequence[Evaluation]) -> None:
    """Ratios by octaves, shares in percent, and no more ink than needed."""
    ratios = [row.ratio for row in rows if row.ratio]
    low, high = min(ratios) * 0.85, max(ratios) * 1.18
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    shown = [n for n in TICKS if low <= 1 / n <= high]
    axes.set_xticks([1 / n for n in shown], ["1" if n == 1 else f"1/{n}" for n in shown])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("ratio: visual tokens kept / all", fontsize=9)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}%")
    axes.tick_params(labelsize=8, length=3, color="#bbbbbb")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#bbbbbb")


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
