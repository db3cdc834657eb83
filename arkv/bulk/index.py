"""Which files of a job are done: in forty bytes a file, since there may be millions."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard

from arkv.errors import ArkvError
from arkv.jobs.job import Job
from arkv.pictures.names import shortened

DIGEST = 32  # bytes of a SHA-256
UNKNOWN, NOT_DRAWN = -2, -1  # in place of a size


class ForeignRowError(ArkvError):
    """An index names a file that its job would not write."""


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


class Entry(NamedTuple):
    """What a row says.

    Attributes:
        position: of the file in the job.
        size: bytes; None if no picture could be drawn.
        digest: SHA-256 in hexadecimal digits; None likewise.
        failed: why there is no picture, by number.
    """

    position: int
    size: int | None
    digest: str | None
    failed: Mapping[int, str]


class Index:
    """What the rows of an index say of the files of a job.

    Names come from the job alone: a row is compared with what it must be, and never says where a file is.

    Args:
        job: whose files they are.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._sizes = array("q", [UNKNOWN]) * len(job.files)
        self._digests = bytearray(DIGEST * len(job.files))
        self._failed: dict[int, Mapping[int, str]] = {}

    def read(self, row: Mapping[str, Any]) -> Entry | None:
        """What a row says.

        Args:
            row: of an index, which anybody may have written.

        Returns:
            None for a row that cannot be right.

        Raises:
            ForeignRowError: it names a file that the job does not have.
        """
        name, pictures, size, digest = (row.get(key) for key in ("file", "pictures", "bytes", "sha256"))
        if not isinstance(name, str):
            return None
        is_drawn = _is_whole(size) and _is_digest(digest)
        position = self._position(pictures)
        if position is None or (file := self._job.files[position]).file != name:
            if all(file.file != name for file in self._job.files):
                raise ForeignRowError(f"it names {shortened(name)}, which this job would not write")
            return None
        seeds = [self._job.picture_seed(number) for number in file.pictures]
        failed = _failed(row.get("failed", {}), file.pictures)
        if pictures != list(file.pictures) or row.get("seeds") != seeds or failed is None:
            return None
        if is_drawn:  # and then one picture at least is in the file
            return Entry(position, size, digest, failed) if len(failed) < len(file.pictures) else None
        is_failed = bool(failed) and size is None and digest is None
        return Entry(position, None, None, failed) if is_failed else None

    def take(self, row: Mapping[str, Any]) -> int | None:
        """Keep what a row says.

        Returns:
            The place of its file in the job; None for a row that cannot be right.

        Raises:
            ForeignRowError: it names a file that the job does not have.
        """
        entry = self.read(row)
        if entry is None:
            return None
        position, size, digest, failed = entry
        self._sizes[position] = NOT_DRAWN if size is None else size
        if digest is not None:
            self._digests[position * DIGEST : (position + 1) * DIGEST] = bytes.fromhex(digest)
        self._failed.pop(position, None)
        if failed:
            self._failed[position] = failed
        return position

    def _position(self, pictures: object) -> int | None:
        first = pictures[0] if isinstance(pictures, list) and pictures else None
        if not _is_whole(first) or first >= self._job.pictures:
            return None
        return self._job.position(first)

    def knows(self, position: int) -> bool:
        """Whether there is a row of a file."""
        return self._sizes[position] != UNKNOWN

    def entry(self, position: int) -> Entry | None:
        """What there is of a file; None if there is no row of it."""
        if not self.knows(position):
            return None
        digest = self.digest(position)
        failed = self._failed.get(position, {})
        return Entry(position, self.size(position), None if digest is None else digest.hex(), failed)

    def size(self, position: int) -> int | None:
        """Bytes of a file; None if there is no row of it, or none of its pictures could be drawn."""
        return None if self._sizes[position] < 0 else self._sizes[position]

    def digest(self, position: int) -> bytes | None:
        """SHA-256 of a file; None where it has no size."""
        if self._sizes[position] < 0:
            return None
        return bytes(self._digests[position * DIGEST : (position + 1) * DIGEST])

    def forget(self, position: int) -> None:
        """Drop the row of a file."""
        self._sizes[position] = UNKNOWN
        self._failed.pop(position, None)

    def failures(self) -> dict[int, str]:
        """Why there is no picture, by number."""
        return {number: reason for failed in self._failed.values() for number, reason in failed.items()}

    def with_failures(self) -> list[int]:
        """The places of files that lack a picture because it could not be drawn."""
        return sorted(self._failed)

    def row(self, position: int) -> dict[str, Any]:
        """The row of a file that there is one of."""
        row, digest = self._job.row(self._job.files[position]), self.digest(position)
        if digest is not None:
            row |= {"bytes": self._sizes[position], "sha256": digest.hex()}
        if failed := self._failed.get(position):
            row["failed"] = {str(number): reason for number, reason in failed.items()}
        return row

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows in the order of the numbers of their pictures."""
        for position in self.ordered():
            if self.knows(position):
                yield self.row(position)

    def ordered(self) -> Iterator[int]:
        """The places of all files in the order of the least number of a picture in them."""
        seen = bytearray(len(self._job.files))
        for number in range(self._job.pictures):
            position = self._job.position(number)
            if not seen[position]:
                seen[position] = 1
                yield position

    def account(self) -> str:
        """A digest of all pictures that are there, by which an archive of them is known."""
        digest = hashlib.sha256()
        for position in self.ordered():
            if (one := self.digest(position)) is not None:
                digest.update(one)
        return digest.hexdigest()


def is_archive(told: object) -> TypeGuard[dict[str, Any]]:
    """Whether something says of a file how large it is, and of what it was made."""
    if not isinstance(told, dict) or not _is_whole(told.get("bytes")):
        return False
    return _is_digest(told.get("sha256")) and _is_digest(told.get("of"))


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and len(value) == 2 * DIGEST and set(value) <= set("0123456789abcdef")


def _failed(told: object, pictures: tuple[int, ...]) -> dict[int, str] | None:
    """Why pictures of a file could not be drawn; None if that cannot be right."""
    if not isinstance(told, dict):
        return None
    names = {str(number): number for number in pictures}
    if any(number not in names or not isinstance(why, str) for number, why in told.items()):
        return None
    return {names[number]: why for number, why in told.items()}
