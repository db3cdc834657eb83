"""The files of a checkpoint before a tensor is read: whether they are there, and what they are if not that.

Files come from anywhere, so nothing here trusts them: a path that cannot be looked at, a pointer in place of
a file, the wrong folder of a cache are each one line that says what to do.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from arkv.errors import CheckpointError

INDEXED = ("model.safetensors", "pytorch_model.bin")
"""Names of a folder's weight file; `.index.json` behind one of them lists the shards."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def place(source: str | Path) -> Path:
    """The path that somebody wrote, with `~` spelled out.

    Raises:
        CheckpointError: it is no path.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"the place {source!r:.60} is no path: expected a text or a pathlib.Path")
    try:
        return Path(source).expanduser()
    except RuntimeError as error:  # nobody knows whose home it is
        raise CheckpointError(f"cannot find {str(source)!r}: {error}") from None


def exists(path: Path) -> bool:
    """Whether there is a file or folder at a path.

    Raises:
        CheckpointError: nobody can say, for want of permission.
    """
    return bool(_mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a file at a path.

    Raises:
        CheckpointError: nobody can say, for want of permission.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: Path) -> bool:
    """Whether there is a folder at a path.

    Raises:
        CheckpointError: nobody can say, for want of permission.
    """
    return stat.S_ISDIR(_mode(path))


def _mode(path: Path) -> int:
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a zero byte
        return 0
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return 0
        raise CheckpointError(f"cannot look at {path}: {error.strerror}") from None


def check_content(path: Path) -> None:
    """Refuse what is plainly not the file that it is called.

    Raises:
        CheckpointError: it is empty, cannot be read, or has something else in it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(256)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    if not head:
        raise CheckpointError(f"{path} is damaged: it is empty; download it again")
    if head.startswith(LFS_POINTER):
        raise CheckpointError(
            f"{path} is a pointer of git-lfs, not the file itself: run 'git lfs pull' in its repository"
        )
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        raise CheckpointError(f"{path} is damaged: it is a web page; download the file itself")


def check_folder(folder: Path) -> None:
    """Refuse a folder that has checkpoints somewhere below it, and say which folder to name.

    Raises:
        CheckpointError: it is the hub's cache, or one repository in it.
    """
    snapshots = folder / "snapshots"
    if is_folder(snapshots) and (is_folder(folder / "blobs") or is_folder(folder / "refs")):
        newest = sorted(_children(snapshots), key=lambda path: path.stat().st_mtime)[-1:]
        told = f"name {newest[0]}" if newest else "it has no files yet"
        name = folder.name.removeprefix("models--").replace("--", "/")
        raise CheckpointError(
            f"{folder} is a repository in the hub's cache, not a checkpoint: {told}, or {name}"
        )
    for cache in (folder, folder / "hub"):
        held = [path.name for path in _children(cache) if path.name.startswith("models--")]
        if held:
            names = [name.removeprefix("models--").replace("--", "/") for name in sorted(held)]
            more = ", ..." if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder} is the hub's cache, not a checkpoint: name a repository, such as "
                f"{', '.join(names[:3])}{more}"
            )


def _children(folder: Path) -> list[Path]:
    if not is_folder(folder):
        return []
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot look into {folder}: {error.strerror}") from None


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder in the layout of transformers, in one piece or in shards.

    Safetensors are preferred where there are both kinds.

    Raises:
        CheckpointError: there are none, or a shard that the index names is missing.
    """
    for name in INDEXED:
        if is_file(folder / name):
            return [folder / name]
        index = folder / f"{name}.index.json"
        if is_file(index):
            return _shards(index)
    raise CheckpointError(
        f"{folder} has no weights: expected {' or '.join(INDEXED)}, or shards with an index"
    )


def _shards(index: Path) -> list[Path]:
    listed = read_config(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(f, str) for f in listed.values()):
        raise CheckpointError(f"{index} has no weight_map that says which file has which tensor")
    names = sorted(set(listed.values()))
    if outside := [name for name in names if not name or Path(name).name != name or "\\" in name]:
        raise CheckpointError(f"{index} names the shard {outside[0]!r}, which does not lie in its folder")
    if absent := [name for name in names if not is_file(index.parent / name)]:
        raise CheckpointError(
            f"{index.parent} lacks {', '.join(absent[:5])} ({len(absent)} of {len(names)} shards that "
            f"{index.name} names): download the rest"
        )
    return [index.parent / name for name in names]


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    path = place(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"the configuration {path} is not JSON: {error}") from None
    if content.encode().startswith(LFS_POINTER):
        check_content(path)
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the configuration {path} is not JSON: {error}") from None
    if not isinstance(read, dict):
        raise CheckpointError(f"the configuration {path} is not a JSON object")
    return read
