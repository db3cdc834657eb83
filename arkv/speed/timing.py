"""One batch against the clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling, draw, guide
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
        """The positions that are decoded, in order.

        Raises:
            ArkvError: the grid has no such line.
        """
        if self.lines is None:
            return [range(min(self.tokens or grid.tokens, grid.tokens))]
        if self.lines[-1] >= grid.rows:
            raise ArkvError(f"line {self.lines[-1]} is timed: a picture has lines 0 to {grid.rows - 1}")
        return [range(line * grid.line, (line + 1) * grid.line) for line in self.lines]


WHOLE = Extent()
"""Whole pictures."""


@dataclass(frozen=True)
class Trace:
    """One batch.

    Attributes:
        tokens: int64 `[pictures, N]`, zero where nothing was decoded.
        condition: condition tokens of a row, padding included.
        prefill: seconds.
        steps: seconds of every step, in order of the spans.
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
    places = torch.arange(grid.tokens, device=device)
    scale, temperature = torch.tensor([sampling.guidance, sampling.temperature], device=device).unbind()
    tokens = torch.zeros(pictures, grid.tokens, dtype=torch.long, device=device)
    start, clock, memory = Clock(device), Clock(device), dict[int, int | None]()
    start.mark()
    condition = model.condition(prompts, sampling.guided)
    logits = engine.begin(condition)
    start.mark()
    steps, done = [], 0
    for span in spans:
        if span.start != done:
            engine.skip(span.start)
        clock = Clock(device)
        clock.mark()
        for position in span:
            guided = guide(logits, scale) if sampling.guides(position) else logits
            place = places[position].expand(pictures)
            drawn = draw(guided[:pictures], keys, place, sampling, temperature)
            tokens[:, position] = drawn
            if position + 1 < grid.tokens:
                logits = engine.advance(drawn.repeat(2) if sampling.guided else drawn, position)
            if (position + 1) % grid.line == 0:
                engine.check()
                if position + 1 - grid.line >= span.start:
                    memory[position // grid.line] = used_memory(device)
            clock.mark()
        done = span.stop
        steps += clock.seconds()
        bar.update(len(span))
    return Trace(tokens.cpu(), condition.mask.shape[1], start.seconds()[0], steps, memory)
