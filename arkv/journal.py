"""A file of JSON lines that a long run can be taken up again from.

The first line says what is run; every other is a row, such as that of one policy, written as soon as it is
done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError
from arkv.files import write_whole


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

    Raises:
        ArkvError: the file was begun with other settings, is something else, or cannot be written.
    """

    def __init__(
        self, path: Path, settings: Mapping[str, Any], facts: Mapping[str, Any], key: str = "policy"
    ) -> None:
        self.path, self._key = path, key
        self.rows: dict[str, dict[str, Any]] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
            if content:
                complete = content[: content.rfind(b"\n") + 1]
                self._read(complete, settings)
                os.truncate(path, len(complete))
            else:
                # Whole or not at all: half a first line could not be told from somebody else's file.
                write_whole({path: _line({"run": {**facts, **settings}})})
        except OSError as error:
            raise ArkvError(f"cannot write {path}: {error.strerror}") from None

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row, and have it on the disk before anything else is done.

        Raises:
            ArkvError: it cannot be written.
        """
        try:
            self._write(row)
        except OSError as error:
            raise ArkvError(f"cannot write {self.path}: {error.strerror}") from None
        self.rows[row[self._key]] = dict(row)

    def _write(self, line: Mapping[str, Any]) -> None:
        with self.path.open("ab") as file:
            file.write(_line(line))
            file.flush()
            os.fsync(file.fileno())

    def _read(self, content: bytes, settings: Mapping[str, Any]) -> None:
        remedy = "take another name, or delete the file"
        try:
            first, *lines = [json.loads(line) for line in content.splitlines()]
            there = dict(first["run"])
            self.rows = {row[self._key]: dict(row) for row in lines}
        except (ValueError, TypeError, KeyError):
            raise ArkvError(f"{self.path} is there and holds something else than results: {remedy}") from None
        here = json.loads(json.dumps(settings))
        unlike = [
            f"{name} is {json.dumps(there.get(name))} there and {json.dumps(value)} here"
            for name, value in here.items()
            if there.get(name) != value
        ]
        if unlike:
            raise ArkvError(f"{self.path} was begun with other settings: {', '.join(unlike)}; {remedy}")


def _line(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content) + "\n").encode()
