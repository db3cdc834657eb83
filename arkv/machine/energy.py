"""Energy that the GPUs of this machine use, where NVIDIA's library is installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def energy_used() -> Iterator[Callable[[], float | None]]:
    """Within, count what all GPUs use.

    Yields:
        A function that gives the joules since the beginning; None where nobody can say.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # not installed, no driver, no permission: each is said in another way
        yield lambda: None
        return
    try:

        def read() -> float | None:
            try:  # millijoules since the driver was loaded; from Volta on
                return sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(each) for each in devices) / 1000
            except pynvml.NVMLError:
                return None

        before = read()

        def used() -> float | None:
            now = read()
            return None if before is None or now is None else now - before

        yield used
    finally:
        pynvml.nvmlShutdown()
