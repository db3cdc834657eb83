"""Every error that arkv raises on purpose. One line each: what is wrong, with what, and what to do."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class ArkvError(ValueError):
    """Base of arkv's own errors; a `ValueError`, because nearly all of them are about an argument."""


class UnknownNameError(ArkvError):
    """A name that nothing goes by.

    Args:
        kind: what the name should have been, such as "policy".
        name: the name given.
        known: the names there are; the nearest ones are suggested.
        more: what else it is not.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], more: str = "") -> None:
        known, name = sorted(known), name if len(name) <= 100 else f"{name[:100]}..."
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}{', ' * bool(more)}{more}; {hint}")


class PromptError(ArkvError):
    """A prompt that the model cannot take."""


class BudgetError(ArkvError):
    """A budget, ratio or policy parameter that cannot be planned for."""


class CheckpointError(ArkvError):
    """A checkpoint that is missing, damaged, or belongs to another model."""


class MemoryLimitError(ArkvError):
    """More memory is needed than there is."""


class ArkvWarning(UserWarning):
    """Something went on that its owner should know of."""


def one_line(error: BaseException) -> str:
    """Type and message of somebody else's exception, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def warn(text: str) -> None:
    """Tell in one line of something that the work goes on with."""
    warnings.warn(text, ArkvWarning, stacklevel=3)


class Terminated(BaseException):
    """The process was told to end by SIGTERM."""


class NumericalError(ArkvError):
    """The model produced NaN or infinity."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says so, in one of the ways that Python, torch and arkv have; imports no torch."""
    torchs = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    if isinstance(error, (MemoryError, MemoryLimitError, torchs)):
        return True
    texts = (
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "out of memory",
        "cublas_status_alloc_failed",
    )
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
