"""How many threads a step on a CPU takes while other processes are at work.

Threads of a step wait for each other some hundred times. Where one of them is kept waiting by another
process, they all are, and two threads on two cores beside one busy process take several times as long as one
thread would. So a core that others keep busy is left to them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PROC = Path("/proc")
"""Where Linux tells of its processors."""

SECONDS = 0.5
"""Of work between two looks at them; the system counts in hundredths of a second."""


class Threads:
    """As many threads as there are cores that nobody else keeps busy, and never more than torch has.

    Nothing is changed where the system does not say what its cores do: it is Linux that does.

    Args:
        use: lets the operations that the calling thread starts take so many threads; None to change nothing.
    """

    def __init__(self, use: Callable[[int], object] | None) -> None:
        self._use, self._others = use, 0.0
        self._since: tuple[float, float, float] | None = None
        self._left = -SECONDS

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """Within, operations take as many threads as fit; afterwards as many as before."""
        if self._use is None:
            yield
            return
        if time.monotonic() - self._left >= SECONDS:  # what others did meanwhile says little about now
            self._since, self._others = _looked(), 0.0
        most, cores = torch.get_num_threads(), len(_cores())
        # With fewer cores than threads, the thread that asks is bound to one, and the others are to theirs.
        threads = most if cores < most else max(1, min(most, round(cores - self._others)))
        if threads != most:
            self._use(threads)
        try:
            yield
        finally:
            if threads != most:
                self._use(most)
            self._left = time.monotonic()
            if self._since is not None and self._left - self._since[0] >= SECONDS:
                self._look(self._since)

    def _look(self, before: tuple[float, float, float]) -> None:
        self._since, self._others = _looked(), 0.0
        if self._since is not None:
            passed, worked, own = (now - then for now, then in zip(self._since, before, strict=True))
            self._others = (worked - own) / passed


def _looked() -> tuple[float, float, float] | None:
    """Seconds: the time, what our cores have worked since the system was started, and this process."""
    try:
        cores = {f"cpu{number}" for number in _cores()}
        ticks = 0
        for name, *counts in map(str.split, (PROC / "stat").read_text().splitlines()):
            if name in cores:  # user, nice, system; then idle and waiting; then interrupts
                ticks += sum(map(int, [*counts[:3], *counts[5:7]]))
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()
    except (AttributeError, OSError, ValueError):  # not Linux
        return None


def _cores() -> set[int]:
    """Those that the calling thread may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
