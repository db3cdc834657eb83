"""How far a run is, seen from outside."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from arkv.bulk.folder import INDEX, LOG, InUse, parts
from arkv.bulk.log import read_events
from arkv.errors import ArkvError
from arkv.jobs.journal import read_journal


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
    running: bool
    rate: float | None

    def __str__(self) -> str:
        left = self.pictures - self.done - self.failed
        text = f"{self.done} of {self.pictures} pictures ({self.done / self.pictures:.0%})"
        if self.failed:
            text += f", {self.failed} could not be drawn"
        if self.rate:
            text += f", {self.rate:.2f} pictures/s"
        if not left:
            return f"{text}, complete"
        if not self.running:
            return f"{text}, not running: go on with --resume"
        return text + (f", {timedelta(seconds=round(left / self.rate))} left" if self.rate else "")


def status(out: Path) -> Status:
    """Read the indexes and the log of a folder; nothing is changed.

    Raises:
        ArkvError: there is no run in it.
    """
    rows: dict[str, dict[str, Any]] = {}
    run: dict[str, Any] = {}
    for part in parts(out) if out.is_dir() else []:
        try:
            told, found, _ = read_journal(part, "file")
        except FileNotFoundError:  # just merged into another
            continue
        run = {**told, **run}
        rows |= found
    if not rows and not run:
        raise ArkvError(f"{out} has no {INDEX}: nothing has been begun there")
    failed = sum(len(row.get("failed", {})) for row in rows.values())
    done = sum(len(row["pictures"]) for row in rows.values()) - failed
    try:
        InUse(out).release()
        running = False
    except ArkvError:
        running = True
    events, _ = read_events(out / LOG)
    return Status(int(run["pictures"]), done, failed, running, _rate(events))


def _rate(events: list[dict[str, Any]]) -> float | None:
    """Pictures of the batches since the last beginning, for every second up to the last of them."""
    begun, pictures, last = None, 0, None
    for event in events:
        if event["event"] == "begin":
            begun, pictures, last = event["time"], 0, None
        elif event["event"] == "batch":
            pictures, last = pictures + event["pictures"], event["time"]
    if begun is None or last is None:
        return None
    seconds = (datetime.fromisoformat(last) - datetime.fromisoformat(begun)).total_seconds()
    return pictures / seconds if seconds > 0 else None
