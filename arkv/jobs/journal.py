"""A file of JSON lines that a long run can be taken up again from.

The first line says what is run; every other is a row, such as that of one policy, written as soon as it is
done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError
from arkv.pictures.files import write_whole

REMEDY = "take another name, or delete the file"


class Journal:
    """Finished rows on the disk, and a place for the next.

    A last line that is not complete, as an interrupt leaves it, is dropped from the file.

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
            if path.exists() and path.stat().st_size:
                self.run, self.rows, complete = read_journal(path, key)
                check_settings(path, self.run, settings)
                os.truncate(path, complete)
            else:
                # Whole or not at all: half a first line could not be told from somebody else's file.
                write_whole({path: _line(here)})
                self.run = here["run"]
        except OSError as error:
            raise ArkvError(f"cannot write {path}: {error.strerror}") from None

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Write rows, and have them on the disk before anything else is done.

        Raises:
            ArkvError: it cannot be written.
        """
        try:
            # Not made anew: without a first line it would be somebody else's.
            with open(os.open(self.path, os.O_WRONLY | os.O_APPEND), "wb") as file:
                file.write(b"".join(map(_line, rows)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise ArkvError(f"cannot write {self.path}: {error.strerror}") from None
        self.rows |= {row[self._key]: dict(row) for row in rows}

    def replace(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put other rows in place of those there are, all of them or, if that fails, none.

        Raises:
            ArkvError: they cannot be written.
        """
        new = {row[self._key]: dict(row) for row in rows}
        write_whole({self.path: b"".join(map(_line, [{"run": self.run}, *new.values()]))})
        self.rows = new


def read_journal(path: Path, key: str = "policy") -> tuple[dict[str, Any], dict[str, dict[str, Any]], int]:
    """What a journal says; a last line that is not complete is passed over.

    Args:
        path: the file, which is not changed.
        key: the field by which rows are told apart.

    Returns:
        What the first line says of the run, the rows by their key, and the bytes of the complete lines.

    Raises:
        ArkvError: it is something else.
        OSError: it cannot be read.
    """
    content = path.read_bytes()
    complete = content.rfind(b"\n") + 1
    try:
        first, *lines = [json.loads(line) for line in content[:complete].splitlines()]
        run = dict(first["run"])
        rows = {row[key]: dict(row) for row in lines}
    except (ValueError, TypeError, KeyError):
        raise ArkvError(f"{path} is there and holds something else than results: {REMEDY}") from None
    return run, rows, complete


def check_settings(path: Path, there: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Compare what a journal was begun with.

    Raises:
        ArkvError: something differs; says what.
    """
    unlike = [
        f"{name} is {json.dumps(there.get(name))} there and {json.dumps(value)} here"
        for name, value in json.loads(json.dumps(settings)).items()
        if there.get(name) != value
    ]
    if unlike:
        raise ArkvError(f"{path} was begun with other settings: {', '.join(unlike)}; {REMEDY}")


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
