"""Work of somebody else that may never come back, waited for only so long."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def within(seconds: float, work: Callable[[], Result]) -> Result:
    """What some work returns or raises; it is done in a thread, or in this one where there is none to be had.

    Args:
        seconds: to wait; work that takes longer is left to itself.
        work: to be done.

    Raises:
        TimeoutError: it is not done.
    """
    returned: list[Result] = []
    raised: list[BaseException] = []

    def do() -> None:
        try:
            returned.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=do, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no thread to give
        do()
    else:
        thread.join(seconds)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError(f"it is not done after {seconds:g} s")
    return returned[0]
