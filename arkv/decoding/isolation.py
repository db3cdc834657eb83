"""What the user's process has set for itself, and a decoder must not see; and who may use one, and when."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from arkv.errors import ArkvError
from arkv.machine.defaults import torchs_own


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Draw without gradients, in torch's own default dtype and on its default device, without autocast.

    Args:
        device: of the model.
    """
    with torchs_own(device), torch.inference_mode():
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
