"""Numbers as numpy and torch have them, made Python's: a parameter may come out of an array."""

from __future__ import annotations

from typing import Any


def plain(value: Any) -> Any:
    """A scalar of numpy or torch, or one inside a list or tuple, as a Python number; all else as it is."""
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        try:
            return value.item()
        except RuntimeError:  # a tensor without a value, on the meta device
            return value
    return value


def whole(value: Any) -> int | None:
    """A whole number, also as numpy, torch or a float has it; None for anything else."""
    value = plain(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
