"""What happened in a run, as JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from arkv.jobs.journal import parsed
from arkv.pictures.files import opened


class EventLog:
    """A file that workers append to; a line says when, who and what.

    Args:
        path: the file; None to write nothing.
        worker: number of the process that writes.
    """

    def __init__(self, path: Path | None, worker: int = 0) -> None:
        self.path, self.worker = path, worker

    def write(self, event: str, **facts: Any) -> None:
        """Add a line.

        Args:
            event: its name.
            facts: what there is to say; ready for JSON.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self.add([{"time": now, "worker": self.worker, "event": event, **facts}])

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Add lines as they are."""
        if self.path is None or not lines:
            return
        text = "".join(json.dumps(line) + "\n" for line in lines)
        # A log that cannot be written must not stop what it tells of. Workers share the file: one write.
        with suppress(OSError), opened(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND) as file:
            file.write(text.encode())


class EventList(EventLog):
    """Events that somebody else writes down."""

    def __init__(self) -> None:
        super().__init__(None, os.getpid())
        self._lines: list[Mapping[str, Any]] = []

    def add(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Keep them."""
        self._lines += lines

    def take(self) -> list[Mapping[str, Any]]:
        """Those since the last time."""
        taken, self._lines = self._lines, []
        return taken


def read_events(path: Path, start: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The complete lines of a log from some byte on, and the byte behind them.

    A line that holds no JSON object is passed over: somebody was killed while writing it.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with opened(path) as file:
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return [], start
    complete = content.rfind(b"\n") + 1
    lines = map(parsed, content[:complete].split(b"\n"))
    return [line for line in lines if line is not None], start + complete
