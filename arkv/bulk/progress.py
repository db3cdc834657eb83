"""How far a run is, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path, PurePosixPath
from typing import Any

from arkv.bulk.earlier import INDEX, LOG, parts
from arkv.bulk.lock import is_in_use
from arkv.bulk.log import read_events
from arkv.errors import ArkvError
from arkv.jobs.journal import Lines, NoHeader
from arkv.pictures.files import size_of, told


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        pictures: of the job.
        done: those that are there.
        failed: those that could not be drawn.
        running: whether a run is at work; None where nobody can say.
        rate: pictures a second since it began, or of the last run.
    """

    pictures: int
    done: int
    failed: int
    running: bool | None
    rate: float | None

    def __str__(self) -> str:
        left = self.pictures - self.done - self.failed
        text = f"{self.done} of {self.pictures} pictures"
        if self.pictures:
            text += f" ({self.done / self.pictures:.0%})"
        if self.failed:
            text += f", {self.failed} could not be drawn"
        if self.rate:
            text += f", {self.rate:.2f} pictures/s"
        if left <= 0:
            return f"{text}, complete"
        if self.running is False:
            return f"{text}, not running: go on with --resume"
        return text + (f", {timedelta(seconds=round(left / self.rate))} left" if self.rate else "")


def status(out: Path) -> Status:
    """Read the indexes and the log of a folder, and look which files are there; nothing is changed.

    Raises:
        ArkvError: there is no run in it, or it cannot be read.
    """
    rows: dict[str, tuple[int, int]] = {}
    run: dict[str, Any] = {}
    try:
        for part in parts(out) if out.is_dir() else []:
            lines = Lines(part)
            with suppress(FileNotFoundError, NoHeader):  # just merged into another; not of a run
                rows |= {name: counts for _, _, row in lines.rows() for name, counts in _counted(out, row)}
            run = {**lines.run, **run}
    except OSError as error:
        raise ArkvError(f"cannot read {error.filename or out}: {told(error)}") from None
    if not run:
        raise ArkvError(f"{out} has no {INDEX}: nothing has been begun there")
    done, failed = (sum(counts[which] for counts in rows.values()) for which in (0, 1))
    pictures = run.get("pictures")
    whole = pictures if isinstance(pictures, int) and 0 <= pictures < 2**63 else done + failed
    try:
        events, _ = read_events(out / LOG)
    except OSError:
        events = []
    return Status(whole, done, failed, is_in_use(out), _rate(events))


def _counted(out: Path, row: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """A file and how many of its pictures are there and could not be drawn; nothing for what is no picture.

    A row may say anything: only whether a file is there is looked up, and only in this folder.
    """
    name, pictures, failed = row.get("file"), row.get("pictures"), row.get("failed", {})
    if not isinstance(name, str) or not isinstance(pictures, list) or not isinstance(failed, dict):
        return
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not pictures:
        return
    is_there = "bytes" not in row
    with suppress(OSError, ValueError):
        is_there = is_there or size_of(out / name) == row["bytes"]
    lost = min(len(failed), len(pictures))
    yield name, (len(pictures) - lost if is_there else 0, lost)


def _rate(events: list[dict[str, Any]]) -> float | None:
    """Pictures of the batches since the last beginning, for every second up to the last of them."""
    begun, pictures, last = None, 0, None
    for event in events:
        time = _time(event.get("time"))
        if time is None:
            continue
        if event.get("event") == "begin":
            begun, pictures, last = time, 0, None
        elif event.get("event") == "batch" and isinstance(count := event.get("pictures"), int):
            pictures, last = pictures + count, time
    if begun is None or last is None:
        return None
    seconds = (last - begun).total_seconds()
    return pictures / seconds if seconds > 0 else None


def _time(text: object) -> datetime | None:
    """The time that a log says; None if it says none, or not which part of the world's."""
    with suppress(ValueError, OverflowError):
        time = datetime.fromisoformat(text) if isinstance(text, str) else None
        return None if time is None or time.tzinfo is None else time
    return None
