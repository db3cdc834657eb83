"""Whether values that somebody wrote down have the types of a dataclass's fields."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a dataclass field, as far as a class, union or literal can tell."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is Annotated:
        return fits(value, parts[0])
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if hint is None:
        return value is None
    hint = origin or hint
    if hint is object:
        return True
    if isinstance(value, bool) or hint is bool:
        return isinstance(value, bool) and hint is bool
    if hint is float:
        return isinstance(value, (int, float))
    try:
        return not isinstance(hint, type) or isinstance(value, hint)
    except TypeError:  # a protocol, for instance: nobody can say
        return True


def wanted(hint: Any) -> str:
    """A type as an error message names it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(wanted, parts))
    if hint in (None, types.NoneType):
        return "None"
    return hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
