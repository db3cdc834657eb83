"""Looks at every file of a folder: what is damaged, what cannot be read, and what the index does not know."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from arkv.bulk.earlier import read
from arkv.bulk.folder import WEIGHTS, Folder
from arkv.bulk.log import EventLog
from arkv.errors import ArkvError
from arkv.pictures.files import delete, hash_of, in_threads, told

READ = 1000  # files that are hashed at a time
HELD = 16  # files that are held at a time

Item = TypeVar("Item")


@dataclass
class Verified:
    """What a look at all files has found.

    Attributes:
        damaged: names of those that differ from their hash, which are deleted, or are gone.
        unread: why some could not be read, by name; they are left as they are.
        adopted: names of those that the index had lost, and that say of themselves that they are of this job.
        renamed: names of files that this job has not made and that had its names.
    """

    damaged: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    adopted: list[str] = field(default_factory=list)
    renamed: list[str] = field(default_factory=list)

    def told(self, path: Path) -> list[str]:
        """What its owner should know of, a line each."""
        said = {
            "could not be read and was left as it is": list(self.unread),
            "is not of this job and now has a hidden name, .NAME.1.aside": self.renamed,
        }
        return [
            f"{path}: {len(names)} file{'s' * (len(names) > 1)}, such as {names[0]}: each {what}"
            for what, names in said.items()
            if names
        ]


def verify(folder: Folder, texts: Mapping[str, str]) -> Verified:
    """Compare every file with its hash. What differs is deleted and will be drawn again.

    What the index does not know and says of itself that it is of this job, to the last text, is taken up; any
    other file that has a name of the job's is renamed, and never deleted.

    Args:
        folder: of the job.
        texts: what the files say of how they were made, beside prompt and seed.

    Raises:
        ArkvError: one cannot be deleted or renamed.
    """
    found = Verified(unread=folder.unread)
    files, index = folder.job.files, folder.index
    unexpected = set(folder.unexpected)
    for place in folder.missing():
        if place not in unexpected and index.knows(place):
            found.damaged.append(files[place].file)
    known = (
        place for place in range(len(files)) if folder.is_done(place) and index.digest(place) is not None
    )
    for some in _batched(known, READ):
        hashes = in_threads(lambda place: _hashed(folder, files[place].file), some)
        for place, digest in zip(some, hashes, strict=True):
            if isinstance(digest, OSError):
                found.unread[files[place].file] = told(digest)
            elif digest != index.digest(place):
                folder.reject(place)
                found.damaged.append(files[place].file)
    for some in _batched(folder.unexpected, HELD):
        found.damaged += [files[place].file for place in some if index.knows(place)]
        _adopt(folder, [place for place in some if not index.knows(place)], texts, found)
    for name in found.damaged:
        delete(folder.path / name)
    for name in sorted(folder.archives()):
        if (expected := folder.archive_digest(name)) is None:
            continue
        digest = _hashed(folder, name)
        if isinstance(digest, OSError):
            found.unread[name] = told(digest)
        elif digest is None or digest.hex() != expected:
            found.damaged.append(name)
            folder.drop_archive(name)
    return found


def _hashed(folder: Folder, name: str) -> bytes | OSError | None:
    """SHA-256 of a file, or why it cannot be read; None if it is gone."""
    try:
        return hash_of(folder.path / name, folder.path)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error


def _adopt(folder: Folder, places: Sequence[int], texts: Mapping[str, str], found: Verified) -> None:
    """Take up files that the index does not know, or rename them."""
    rows: list[dict[str, Any]] = []
    placing = folder.job.placing
    for file in (folder.job.files[place] for place in places):
        path = folder.path / file.file
        try:
            content = read(path)
        except OSError as error:
            raise ArkvError(f"cannot read {path}: {told(error)}") from None
        said, wanted = placing.texts_of(content), dict(texts)
        if folder.weights is None and WEIGHTS in said:
            wanted[WEIGHTS] = said[WEIGHTS]
        if placing.is_of(content, folder.job.wanted(file), wanted):
            if WEIGHTS in wanted:
                folder.learn(wanted[WEIGHTS])
            digest = hashlib.sha256(content).hexdigest()
            rows.append({**folder.job.row(file), "bytes": len(content), "sha256": digest})
            found.adopted.append(file.file)
        elif not content or wanted.items() <= said.items():
            found.damaged.append(file.file)
        else:
            _rename(folder, file.file)
            found.renamed.append(file.file)
    folder.adopt(rows)


def _rename(folder: Folder, name: str) -> None:
    """Give a file a hidden name that nothing has."""
    path = folder.path / name
    numbered = (path.with_name(f".{path.name}.{number}.aside") for number in itertools.count(1))
    aside = next(each for each in numbered if not os.path.lexists(each))
    try:
        path.rename(aside)
    except OSError as error:
        raise ArkvError(f"cannot rename {path}: {told(error)}") from None


def _batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    items = iter(items)
    while some := list(itertools.islice(items, size)):
        yield some


def tell_differing(folder: Folder, events: EventLog) -> None:
    """Log the files that were drawn again and are others than they were, each once."""
    while folder.logged < len(folder.differing):
        events.write("differs", file=folder.differing[folder.logged])
        folder.logged += 1
