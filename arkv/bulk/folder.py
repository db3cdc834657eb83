"""The folder that a job is drawn into: which files are done, who works in it, and what is wrong with it."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arkv.bulk.log import read_events
from arkv.errors import ArkvError
from arkv.jobs.job import Job
from arkv.jobs.journal import Journal, check_settings, read_journal
from arkv.pictures.files import in_threads, write_whole
from arkv.pictures.layouts import PictureFile

INDEX = "index.jsonl"
LOG = "log.jsonl"
LOCK = ".lock"
READ = 1000  # files that are to be read at a time
PATIENCE = 1.0  # seconds that somebody may look whether a folder is in use


@dataclass(frozen=True)
class Made:
    """A file that is to be written.

    Attributes:
        file: its name.
        content: its bytes; None if no picture for it could be drawn.
        row: its line in the index.
    """

    file: str
    content: bytes | None
    row: dict[str, Any]


class Folder:
    """A job's files and the index of those that are done, which says what is there.

    Every process that writes has an index of its own, `index.jsonl` or `index-00001.jsonl` and so on, and
    appends to it when a file is on the disk. What counts is in any of them. At the end there is one.

    Args:
        path: of the folder, which is made if it is missing.
        job: what is drawn.
        account: what two runs must have in common beside the job; ready for JSON.
        facts: what else the index says of the run that began it; ready for JSON.
        part: number of the index that is written to.

    Attributes:
        rows: what is done, by file.

    Raises:
        ArkvError: the folder holds something else, was begun with other settings, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        job: Job,
        account: Mapping[str, Any],
        facts: Mapping[str, Any],
        part: int = 0,
    ) -> None:
        check_folder(path)
        self.path, self.job = path, job
        settings = {**job.settings, **account}
        self._journal = Journal(path / part_name(part), settings, facts, key="file")
        self.rows = dict(self._journal.rows)
        self._read: dict[Path, int] = {}
        for other in parts(path):
            if other != self._journal.path:
                run, rows, self._read[other] = read_journal(other, "file")
                check_settings(other, run, settings)
                self.rows |= rows
        if part == 0:
            self._prepare()

    def _prepare(self) -> None:
        """Make what has to be there even if no picture can be drawn."""
        for folder in {(self.path / file.file).parent for file in self.job.files}:
            folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.job.placing.beside(self.job.prompts).items():
            if not (self.path / name).exists():
                write_whole({self.path / name: content})

    def missing(self) -> list[PictureFile]:
        """The files that are yet to be drawn, in order. One that was deleted or cut short is."""
        return [file for file in self.job.files if not self.has(file.file)]

    def verify(self) -> list[str]:
        """Compare every file with its hash; forget and delete those that differ.

        Returns:
            The names of those.

        Raises:
            ArkvError: one cannot be deleted.
        """
        bad = []
        rows = iter(list(self.rows.values()))
        while some := list(itertools.islice(rows, READ)):
            same = in_threads(lambda row: _is_the_same(self.path, row), some)
            bad += [row["file"] for row, unchanged in zip(some, same, strict=True) if not unchanged]
        for name in bad:
            del self.rows[name]
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as error:
                raise ArkvError(f"cannot delete {self.path / name}: {error.strerror}") from None
        return bad

    def write(self, made: Iterable[Made]) -> int:
        """Write files and then their lines, so that a line never speaks of a file that is not there.

        Args:
            made: what there is of a unit; files that are done already are left alone.

        Returns:
            Pictures that are done now and were not before.

        Raises:
            ArkvError: one cannot be written.
        """
        new = [each for each in made if not self.has(each.file)]
        write_whole({self.path / each.file: each.content for each in new if each.content is not None})
        # A file that was deleted has its line already.
        if rows := [each.row for each in new if self.rows.get(each.file) != each.row]:
            self._journal.append(*rows)
            self.rows |= {row["file"]: row for row in rows}
        return sum(len(each.row["pictures"]) for each in new)

    def has(self, file: str) -> bool:
        """Whether a file is done."""
        return _is_there(self.path, self.rows.get(file))

    def refresh(self, others: Iterable[int]) -> int:
        """Take in what other processes have finished meanwhile.

        Args:
            others: numbers of the indexes that they write.

        Returns:
            Pictures.
        """
        count = 0
        for part in others:
            other = self.path / part_name(part)
            rows, self._read[other] = read_events(other, self._read.get(other, 0))
            for row in rows:
                if "file" in row and self.rows.get(row["file"]) != row:
                    self.rows[row["file"]] = row
                    count += len(row["pictures"])
        return count

    def merge(self) -> None:
        """Make one index of all, in the order of the pictures' numbers; nobody else may be writing.

        Raises:
            ArkvError: it cannot be written.
        """
        ordered = sorted(self.rows.values(), key=lambda row: min(row["pictures"]))
        others = [path for path in parts(self.path) if path != self._journal.path]
        if others or ordered != list(self._journal.rows.values()):
            self._journal.replace(ordered)
        for path in others:
            self._read.pop(path, None)
            with suppress(OSError):
                path.unlink()

    def failures(self) -> dict[int, str]:
        """Why there is no picture, by number."""
        return {
            int(number): reason
            for row in self.rows.values()
            for number, reason in row.get("failed", {}).items()
        }

    def finish(self) -> None:
        """Write what is made of all pictures.

        Raises:
            ArkvError: a picture is lacking, or a file cannot be read or written.
        """
        done = [file for file in self.job.files if "sha256" in self.rows[file.file]]
        if done:
            self.job.placing.finish(
                self.path, sorted(done, key=lambda file: file.pictures), self.job.npz_side
            )


class InUse:
    """Holds a folder while it is worked in, until it is released or the process ends.

    Args:
        path: of the folder, which is made if it is missing.
        shared: whether other workers may hold it, too.

    Raises:
        ArkvError: somebody else holds it, or it cannot be made.
    """

    def __init__(self, path: Path, shared: bool = False) -> None:
        self._path, self._lock, self._made = path, path / LOCK, not path.exists()
        self._descriptor: int | None = None
        self._exclusive = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.hold(shared)
        except OSError as error:
            raise ArkvError(f"cannot write {path}: {error.strerror}") from None
        except ArkvError:
            self.release()
            raise

    def hold(self, shared: bool) -> None:
        """Hold it for oneself, or together with others.

        Raises:
            ArkvError: somebody else holds it.
            OSError: it cannot be written to.
        """
        try:
            import fcntl
        except ImportError:  # not on this system
            return
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        deadline = time.monotonic() + PATIENCE
        while True:
            if self._descriptor is None:
                # Over NFS, only a file that is open for writing can be held for oneself.
                self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._descriptor, kind)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    return  # a file system without locks is no reason to stop
                if time.monotonic() > deadline:
                    raise ArkvError(f"another run is drawing into {self._path}: wait for its end") from None
                time.sleep(PATIENCE / 20)
                continue
            self._exclusive = not shared
            with suppress(OSError):
                if os.fstat(self._descriptor).st_ino == self._lock.stat().st_ino:
                    return
            # Whoever held it has deleted the file.
            os.close(self._descriptor)
            self._descriptor = None

    def release(self) -> None:
        """Let others in. A folder that was made and has nothing in it is gone again."""
        if self._descriptor is not None:
            if self._exclusive:
                with suppress(OSError):
                    self._lock.unlink()
            os.close(self._descriptor)
            self._descriptor = None
        if self._made:
            with suppress(OSError):
                self._path.rmdir()

    def __enter__(self) -> InUse:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def part_name(part: int) -> str:
    """Name of the index that a worker writes."""
    return INDEX if part == 0 else f"index-{part:05d}.jsonl"


def parts(path: Path) -> list[Path]:
    """The indexes of a folder that are there."""
    return sorted(found for found in path.glob("index*.jsonl") if found.name == INDEX or found.name[5] == "-")


def check_folder(path: Path) -> None:
    """Find out whether a folder can hold a job, before anything is loaded.

    Raises:
        ArkvError: it is a file, or holds what no job has written, which an evaluator would count as well.
    """
    if path.exists() and not path.is_dir():
        raise ArkvError(f"cannot write {path}: expected a folder, and it is a file")
    # In this order, because another worker may just be beginning.
    if path.is_dir() and any(p.name[0] != "." for p in path.iterdir()) and not parts(path):
        raise ArkvError(f"{path} is not empty and has no {INDEX} of an earlier run: take another folder")


def units_with(units: Iterable[Sequence[PictureFile]], missing: Iterable[PictureFile]) -> list[int]:
    """Which of a job's units have files among the missing."""
    names = {file.file for file in missing}
    return [number for number, unit in enumerate(units) if any(file.file in names for file in unit)]


def _is_the_same(out: Path, row: Mapping[str, Any]) -> bool:
    if "sha256" not in row:
        return True
    try:
        digest = hashlib.sha256()
        with (out / row["file"]).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return False
    return digest.hexdigest() == row["sha256"]


def _is_there(out: Path, row: Mapping[str, Any] | None) -> bool:
    """Whether a file is done, or none of its pictures could be drawn."""
    if row is None:
        return False
    try:
        return "bytes" not in row or (out / row["file"]).stat().st_size == row["bytes"]
    except (OSError, KeyError):
        return False
