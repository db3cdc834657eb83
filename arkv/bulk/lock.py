"""Who works in a folder: one run, or the workers of one group.

A lock of the system on the file `.lock` says so, and is gone when its process is. Where the file system has
none, as some network file systems do, the file `.holder` says so: it is made by one process only, and
whoever made it touches it every few seconds. One that nobody touches any more is taken over.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from arkv.bulk.signs import began
from arkv.errors import ArkvError
from arkv.pictures.files import BINARY, NO_FOLLOW, is_out_of_threads, opened, size_of, told

LOCK = ".lock"
HOLDER = ".holder"
PATIENCE = 1.0  # seconds that somebody may look whether a folder is in use
BEAT = 5.0  # seconds between two signs of life
SILENCE = 4 * BEAT  # seconds without one after which somebody is taken for dead
LONGEST = 10_000  # bytes of what a holder says of itself


class NoLocks(OSError):
    """The file system has no locks."""


class InUse:
    """Holds a folder while it is worked in, until it is released or the process ends.

    Args:
        path: of the folder, which is made if it is missing.
        group: name of the workers that hold it together; None for this process alone.

    Raises:
        ArkvError: somebody else holds it, or it cannot be made.
    """

    def __init__(self, path: Path, group: str | None = None) -> None:
        self._path, self._made = path, not path.exists()
        self._lock: _SystemLock | _Holder = _SystemLock(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.hold(group)
        except OSError as error:
            raise ArkvError(f"cannot write {error.filename or path}: {told(error)}") from None
        except ArkvError:
            self.release()
            raise

    def hold(self, group: str | None = None) -> None:
        """Hold it for oneself, or together with the other workers of a group.

        Raises:
            ArkvError: somebody else holds it.
            OSError: it cannot be written to.
        """
        try:
            taken = self._lock.take(group)
        except NoLocks:
            self._lock = _Holder(self._path)
            taken = self._lock.take(group)
        if not taken:
            raise ArkvError(f"another run is drawing into {self._path}: wait for its end")

    def release(self) -> None:
        """Let others in. A folder that was made and has nothing in it is gone again."""
        self._lock.release()
        if self._made:
            with suppress(OSError):
                self._path.rmdir()

    def __enter__(self) -> InUse:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def is_in_use(path: Path) -> bool | None:
    """Whether somebody holds a folder; nothing in it is changed. None where nobody can say."""
    try:
        if size_of(path / HOLDER) is not None:
            return _lives(path / HOLDER, _said(path / HOLDER))
        with opened(path / LOCK) as lock:
            import fcntl

            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError as error:
        return True if _is_held(error) else None
    except ImportError:  # not on this system, where `.holder` would be there
        return False
    return False


def _is_held(error: OSError) -> bool:
    return error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


class _SystemLock:
    """A lock that the system takes back from a process that ends. The file says which group holds it."""

    def __init__(self, path: Path) -> None:
        self._file = path / LOCK
        self._descriptor: int | None = None
        self._alone = False

    def take(self, group: str | None) -> bool:
        """Try for a while; whether it went.

        Raises:
            NoLocks: there are none here.
            OSError: the file cannot be written.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            # As one of a group, first for oneself: then nobody else can be in, and one may say who is.
            if self._try(shared=False):
                self._say(group or "")
                if group is None or (self._try(shared=True) and self._says() == group):
                    self._alone = group is None
                    return True
            elif group is not None and self._try(shared=True):
                if self._says() == group:
                    self._alone = False
                    return True
                self._close()
            if time.monotonic() > deadline:
                return False
            time.sleep(PATIENCE / 20)

    def _try(self, shared: bool) -> bool:
        try:
            import fcntl
        except ImportError:
            raise NoLocks from None
        kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        while True:
            if self._descriptor is None:
                # Over NFS, only a file that is open for writing can be held for oneself.
                size_of(self._file)
                flags = os.O_RDWR | os.O_CREAT | NO_FOLLOW | BINARY
                self._descriptor = os.open(self._file, flags, 0o644)
            try:
                fcntl.flock(self._descriptor, kind)
            except OSError as error:
                if _is_held(error):
                    return False
                self._close()
                with suppress(OSError):
                    self._file.unlink()
                raise NoLocks(error.errno, error.strerror) from None
            with suppress(OSError):
                if os.fstat(self._descriptor).st_ino == self._file.stat().st_ino:
                    return True
            # Whoever held it has deleted the file.
            self._close()

    def _say(self, text: str) -> None:
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, text.encode(), 0)

    def _says(self) -> str:
        assert self._descriptor is not None
        return os.pread(self._descriptor, LONGEST, 0).decode(errors="replace")

    def release(self) -> None:
        """Let others in."""
        if self._descriptor is not None and self._alone:
            with suppress(OSError):
                self._file.unlink()
        self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Holder:
    """A file that is made by one process only and touched as long as that lives."""

    def __init__(self, path: Path) -> None:
        self._file = path / HOLDER
        self._ended = threading.Event()
        self._mine: bytes | None = None
        self._beating: threading.Thread | None = None

    def take(self, group: str | None) -> bool:
        """Try until it is clear whether somebody lives; whether it went.

        Raises:
            OSError: the file cannot be written.
        """
        mine = json.dumps({**_myself(), "group": group, "token": uuid.uuid4().hex}).encode()
        if self._mine is not None:
            self._write(mine)  # for others than before
            return True
        deadline = time.monotonic() + PATIENCE
        while not self._make(mine):
            said = _said(self._file)
            if group is not None and said.get("group") == group:
                mine = b""  # the file of another one of the group, touched by all of it
                break
            if not _lives(self._file, said):
                self._clear(said)
            elif time.monotonic() > deadline:
                return False
            else:  # a process that was killed a moment ago takes a while to end
                time.sleep(PATIENCE / 20)
        self._mine = mine
        self._beating = threading.Thread(target=self._beat, daemon=True)
        try:
            self._beating.start()
        except RuntimeError as error:
            self.release()
            if not is_out_of_threads(error):
                raise
            raise ArkvError(
                f"{self._file.parent} is on a file system without locks, and the system has no thread to "
                "give that would show this run to be alive: raise ulimit -u"
            ) from None
        return True

    def _make(self, content: bytes) -> bool:
        try:
            descriptor = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NO_FOLLOW | BINARY, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, content)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return True

    def _write(self, content: bytes) -> None:
        with opened(self._file, os.O_WRONLY) as file:
            file.truncate(0)
            file.write(content)
        self._mine = content

    def _clear(self, said: dict[str, Any]) -> None:
        """Take away what somebody who is dead has left, but not what somebody else has made since."""
        taken = self._file.with_name(f"{HOLDER}.{uuid.uuid4().hex}")
        with suppress(OSError):
            os.rename(self._file, taken)
            if _said(taken) != said:
                with suppress(OSError):
                    os.link(taken, self._file)
            taken.unlink()

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            with suppress(OSError):
                os.utime(self._file, follow_symlinks=False)

    def release(self) -> None:
        """Let others in; one of a group leaves the file to the others, and nobody touches it in the end."""
        self._ended.set()
        if (
            self._mine
            and json.loads(self._mine)["group"] is None
            and _said(self._file) == json.loads(self._mine)
        ):
            with suppress(OSError):
                self._file.unlink()
        self._mine = None


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        **_process("self"),
    }


def _process(pid: int | str) -> dict[str, Any]:
    """A process, when it began, and which numbers its container has; None for what nobody can say."""
    try:
        numbers = os.readlink(f"/proc/{pid}/ns/pid")
    except OSError:
        numbers = None
    return {"pid": os.getpid() if pid == "self" else pid, "began": began(pid), "numbers": numbers}


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _said(file: Path) -> dict[str, Any]:
    """What a holder says of itself; nothing if it is being written, or is something else."""
    try:
        with opened(file) as holder:
            said = json.loads(holder.read(LONGEST))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _lives(file: Path, said: dict[str, Any]) -> bool:
    """Whether a holder is alive: its process is there, or it touches its file."""
    me = _myself()
    is_near = said.get("host") == me["host"] and said.get("boot") is not None and said.get("group") is None
    if is_near and said["boot"] != me["boot"]:
        return False
    if is_near and said.get("numbers") == me["numbers"] is not None and isinstance(said.get("pid"), int):
        return began(said["pid"]) == said.get("began")
    # By a clock of ours: those of other machines may be wrong.
    try:
        before = os.lstat(file).st_mtime_ns
        deadline = time.monotonic() + SILENCE
        while time.monotonic() < deadline:
            time.sleep(min(BEAT / 5, SILENCE / 20))
            if os.lstat(file).st_mtime_ns != before:
                return True
    except FileNotFoundError:
        pass
    return False
