"""A file of JSON lines that a long run can be taken up again from.

The first line says what is run; every other is a row, such as that of one policy, written as soon as it is
done. A last line that is not complete is what an interrupt leaves, and is dropped. Any other line that
cannot be read is kept in a file beside, and what it told of is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError, warn
from arkv.pictures.files import NotAFile, opened, size_of, told, write_whole

REMEDY = "take another name"
ASIDE = ".set-aside"
"""What the name of a file has at its end that keeps the lines of another that cannot be read."""


@dataclass
class Lines:
    """The lines of a journal, read one by one.

    Attributes:
        path: of the journal.
        run: what its first line says.
        complete: bytes of the complete lines read so far.
        torn: whether an incomplete line was behind them.
        damaged: what cannot be read, as it stands there, by number of the line.
    """

    path: Path
    run: dict[str, Any] = field(default_factory=dict)
    complete: int = 0
    torn: bool = False
    damaged: dict[int, bytes] = field(default_factory=dict)

    def rows(
        self, check: Callable[[dict[str, Any]], None] = lambda run: None
    ) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Number, text and content of every line behind the first that holds a JSON object.

        Args:
            check: is told what the first line says before any other is read.

        Raises:
            ArkvError: the first line says nothing of a run.
            OSError: the file cannot be read.
        """
        with opened(self.path) as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    self.torn = True
                    break
                self.complete += len(line)
                row = parsed(line)
                if number == 1:
                    self.run = header(self.path, row)
                    check(self.run)
                elif row is None:
                    self.damaged[number] = line
                else:
                    yield number, line, row
        if not self.run:
            header(self.path, None)


def header(path: Path, line: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the first line of a journal says of its run.

    Raises:
        ArkvError: nothing.
    """
    run = None if line is None else line.get("run")
    if not isinstance(run, dict) or not run:
        raise NoHeader(
            f"{path} is there and holds something else than results, or its first line, which says what was "
            f"run, is damaged: {REMEDY}"
        )
    return dict(run)


class NoHeader(ArkvError):
    """A journal does not say what was run."""


def parsed(line: bytes) -> dict[str, Any] | None:
    """The JSON object in a line; None if it holds none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class Journal:
    """Finished rows on the disk, and a place for the next.

    Args:
        path: a file of an earlier run with the same settings, or where to begin one.
        settings: what has to be the same for rows to stand in one file; ready for JSON.
        facts: what else the first line says, of the run that began the file; ready for JSON.
        key: the field by which rows are told apart.

    Attributes:
        rows: the finished rows by their key, in the order of the file.
        run: what the first line says.

    Raises:
        ArkvError: the file was begun with other settings, is something else, or cannot be written.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], key: str = "policy"
    ) -> None:
        self.path, self._key = path, key
        self.rows: dict[str, dict[str, Any]] = {}
        here = {"run": {**facts, **settings}}
        try:
            if size_of(path):
                lines = Lines(path)
                self.rows = _by_key(lines, key)
                self.run = lines.run
                check_settings(path, self.run, settings)
                if lines.damaged:
                    set_aside(path, lines.damaged)
                    self.replace(self.rows.values())
                elif lines.torn:
                    cut(path, lines.complete)
            else:
                # Whole or not at all: half a first line could not be told from somebody else's file.
                write_whole({path: line_of(here)})
                self.run = here["run"]
        except OSError as error:
            raise ArkvError(f"cannot write {path}: {told(error)}") from None

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows, and have them on the disk before anything else is done.

        Raises:
            ArkvError: it cannot be written.
        """
        append(self.path, map(line_of, rows))
        self.rows |= {row[self._key]: dict(row) for row in rows}

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put other rows in place of those there are, all of them or, if that fails, none.

        Raises:
            ArkvError: they cannot be written.
        """
        new = {row[self._key]: dict(row) for row in rows}
        write_whole({self.path: b"".join(map(line_of, [{"run": self.run}, *new.values()]))})
        self.rows = new


def read_journal(path: Path, key: str = "policy") -> tuple[dict[str, Any], dict[str, dict[str, Any]], int]:
    """What a journal says; lines that cannot be read are passed over.

    Args:
        path: the file, which is not changed.
        key: the field by which rows are told apart.

    Returns:
        What the first line says of the run, the rows by their key, and the bytes of the complete lines.

    Raises:
        ArkvError: it is something else.
        OSError: it cannot be read.
    """
    lines = Lines(path)
    rows = _by_key(lines, key)
    return lines.run, rows, lines.complete


def _by_key(lines: Lines, key: str) -> dict[str, dict[str, Any]]:
    rows = {}
    for number, line, row in lines.rows():
        if isinstance(row.get(key), str):
            rows[row[key]] = row
        else:
            lines.damaged[number] = line
    return rows


def append(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines at the end of a journal that is there, and have them on the disk.

    Raises:
        ArkvError: it cannot be written.
    """
    try:
        # Not made anew: without a first line it would be somebody else's.
        with opened(path, os.O_WRONLY | os.O_APPEND) as file:
            file.write(b"".join(lines))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {told(error)}") from None


def cut(path: Path, complete: int) -> None:
    """Drop what is behind the complete lines.

    Raises:
        OSError: it cannot be written.
    """
    with opened(path, os.O_WRONLY) as file:
        file.truncate(complete)
        os.fsync(file.fileno())


def set_aside(path: Path, damaged: Mapping[int, bytes]) -> None:
    """Keep lines of a journal in a file beside, and warn of it.

    Args:
        path: of the journal, which is not changed.
        damaged: lines by their number.

    Raises:
        ArkvError: the file cannot be written.
    """
    beside = path.with_name(path.name + ASIDE)
    try:
        kept = b""
        if size_of(beside):
            with opened(beside) as file:
                kept = file.read()
        new = b"".join(line if line.endswith(b"\n") else line + b"\n" for line in damaged.values())
        if not kept.endswith(new):  # else the run before was ended between the two files
            write_whole({beside: kept + new})
    except NotAFile as error:
        raise ArkvError(f"cannot write {beside}: {told(error)}") from None
    numbers = ", ".join(map(str, list(damaged)[:5])) + (", ..." if len(damaged) > 5 else "")
    many = len(damaged) > 1
    warn(
        f"{path}: {len(damaged)} line{'s' * many} ({numbers}) cannot be read and {'are' if many else 'is'} "
        f"now in {beside.name}; what is missing is done again"
    )


def check_settings(
    path: Path, there: Mapping[str, Any], settings: Mapping[str, Any], remedy: str = REMEDY
) -> None:
    """Compare what a journal was begun with.

    Args:
        path: of the journal.
        there: what its first line says.
        settings: what it has to say.
        remedy: what to do if it does not.

    Raises:
        ArkvError: something differs; says what.
    """
    unlike = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(value)} here"
        for name, value in json.loads(json.dumps(settings)).items()
        if there.get(name) != value
    ]
    if unlike:
        raise ArkvError(f"{path} was begun with other settings: {', '.join(unlike)}; {remedy}")


def line_of(content: Mapping[str, Any]) -> bytes:
    """A line of a journal."""
    return (json.dumps(content) + "\n").encode()
