"""How many threads a step on a CPU takes while other processes are at work.

Threads of a step wait for each other some hundred times. Where one of them is kept waiting by another
process, they all are, and two threads on two cores beside one busy process take several times as long as one
thread would. So a core that others keep busy is left to them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

PROC = Path("/proc")
"""Where Linux tells of its processors."""

SECONDS = 0.5
"""Between two looks at them; the system counts hundredths of a second."""


class Threads:
    """As many threads as there are cores that nobody else keeps busy, and never more than torch has.

    Nothing is changed where the system does not say what its cores do: it is Linux that does.

    Args:
        adapts: whether to look at all.
    """

    def __init__(self, adapts: bool) -> None:
        self._adapts, self._others = adapts, 0.0
        self._before = self._looked() if adapts else None

    @contextmanager
    def fitted(self) -> Iterator[None]:
        """Within, torch has as many threads as fit; afterwards as many as before."""
        most = torch.get_num_threads()
        threads = self._fitting(most) if self._adapts else most
        if threads == most:
            yield
            return
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(most)

    def _fitting(self, most: int) -> int:
        if self._before is None or most == 1:
            return most
        if time.monotonic() - self._before[0] >= SECONDS:
            before, self._before = self._before, self._looked()
            if self._before is None:
                return most
            passed, busy, own = (now - then for now, then in zip(self._before, before, strict=True))
            self._others = (busy - own) / passed
        return max(1, min(most, round(len(_cores()) - self._others)))

    def _looked(self) -> tuple[float, float, float] | None:
        """Seconds: the time, what all cores have worked since the start of the system, and this process."""
        try:
            lines = (PROC / "stat").read_text().splitlines()
            cores = {f"cpu{number}" for number in _cores()}
            worked = 0
            for name, *ticks in map(str.split, lines):
                if name in cores:  # user, nice, system; then idle and waiting; then interrupts
                    worked += sum(map(int, [*ticks[:3], *ticks[5:7]]))
            return time.monotonic(), worked / os.sysconf("SC_CLK_TCK"), time.process_time()
        except (AttributeError, OSError, ValueError):  # not Linux
            return None


def _cores() -> set[int]:
    """Those that this process may run on."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
