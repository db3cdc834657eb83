"""From the rounds of a configuration to a row of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy

from arkv.decoding.sampling import Sampling
from arkv.estimate import estimate
from arkv.grid import Grid
from arkv.model import Model
from arkv.speed.contestant import Contestant
from arkv.speed.measurement import Line, Measurement
from arkv.speed.roofline import StepBytes
from arkv.speed.timing import Extent, fed


def summary(
    model: Model,
    one: Contestant,
    sampling: Sampling,
    extent: Extent,
    spans: Sequence[range],
    turns: bool,
    bandwidth: float,
    weights: int,
) -> Measurement:
    """What all rounds of a configuration come to."""
    spec, wanted = model.spec, one.wanted
    positions = [position for span in spans for position in span]
    whole = len(positions) == spec.grid.tokens - 1
    rows = wanted.batch_size * (2 if sampling.guided else 1)
    condition = one.traces[0].condition
    heads = spec.layers * spec.kv_heads * rows
    slots = [condition + one.engine.resident(position) for position in positions]
    slot = one.slot_bytes
    moved = [StepBytes(weights, heads * slot * held, heads * slot).total for held in slots]

    steps = numpy.array([trace.steps for trace in one.traces])
    prefill = [trace.prefill for trace in one.traces]
    lines = _complete_lines(positions, spec.grid)
    by_line = [
        Line(
            line=line,
            milliseconds=1000 * float(numpy.median(steps[:, places].mean(1))),
            slots=float(numpy.mean([slots[i] for i in places])),
            bytes=float(numpy.mean([moved[i] for i in places])),
            memory=one.traces[-1].memory[line],
        )
        for line, places in lines.items()
    ]
    if extent.lines is None:
        seconds = [p + float(s.sum()) for p, s in zip(prefill, steps, strict=True)]
        tokens = spec.grid.tokens if whole else len(positions)
    else:
        means = [[float(s[places].mean()) for places in lines.values()] for s in steps]
        everywhere = range(spec.grid.rows)
        counts = numpy.array([fed(line, spec.grid) for line in everywhere])
        seconds = [
            p + float(numpy.interp(everywhere, list(lines), mean) @ counts)
            for p, mean in zip(prefill, means, strict=True)
        ]
        tokens = spec.grid.tokens
    median = statistics.median(seconds)
    return Measurement(
        model=spec.name,
        policy=wanted.policy,
        ratio=one.ratio,
        batch_size=wanted.batch_size,
        memory=wanted.memory,
        compile=one.compile,
        guided=sampling.guided,
        tokens=None if whole or extent.lines is not None else tokens,
        lines=None if whole or extent.lines is None else list(extent.lines),
        turns=turns,
        tokens_per_second=wanted.batch_size * tokens / median,
        pictures_per_second=wanted.batch_size / median if tokens == spec.grid.tokens else None,
        milliseconds_per_step=1000 * float(numpy.median(steps)),
        milliseconds_per_step_p95=1000 * float(numpy.percentile(steps, 95)),
        prefill_seconds=statistics.median(prefill),
        kv_bytes=one.kv_bytes,
        full_kv_bytes=estimate(model, one.policy, wanted.batch_size, sampling.guided, condition).full_kv,
        peak_bytes=None if one.peak_rise is None else one.peak_rise + _model_bytes(model),
        weight_bytes=weights,
        step_bytes=float(numpy.mean(moved)),
        bandwidth=bandwidth,
        roofline_share=float(numpy.mean(moved)) / bandwidth / float(steps.mean()),
        cold_seconds=one.cold_seconds,
        seconds=seconds,
        by_line=by_line,
    )


def _complete_lines(positions: Sequence[int], grid: Grid) -> dict[int, list[int]]:
    """The lines of which every position is there, and where among the positions each of these stands."""
    lines: dict[int, list[int]] = {}
    for place, position in enumerate(positions):
        lines.setdefault(grid.row(position), []).append(place)
    return {line: places for line, places in lines.items() if len(places) == fed(line, grid)}


def _model_bytes(model: Model) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
