"""Signs of life: workers see whether their driver lives, and the driver whether they do.

A worker touches a file every few seconds that has its number and its process in it. One that is stopped, or
hangs in a system call that does not come back, stops doing so; one that hangs elsewhere ends itself when a
unit takes many times as long as the longest before.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from arkv.errors import ArkvError
from arkv.pictures.files import delete, is_out_of_threads, opened, write_whole

DRIVER = "ARKV_DRIVER"
"""Environment variable with the driver's process, as `identity` tells of it."""

GROUP = "ARKV_GROUP"
"""Environment variable with the name of a driver's group of workers."""

JOB = ".job.yaml"
"""What a driver gives to its workers, beside the pictures."""

LOOK_EVERY = 0.5  # seconds
BEAT = 2.0  # seconds between two signs
SILENCE = 60.0  # seconds without one after which a worker is ended
HUNG = 20  # times the longest unit so far, after which a worker ends itself,
LEAST = 1800.0  # but no fewer seconds than these


def began(pid: int | str) -> str | None:
    """When a process of this machine began, in ticks of the system's clock.

    None for one that has ended, also if its parent has not asked for it, as in a container whose first
    process asks for nobody; and where the system does not say.

    Args:
        pid: its number, or "self".
    """
    try:
        state, *stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not on this system, or not there
        return None
    return None if state in ("Z", "X") else stat[18]


def identity(pid: int) -> str:
    """A process, such that another one that gets its number later is not taken for it."""
    return f"{pid} {began(pid) or ''}"


def is_alive(process: str) -> bool:
    """Whether a process of this machine runs that `identity` told of."""
    pid = int(process.partition(" ")[0])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        pass
    return identity(pid) == process


def sign_of(out: Path, worker: int) -> Path:
    """The file that a worker touches."""
    return out / f".worker-{worker:05d}"


def delete_left(out: Path) -> None:
    """Delete what a driver and workers that were killed have left in a folder; nobody may be at work in it.

    Raises:
        ArkvError: it cannot be deleted.
    """
    job = out / JOB
    if not os.path.lexists(job):  # a folder of a million pictures is not searched for nothing
        return
    for file in (*out.glob(".worker-[0-9][0-9][0-9][0-9][0-9]"), job):
        delete(file)


class Signs:
    """A worker's signs, and its look at those who have started it, from now on.

    If driver or torchrun's agent are gone, even killed, the process ends.

    Args:
        worker: its number.
    """

    def __init__(self, worker: int) -> None:
        self._worker = worker
        self._file: Path | None = None
        self._parent, self._driver = os.getppid(), os.environ.get(DRIVER)
        self._last = time.monotonic()
        self._longest: float | None = None
        try:
            threading.Thread(target=self._watch, daemon=True).start()
        except RuntimeError as error:
            if not is_out_of_threads(error):
                raise
            raise SystemExit(
                "arkv: error: the system has no thread to give to a worker: raise ulimit -u"
            ) from None

    @contextmanager
    def given_in(self, out: Path) -> Iterator[None]:
        """Give signs in a folder, and none any more in the end."""
        sign = sign_of(out, self._worker)
        write_whole({sign: identity(os.getpid()).encode()}, out)
        self._file, self._last = sign, time.monotonic()
        try:
            yield
        finally:
            self._file = None
            with suppress(ArkvError):
                delete(sign)

    def progress(self) -> None:
        """Say that a unit is done."""
        now = time.monotonic()
        self._longest = max(self._longest or 0.0, now - self._last)
        self._last = now

    def _watch(self) -> None:
        touched = 0.0
        while os.getppid() == self._parent and (self._driver is None or is_alive(self._driver)):
            time.sleep(LOOK_EVERY)
            now, file = time.monotonic(), self._file
            if file is not None and now - touched >= BEAT:
                touched = now
                with suppress(OSError):
                    os.utime(file, follow_symlinks=False)
            if (
                file is not None
                and self._longest is not None
                and now - self._last > max(LEAST, HUNG * self._longest)
            ):
                with suppress(OSError):
                    os.write(
                        2, b"arkv: error: a worker hangs: a unit takes many times as long as the others\n"
                    )
                break
        if self._driver is not None and not is_alive(self._driver) and os.getppid() == self._parent:
            # Nobody waits for this group any more, and its agent would start another in this one's place.
            with suppress(OSError):
                os.kill(self._parent, signal.SIGTERM)
        os._exit(1)


class Watched:
    """The workers of a driver.

    Args:
        signs: the files that they touch, in the order of their numbers from 1 on.
    """

    def __init__(self, signs: Sequence[Path]) -> None:
        self._signs = signs
        self._seen: dict[Path, tuple[int, float]] = {}

    def end_the_silent(self) -> Iterator[tuple[int, float]]:
        """End those that have given no sign for long; torchrun starts others for them.

        Yields:
            Number of a worker and the seconds that it was silent.
        """
        for number, sign in enumerate(self._signs, start=1):
            now = time.monotonic()
            try:
                touched = os.lstat(sign).st_mtime_ns
            except OSError:  # it has not begun, or is done
                self._seen.pop(sign, None)
                continue
            before, since = self._seen.get(sign, (None, now))
            if touched != before:
                self._seen[sign] = touched, now
            elif now - since > SILENCE and self._end(sign):
                self._seen[sign] = touched, now
                yield number, now - since

    def end_all(self) -> None:
        """End all, whatever they are doing."""
        for sign in self._signs:
            self._end(sign)

    @staticmethod
    def _end(sign: Path) -> bool:
        """Whether there was a process to end."""
        with suppress(OSError, ValueError):
            with opened(sign) as file:
                process = file.read(100).decode()
            if is_alive(process):
                os.kill(int(process.partition(" ")[0]), signal.SIGKILL)
                return True
        return False
