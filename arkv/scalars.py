"""Numbers as numpy, torch and exact arithmetic have them, made Python's; and values on one short line."""

from __future__ import annotations

import reprlib
from decimal import Decimal
from fractions import Fraction
from typing import Any

MOST = 10**9
"""Of whatever is counted: what is beyond is a slip, and no memory would hold it."""


def plain(value: Any) -> Any:
    """A number of any kind, or one inside a list or tuple, as Python's int or float; all else as it is."""
    if isinstance(value, (Fraction, Decimal)):
        try:
            return float(value)
        except (OverflowError, ValueError):
            return value
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


class _Short(reprlib.Repr):
    """Values on one short line, even those that hold themselves or never end."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 2, 60, 60
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 100 else f"a number of {x.bit_length()} bits"


def brief(value: object) -> str:
    """A value as messages show it, on one short line."""
    return " ".join(_Short().repr(value).split())
