"""What the benchmark says of a configuration, and back from JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arkv.speed.engine import BASELINES


@dataclass(frozen=True)
class Line:
    """The steps of one line.

    Attributes:
        line: from 0.
        milliseconds: a step's, mean of the line, median of the rounds.
        slots: slots of a head that a step attends to, condition included; mean of heads and steps.
        bytes: moved a step.
        memory: bytes in use at the end of the line, in the last round; None where nobody can say.
    """

    line: int
    milliseconds: float
    slots: float
    bytes: float
    memory: int | None


@dataclass(frozen=True)
class Measurement:
    """What a configuration took.

    Attributes:
        model: what drew.
        policy: with its parameters, such as "linear:ratio=1/6"; or a baseline.
        ratio: budget by the visual tokens of a picture, `B / N`; 1 keeps everything.
        batch_size: pictures decoded at a time.
        memory: as in `arkv.speed.bench.Configuration`.
        compile: how; of a baseline, whether transformers' model was compiled.
        guided: whether every picture had an unconditional row too.
        tokens: as in `arkv.speed.timing.Extent`; None if not only the first tokens were decoded.
        lines: as in `Extent`; None if whole pictures were decoded.
        turns: whether all configurations of the same batch or memory took turns; if not, each had the
            machine for itself, one after the other.
        tokens_per_second: visual tokens, median of the rounds; guidance rows are not counted twice.
        pictures_per_second: from the same median; None if only the first tokens were decoded.
        milliseconds_per_step: median over all steps of all rounds; a step is one token of every picture of
            the batch. Of captured lines it is known what a line took, and its mean stands for its steps.
        milliseconds_per_step_p95: 95th percentile of the same.
        prefill_seconds: conditioning and prefill, median of the rounds.
        kv_bytes: keys and values held at the end.
        full_kv_bytes: what the full cache takes for the batch.
        peak_bytes: the most memory that the cold batches needed, with the weights; None where nobody can say.
        weight_bytes: part of the weights that a step reads.
        step_bytes: what a step has to move (see `arkv.speed.roofline`), mean of the steps.
        bandwidth: bytes a second of a large copy on this machine.
        roofline_share: step_bytes by bandwidth by the mean time of a step. More than 1 is possible where
            weights or cache fit into the processor's own caches.
        cold_seconds: wall time of the first batch, compilation included. Graphs that an earlier
            configuration of the run has left are not compiled again.
        seconds: time of every batch that was timed, in order of the rounds: conditioning, prefill and
            decoding, with what was interpolated; drawing the pixels is not in it.
        by_line: the complete lines among what was decoded.
    """

    model: str
    policy: str
    ratio: float
    batch_size: int
    memory: int | None
    compile: str
    guided: bool
    tokens: int | None
    lines: list[int] | None
    turns: bool
    tokens_per_second: float
    pictures_per_second: float | None
    milliseconds_per_step: float
    milliseconds_per_step_p95: float
    prefill_seconds: float
    kv_bytes: int
    full_kv_bytes: int
    peak_bytes: int | None
    weight_bytes: int
    step_bytes: float
    bandwidth: float
    roofline_share: float
    cold_seconds: float
    seconds: list[float]
    by_line: list[Line]

    @property
    def baseline(self) -> bool:
        """Whether another library decoded."""
        return self.policy in BASELINES

    @property
    def group(self) -> tuple[str, int | None, int | None]:
        """What it has in common with those that it is compared with: the batch size, or the memory."""
        return self.model, self.batch_size if self.memory is None else None, self.memory


@dataclass(frozen=True)
class Refusal:
    """A configuration that could not be measured.

    Attributes:
        model: what was to draw.
        policy: as in `arkv.speed.bench.Configuration`.
        batch_size: likewise.
        memory: likewise.
        error: why not.
    """

    model: str
    policy: str
    batch_size: int
    memory: int | None
    error: str


def from_dict(row: Mapping[str, Any]) -> Measurement | Refusal:
    """Back from `dataclasses.asdict`; fields that somebody has added are left out."""
    kind = Refusal if "error" in row else Measurement
    known = {each.name: row[each.name] for each in dataclasses.fields(kind)}
    if kind is Measurement:
        known["by_line"] = [Line(**line) for line in known["by_line"]]
    return kind(**known)


def speedups(rows: Sequence[Measurement]) -> list[float | None]:
    """Times as fast as the full cache of the same batch size or memory, median over rounds.

    None where the rows have no full cache to compare with: a policy of arkv's that keeps everything.
    """
    references: dict[tuple[str, int | None, int | None], Measurement] = {}
    for row in rows:
        if row.ratio >= 1 and not row.baseline:
            references.setdefault(row.group, row)

    def rates(row: Measurement) -> list[float]:
        return [row.batch_size / seconds for seconds in row.seconds]

    return [
        None
        if (base := references.get(row.group)) is None
        else statistics.median(a / b for a, b in zip(rates(row), rates(base), strict=False))
        for row in rows
    ]
