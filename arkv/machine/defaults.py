"""What the user's process has set for torch as a whole, and arkv must not see."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


class _Float32:
    """torch's default dtype while anybody draws or loads: it is one for all threads of the process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._usual = torch.float32

    @contextmanager
    def held(self) -> Iterator[None]:
        with self._lock:
            if self._inside == 0:
                self._usual = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if self._inside == 0:
                    torch.set_default_dtype(self._usual)


_float32 = _Float32()


@contextmanager
def torchs_own(device: torch.device) -> Iterator[None]:
    """Within, the default dtype and the default device are those that torch comes with, without autocast.

    Args:
        device: where it is computed.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32.held())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        yield
