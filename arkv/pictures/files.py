"""Files that appear whole or not at all, and never in place of what is no file; PNG files with texts.

Names may come from a file that somebody else has written, and a folder may be one that others can write to.
So nothing here follows a symbolic link in the last part of a path, and nothing replaces or waits for what
is not a regular file. Below the folder of a job no part of a path may be a link.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from PIL import Image

THREADS = 8
"""Files that are made or read at a time: compressing, hashing and the disk leave the interpreter alone."""

BLOCK = 1 << 20  # bytes that are read at a time

# Windows has neither of these, and makes links only for administrators.
NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
BINARY = getattr(os, "O_BINARY", 0)

KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}

Content = bytes | Callable[[BinaryIO], object]
"""Of a file: all of it, or what writes it."""

Item = TypeVar("Item")
Made = TypeVar("Made")


class NotAFile(OSError):
    """What stands at a path is something else than a regular file.

    Args:
        path: that it stands at.
        what: it is.
    """

    def __init__(self, path: Path, what: str) -> None:
        text = f"it is {what}, and only a plain file is read, written or replaced"
        super().__init__(errno.EINVAL, text, str(path))


def in_threads(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """What some work that the interpreter has little part in makes of each item, in order.

    Where the system has no thread to give, it is done in this one.
    """
    items = list(items)
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            begun = [pool.submit(work, item) for item in items]
        except RuntimeError as error:
            if not is_out_of_threads(error):
                raise
            pool.shutdown(wait=False, cancel_futures=True)
            return [work(item) for item in items]
        return [each.result() for each in begun]


def is_out_of_threads(error: BaseException) -> bool:
    """Whether Python says that the system gives it no further thread."""
    return isinstance(error, RuntimeError) and "start new thread" in str(error)


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name; the next attempt uses the same place.

    The name is hidden and ends in none of the suffixes that evaluators look for.
    """
    return path.with_name(f".{path.name}.part")


def told(error: OSError | ValueError) -> str:
    """Why something cannot be read or written; a `ValueError` is about a path that no system takes."""
    return (error.strerror if isinstance(error, OSError) else None) or " ".join(str(error).split())


def size_of(path: Path | str) -> int | None:
    """Bytes of a regular file; None if nothing stands there.

    Raises:
        NotAFile: something else does.
        OSError: it cannot be looked at.
    """
    try:
        found = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not stat.S_ISREG(found.st_mode):
        raise NotAFile(Path(path), KINDS.get(stat.S_IFMT(found.st_mode), "no plain file"))
    return found.st_size


def opened(path: Path, flags: int = os.O_RDONLY, below: Path | None = None) -> BinaryIO:
    """Open a regular file itself: not what a link leads to, and without waiting for the other end of a FIFO.

    Args:
        path: of the file.
        flags: as for `os.open`.
        below: folder from which on no part of the path may be a link.

    Raises:
        NotAFile: it is something else.
        OSError: it cannot be opened.
    """
    if below is not None:
        check_folders(path.parent, below)
    size_of(path)  # says what it is, where opening would say "too many levels of links"
    descriptor = os.open(path, flags | NO_FOLLOW | BINARY, 0o644)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise NotAFile(path, KINDS.get(stat.S_IFMT(mode), "no plain file"))
        return open(descriptor, "wb" if flags & (os.O_WRONLY | os.O_RDWR) else "rb")
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise


def check_regular(path: Path) -> None:
    """Look whether there is a file at a path, or where a link there leads: what is none may never end.

    Raises:
        NotAFile: it is something else.
        OSError: it cannot be looked at.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        raise NotAFile(path, KINDS.get(stat.S_IFMT(mode), "no plain file"))


def check_folders(folder: Path, below: Path) -> None:
    """Look whether the way from one folder down to another is made of folders, as far as it is there.

    Raises:
        NotAFile: a part of it is a link or a file.
        OSError: a part cannot be looked at, or the way leads out of the folder.
    """
    steps = folder.relative_to(below).parts
    if ".." in steps:
        raise OSError(errno.EINVAL, f"it is not below {below}", str(folder))
    for step in steps:
        below = below / step
        try:
            mode = os.lstat(below).st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(mode):
            raise NotAFile(below, KINDS.get(stat.S_IFMT(mode), "a file") + " where a folder is expected")


def write_whole(files: Mapping[Path, Content], below: Path | None = None) -> None:
    """Write files so that each of them appears complete or not at all, whenever the machine stops.

    Args:
        files: contents by path, or what writes them, of one result: none appears before all of them are on
            the disk. Folders that are missing are made.
        below: folder from which on no part of a path may be a link.

    Raises:
        ArkvError: one cannot be written, or something else than a plain file has its name; nothing is
            touched then.
    """
    begun: list[Path] = []
    path = Path()
    try:
        for path in files:
            check_place(path, below)
        for path, content in files.items():
            make_folder(path.parent)
            with _new(part_of(path)) as file:
                begun.append(path)
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    content(file)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(part_of(path), path)
        for path in {each.parent for each in files}:
            sync_folder(path)
    except (OSError, ValueError) as error:
        if isinstance(error, ArkvError):  # of what writes the content
            raise
        raise ArkvError(f"cannot write {path}: {told(error)}") from None
    finally:
        for path in begun:
            with contextlib.suppress(OSError):
                part_of(path).unlink()


def check_place(path: Path, below: Path | None = None) -> None:
    """Look whether a file could be written without harm to what is none.

    Raises:
        NotAFile: a link, folder, device or FIFO has its name.
        OSError: it cannot be looked at.
        ValueError: no file can have that name.
    """
    if below is not None:
        check_folders(path.parent, below)
    size_of(path)


def _new(part: Path) -> BinaryIO:
    """A new file under a hidden name, in place of what an attempt before may have left there."""
    try:
        is_there = size_of(part) is not None
    except NotAFile:
        if not part.is_symlink():
            raise
        is_there = True  # the link goes, not what it leads to
    if is_there:
        part.unlink()
    # New: what somebody has planted here since must not be written to.
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY, 0o644)
    return open(descriptor, "wb")


def hash_of(path: Path, below: Path | None = None) -> bytes:
    """SHA-256 of a file.

    Args:
        path: of the file.
        below: as for `opened`.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    digest = hashlib.sha256()
    with opened(path, below=below) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.digest()


def delete(path: Path) -> None:
    """Delete a file, if it is there.

    Raises:
        ArkvError: it cannot be deleted.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise ArkvError(f"cannot delete {path}: {told(error)}") from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, for good.

    Raises:
        OSError: it cannot be made.
    """
    missing = []
    while not folder.exists() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync_folder(each.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; where a system has no way to ask for that, it needs none.

    Raises:
        OSError: the disk has failed.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders, and one may be written to that cannot be read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A PNG file with text chunks: for the same picture and texts, the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()
