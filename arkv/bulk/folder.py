"""The folder that a job is drawn into: which files are done, and what is wrong with them.

Nothing in it is trusted but what the job itself says. Names come from the job, never from the index; a row
that names anything else ends the run before a file is touched.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from arkv.bulk.earlier import all_lines, changed_prompts, is_known, part_name, parts, read
from arkv.bulk.index import ForeignRowError, Index, Made, is_archive
from arkv.bulk.log import read_events
from arkv.errors import ArkvError
from arkv.jobs.job import Job
from arkv.jobs.journal import Lines, NoHeader, append, check_settings, cut, line_of, set_aside
from arkv.pictures.files import (
    NotAFile,
    check_folders,
    check_place,
    delete,
    hash_of,
    make_folder,
    size_of,
    told,
    write_whole,
)
from arkv.pictures.names import shortened

ARCHIVES = "archives"
"""What an index says in its first line of files that are made of all pictures."""

WEIGHTS = "weights"
"""What the account says of the weights, where they have been loaded; a driver that has not does not know."""


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
        index: what is done.
        unexpected: places of files that are there and not, or not in that size, in the index.
        unread: why files cannot even be looked at, by name.
        differing: names of files that were drawn again and are others than they were.
        logged: how many of those have been told of.

    Raises:
        ArkvError: the folder holds something else, was begun with other settings, or cannot be written; or
            the index names what this job would not write. Nothing has been touched then.
    """

    def __init__(
        self,
        path: Path,
        job: Job,
        account: Mapping[str, Any],
        facts: Mapping[str, Any],
        part: int = 0,
    ) -> None:
        self.path, self.job, self.part = path, job, part
        self.index, self.differing, self.logged = Index(job), list[str](), 0
        self._settings = {**job.settings, **account}
        self._run = {**facts, **self._settings}
        self._read: dict[Path, int] = {}
        self._done, self.unexpected = bytearray(len(job.files)), array("q")
        self.unread: dict[str, str] = {}
        self._last, self._is_sorted, self._is_changed = -1, True, False
        self._folders: set[str] = set()
        self._archives: dict[str, dict[str, Any]] = {}
        mine = path / part_name(part)
        try:
            damaged, torn = self._load(mine)
            self._look()
        except OSError as error:
            raise ArkvError(f"cannot read {error.filename or path}: {told(error)}") from None
        try:
            for index, lines in damaged.items() if part == 0 else ():
                set_aside(index, lines)
            if mine not in self._read:
                write_whole({mine: line_of({"run": self._run})}, path)
            elif mine in torn:
                cut(mine, self._read[mine])
            if part == 0:
                self._prepare()
        except OSError as error:
            raise ArkvError(f"cannot write {error.filename or path}: {told(error)}") from None
        self._is_changed |= bool(damaged)

    def _load(self, mine: Path) -> tuple[dict[Path, dict[int, bytes]], set[Path]]:
        """Read all indexes; the lines that cannot be read, and which files have half a last line."""
        damaged, torn = dict[Path, dict[int, bytes]](), set[Path]()
        for path in parts(self.path):
            if not size_of(path):
                continue
            lines, number = Lines(path), 1
            try:
                for number, line, row in lines.rows(partial(self._check, path)):
                    position = self.index.take(row)
                    if position is None:
                        lines.damaged[number] = line
                    elif path == mine:
                        self._note_order(row)
            except ForeignRowError as error:
                raise ArkvError(
                    f"{path}, line {number}: {error}; nothing was touched: see who has written it, and take "
                    "the line out, or take another folder"
                ) from None
            except NoHeader:
                if self.part or not is_known(self.path, self.job):
                    raise
                damaged[path] = all_lines(path)
                self._is_changed = True
                continue
            self._read[path] = lines.complete
            if path == mine:
                more = {"pictures": self.job.pictures} if "pictures" in lines.run else {}
                self._run = {**lines.run, **self._told(lines.run), **more}
                self._is_changed |= self._run != lines.run
            if lines.damaged:
                damaged[path] = lines.damaged
            if lines.torn:
                torn.add(path)
        return damaged, torn

    def _told(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The settings, but for weights that only an earlier run has seen."""
        settings = dict(self._settings)
        if settings.get(WEIGHTS) is None and WEIGHTS in settings:
            settings[WEIGHTS] = run.get(WEIGHTS)
        return settings

    def _check(self, path: Path, run: Mapping[str, Any]) -> None:
        """Compare what an index was begun with; more prompts than there are no difference."""
        settings = self._told(run)
        if run.get(WEIGHTS) is None:
            settings.pop(WEIGHTS, None)
        for name, archive in dict(run.get(ARCHIVES) or {}).items():
            if self.job.placing.side_of(name) is None:
                raise ForeignRowError(f"it names {shortened(name)}, which this job would not write")
            if is_archive(archive):
                self._archives[name] = archive
        if self.job.includes(run):
            settings = {
                name: value for name, value in settings.items() if name not in ("prompts", "extended")
            }
        remedy = "take another folder"
        if "prompts" in settings and (changed := changed_prompts(path, run, self.job)):
            remedy = f"{'; '.join(changed)}; {remedy}"
        check_settings(path, run, settings, remedy)

    def _note_order(self, row: Mapping[str, Any]) -> None:
        least = min(row["pictures"])
        self._is_sorted, self._last = self._is_sorted and least > self._last, least

    def _look(self) -> None:
        """Find out which files are there, and that none of them is something else; nothing is touched."""
        root = os.fspath(self.path)  # a path for each of a million files would take longer than looking
        for position, file in enumerate(self.job.files):
            parent = file.file.rpartition("/")[0]
            if parent not in self._folders:
                check_folders(self.path / parent, self.path)
                self._folders.add(parent)
            try:
                size = size_of(f"{root}/{file.file}")
            except NotAFile as error:
                raise ArkvError(f"cannot draw into {self.path}: {file.file}: {told(error)}") from None
            except OSError as error:  # what cannot be looked at is neither lost nor damaged
                self.unread[file.file] = told(error)
                size = self.index.size(position)
            expected = self.index.size(position)
            if self.index.knows(position) and (expected is None or expected == size):
                self._done[position] = 1
            elif size is not None:
                self.unexpected.append(position)
        for name in self.archives():
            size_of(self.path / name)
        for name in self.job.placing.beside(self.job.prompts):
            check_place(self.path / name, self.path)

    def archives(self) -> set[str]:
        """Names of what is made of all pictures, by this run or by one before."""
        mine = self.job.placing.archive(self.job.npz_side)
        return {*self._archives, *(() if mine is None else (mine,))}

    def archive_digest(self, name: str) -> str | None:
        """SHA-256 of what is made of all pictures; None if nobody has said."""
        return self._archives[name]["sha256"] if name in self._archives else None

    def _prepare(self) -> None:
        """Make what has to be there even if no picture can be drawn, and mend it where it is another."""
        for parent in self._folders:
            make_folder(self.path / parent)
        for name, content in self.job.placing.beside(self.job.prompts).items():
            path = self.path / name
            if size_of(path) != len(content) or read(path) != content:
                write_whole({path: content}, self.path)

    def missing(self) -> list[int]:
        """The places of the files that are yet to be drawn, in order."""
        return [position for position, done in enumerate(self._done) if not done]

    def missing_pictures(self) -> int:
        """How many pictures are in those."""
        return sum(len(self.job.files[position].pictures) for position in self.missing())

    def is_done(self, position: int) -> bool:
        """Whether a file is there as the index says, or none of its pictures could be drawn."""
        return bool(self._done[position])

    @property
    def weights(self) -> str | None:
        """What pictures are drawn with, if anybody has said."""
        weights = self._run.get(WEIGHTS)
        return weights if isinstance(weights, str) else None

    def reject(self, position: int) -> None:
        """Have a file count as missing."""
        self._done[position] = 0

    def adopt(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take up files that are there, and that the index does not know."""
        if rows:
            append(self.path / part_name(self.part), map(line_of, rows))
        for row in rows:
            self._keep(row)

    def drop_archive(self, name: str) -> None:
        """Forget what was made of all pictures, and delete it.

        Raises:
            ArkvError: it cannot be deleted.
        """
        self._is_changed |= self._archives.pop(name, None) is not None
        delete(self.path / name)

    def learn(self, weights: str) -> None:
        """Take note of the weights that pictures are drawn with.

        Raises:
            ArkvError: others were used before.
        """
        known = self.weights
        if known is None:
            self._run[WEIGHTS] = weights
            self._is_changed = True
        elif known != weights:
            raise ArkvError(
                f"{self.path} was begun with other settings: weights is {known} there and {weights} here; "
                "take another folder"
            )

    def forget_failures(self) -> int:
        """Have the pictures that could not be drawn count as missing.

        Returns:
            How many they are.
        """
        count = len(self.index.failures())
        for position in self.index.with_failures():
            self.index.forget(position)
            self._done[position] = 0
        self._is_changed |= count > 0
        return count

    def write(self, made: Iterable[Made]) -> int:
        """Write files and then their lines, so that a line never speaks of a file that is not there.

        Args:
            made: what there is of a unit; files that are done already are left alone.

        Returns:
            Pictures that are done now and were not before.

        Raises:
            ArkvError: one cannot be written.
        """
        new = [each for each in made if self._is_new(each.row)]
        write_whole(
            {self.path / each.file: each.content for each in new if each.content is not None}, self.path
        )
        # A file that was deleted and is the same again has its line already; but who waits for a worker goes
        # by the lines that it writes.
        if rows := [each.row for each in new if self.part or not self._says(each.row)]:
            append(self.path / part_name(self.part), map(line_of, rows))
        return sum(self._keep(each.row) for each in new)

    def _is_new(self, row: Mapping[str, Any]) -> bool:
        entry = self.index.read(row)
        return entry is not None and not self._done[entry.position]

    def _says(self, row: Mapping[str, Any]) -> bool:
        """Whether the index has the same row of a file."""
        entry = self.index.read(row)
        return entry is not None and self.index.entry(entry.position) == entry

    def _keep(self, row: Mapping[str, Any]) -> int:
        """Count a file as done; its pictures if it was not."""
        entry = self.index.read(row)
        if entry is None:
            return 0
        before = self.index.entry(entry.position)
        if before != entry:
            self.index.take(row)
            self._note_order(row)
            if before is not None and before.digest is not None is not entry.digest:
                self.differing.append(row["file"])
        is_new = not self._done[entry.position]
        self._done[entry.position] = 1
        return len(row["pictures"]) if is_new else 0

    def refresh(self, others: Iterable[int]) -> int:
        """Take in what other processes have finished meanwhile.

        Args:
            others: numbers of the indexes that they write.

        Returns:
            Pictures.

        Raises:
            ArkvError: they have other weights than those before.
        """
        count = 0
        for part in others:
            other = self.path / part_name(part)
            rows, self._read[other] = read_events(other, self._read.get(other, 0))
            for row in rows:
                if isinstance(run := row.get("run"), dict):
                    if run.get(WEIGHTS) is not None:
                        self.learn(run[WEIGHTS])
                else:
                    count += self._keep(row)
        return count

    def merge(self) -> None:
        """Make one index of all, in the order of the pictures' numbers; nobody else may be writing.

        Raises:
            ArkvError: it cannot be written.
        """
        mine = self.path / part_name(self.part)
        others = [path for path in parts(self.path) if path != mine]
        if others or self._is_changed or not self._is_sorted:
            write_whole({mine: self._write_rows}, self.path)
            self._is_changed, self._is_sorted = False, True
        for path in others:
            self._read.pop(path, None)
            with suppress(OSError):
                path.unlink()

    def _write_rows(self, file: BinaryIO) -> None:
        archives = {ARCHIVES: self._archives} if self._archives else {}
        run = {name: value for name, value in self._run.items() if name != ARCHIVES}
        file.write(line_of({"run": {**run, **archives}}))
        for row in self.index.rows():
            file.write(line_of(row))

    def failures(self) -> dict[int, str]:
        """Why there is no picture, by number."""
        return self.index.failures()

    def finish(self) -> None:
        """Write what is made of all pictures, unless it is there and of these.

        Raises:
            ArkvError: a picture is lacking, or a file cannot be read or written.
        """
        placing, account = self.job.placing, ""
        for name in self.archives():
            account = account or self.index.account()
            if self._archives.get(name, {}).get("of") == account:
                continue
            done = [place for place in self.index.ordered() if self.index.digest(place) is not None]
            if not done:
                self.drop_archive(name)
                continue
            path = self.path / name
            pictures = [self.path / self.job.files[place].file for place in done]
            placing.write_archive(path, pictures, placing.side_of(name) or None)
            digest = hash_of(path, self.path).hex()
            self._archives[name] = {"bytes": size_of(path), "sha256": digest, "of": account}
            self._is_changed = True
        self.merge()
