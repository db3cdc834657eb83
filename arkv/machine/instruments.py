"""A clock and a memory gauge that do not disturb what they measure."""

from __future__ import annotations

import time
from itertools import pairwise
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux says how much memory this process has resident, and where its peak is forgotten."""


class Clock:
    """Seconds between marks, on the device that does the work.

    A CUDA device works behind the program's back: there a mark is an event in its queue, and nobody waits
    before `seconds` is asked for.

    Args:
        device: what is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Here one interval ends and the next begins."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """The intervals so far, one fewer than there are marks; waits for the last mark."""
        if not self._cuda:
            return [after - before for before, after in pairwise(self._times)]
        if self._events:
            self._events[-1].synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairwise(self._events)]


class PeakMemory:
    """How far the use of memory rises above what it was.

    On a CUDA device memory is what torch has handed out there, elsewhere what the process has resident.

    Args:
        device: what is measured, from now on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._forgotten = _forget_peak(device)
        self._before = used_memory(device)

    def rise(self) -> int | None:
        """Bytes between the beginning and the highest point since; None where nobody can say."""
        if self._before is None or not self._forgotten:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._before
        peak = _status("VmHWM")
        return None if peak is None else max(0, peak - self._before)


def used_memory(device: torch.device) -> int | None:
    """Bytes in use now; None where nobody can say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status("VmRSS")


def _forget_peak(device: torch.device) -> bool:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        CLEAR.write_text("5")
    except OSError:  # another system, or a container that does not let its processes
        return False
    return True


def _status(field: str) -> int | None:
    """A line of Linux's account of this process, in bytes."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return None
    sizes = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((int(size) * 1024 for size in sizes), None)
