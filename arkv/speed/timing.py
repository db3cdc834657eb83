"""One batch against the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.decoding.window import parts_of
from arkv.errors import ArkvError
from arkv.grid import Grid
from arkv.machine.instruments import Clock, used_memory
from arkv.model import Model
from arkv.speed.engine import Engine


@dataclass(frozen=True)
class Extent:
    """The part of every picture that is decoded and timed; the whole if nothing is said.

    Attributes:
        tokens: only this many first visual tokens.
        lines: only these lines, from 0, each with the cache as large as it then is. The time of the others
            is interpolated.

    Raises:
        ArkvError: both are given, or a number is out of range.
    """

    tokens: int | None = None
    lines: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.tokens is not None and self.lines is not None:
            raise ArkvError("give the first tokens or the lines that are timed, not both")
        if self.tokens is not None and self.tokens < 1:
            raise ArkvError(f"tokens is {self.tokens}: expected at least 1")
        if self.lines is not None:
            object.__setattr__(self, "lines", tuple(sorted(set(self.lines))))
            if not self.lines or self.lines[0] < 0:
                raise ArkvError(f"lines is {list(self.lines or ())}: expected one or more numbers from 0")

    def spans(self, grid: Grid) -> list[range]:
        """The positions that are fed to the model, in order; the last token of a picture never is.

        Raises:
            ArkvError: the grid has no such line.
        """
        last = grid.tokens - 1
        if self.lines is None:
            return [range(min(self.tokens or last, last))]
        if self.lines[-1] >= grid.rows:
            raise ArkvError(f"line {self.lines[-1]} is timed: a picture has lines 0 to {grid.rows - 1}")
        return [range(line * grid.line, min((line + 1) * grid.line, last)) for line in self.lines]


WHOLE = Extent()
"""Whole pictures."""


@dataclass(frozen=True)
class Trace:
    """One batch.

    Attributes:
        tokens: int64 `[pictures, N]`, without meaning where nothing was decoded.
        condition: condition tokens of a row, padding included.
        prefill: seconds, the first token drawn.
        steps: seconds of every step, in order of the spans; where a line is one piece of work, its mean.
        memory: bytes in use at the end of each complete line.
    """

    tokens: Tensor
    condition: int
    prefill: float
    steps: list[float]
    memory: dict[int, int | None]


@torch.inference_mode()
def decode(
    model: Model,
    engine: Engine,
    pictures: int,
    sampling: Sampling,
    spans: Sequence[range],
    seed: int,
    bar: tqdm[Any],
) -> Trace:
    """Decode one batch of a model's example prompts against the clock, as `arkv.Decoder` does.

    Args:
        model: what draws.
        engine: whose steps are timed.
        pictures: of the batch.
        sampling: how tokens are drawn.
        spans: the positions to decode.
        seed: of the prompts and of the first picture.
        bar: is moved on by every step.
    """
    grid, device = model.spec.grid, model.device
    prompts = model.example_prompts(pictures, seed)
    keys = seed_keys(range(seed, seed + pictures)).to(device)
    steps, memory = list[float](), dict[int, int | None]()
    start = Clock(device)
    start.mark()
    condition = model.condition(prompts, sampling.guided)
    engine.begin(condition, keys, sampling)
    start.mark()
    done = 0
    for span in spans:
        if span.start != done:
            engine.skip(span.start)
        clock, pieces = Clock(device), list[range]()
        clock.mark()
        for line in parts_of(span, grid.line):
            for piece in engine.pieces(line):
                engine.decode(piece)
                clock.mark()
                pieces.append(piece)
            if len(line) == fed(grid.row(line.start), grid):
                memory[grid.row(line.start)] = used_memory(device)
        for piece, seconds in zip(pieces, clock.seconds(), strict=True):
            steps += [seconds / len(piece)] * len(piece)
        engine.check()
        done = span.stop
        bar.update(len(span))
    return Trace(engine.tokens.cpu(), condition.mask.shape[1], start.seconds()[0], steps, memory)


def fed(line: int, grid: Grid) -> int:
    """Tokens of a line that are fed to the model; the last one of a picture is not."""
    return grid.line - (line == grid.rows - 1)
