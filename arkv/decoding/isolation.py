"""What the user's process has set for itself, and a decoder must not see; and who may use one, and when."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from arkv.errors import ArkvError


class _Float32:
    """torch's default dtype while anybody draws: it is one for all threads of the process."""

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
def isolated(device: torch.device) -> Iterator[None]:
    """Draw without gradients, in torch's own default dtype and on its default device, without autocast.

    Args:
        device: of the model.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32.held())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(torch.inference_mode())
        yield


class Turns:
    """Lets one thread in at a time; others wait.

    Args:
        what: whose turns, for the message to one who comes back while it is in.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._lock = threading.Lock()
        self._inside: int | None = None
        self._process = os.getpid()

    @property
    def forked(self) -> bool:
        """Whether the process was forked since, and a thread that is not here may be in for ever."""
        return self._process != os.getpid()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for the turn.

        Raises:
            ArkvError: this thread is in already.
        """
        if self._inside == threading.get_ident():
            raise ArkvError(
                f"{self._what} is drawing, and was called by its own on_line: take another one for that"
            )
        with self._lock:
            self._inside = threading.get_ident()
            try:
                yield
            finally:
                self._inside = None
