"""Ends a process that hangs, from beside it: for actors of a cluster, whom nobody watches on their machine.

A small process of its own gets a byte through a pipe every few seconds. When none comes any more, the process
is stopped, or hangs in a system call that does not come back: it is killed, and whoever has started it starts
another. One that hangs elsewhere stops sending when a unit takes many times as long as the longest before.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from arkv.bulk import signs
from arkv.pictures.files import is_out_of_threads

BESIDE = """
import os, select, signal, sys
while select.select([0], [], [], float(sys.argv[2]))[0]:
    if not os.read(0, 4096):
        sys.exit()
os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


class Watchdog:
    """Ends this process if it gives no sign of life any more, as long as this object lives.

    Args:
        silence: seconds without a sign after which it is ended.
        least: seconds that a unit may take however long the others took.
    """

    def __init__(self, silence: float, least: float = signs.LEAST) -> None:
        self._least = least
        self._begun: float | None = None
        self._longest: float | None = None
        if os.name == "nt":  # which cannot wait for a pipe
            return
        command = [sys.executable, "-I", "-S", "-c", BESIDE, str(os.getpid()), str(silence)]
        beside = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        beat = min(signs.BEAT, silence / 4)
        try:
            threading.Thread(target=_beat, args=(weakref.ref(self), beside, beat), daemon=True).start()
        except RuntimeError as error:
            beside.kill()
            beside.wait()
            if not is_out_of_threads(error):
                raise

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Within, a unit is worked on; outside, nothing is, and that may last."""
        self._begun = begun = time.monotonic()
        try:
            yield
        finally:
            self._begun = None
            self._longest = max(self._longest or 0.0, time.monotonic() - begun)

    @property
    def hangs(self) -> bool:
        """Whether a unit takes far longer than any before."""
        begun, longest = self._begun, self._longest
        if begun is None or longest is None:
            return False
        return time.monotonic() - begun > max(self._least, signs.HUNG * longest)


def _beat(watched: weakref.ref[Watchdog], beside: subprocess.Popen[bytes], every: float) -> None:
    pipe: IO[bytes] | None = beside.stdin
    assert pipe is not None
    with suppress(OSError):
        while (one := watched()) is not None:
            if not one.hangs:
                os.write(pipe.fileno(), b".")
            del one
            time.sleep(every)
    with suppress(OSError):
        pipe.close()
    beside.wait()
