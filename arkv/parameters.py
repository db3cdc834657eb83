"""The parameters of a policy, as a text or an argument gives them: whether it has them, and of what type."""

from __future__ import annotations

import ast
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, get_type_hints

from arkv.errors import ArkvError, UnknownNameError
from arkv.options import check_type, expected, shown, split_commas

if TYPE_CHECKING:
    from arkv.policy import CachePolicy

TRUTHS = {"true": True, "false": False}
"""Besides Python's own words."""

MOST_BITS = 100
"""Of a whole number among a policy's parameters: far beyond what is counted, short enough for a message."""


def check_parameters(name: str, policy_class: type[CachePolicy], given: dict[str, Any]) -> None:
    """Raise `ArkvError` unless the parameters are those of the policy, of the right types, and enough."""
    known = {field.name: field for field in fields(policy_class) if field.init}
    hints = parameter_types(policy_class)
    for parameter, value in given.items():
        if not known:
            raise ArkvError(f"the policy {name} takes no parameters: leave out {parameter}={value}")
        if parameter not in known:
            raise UnknownNameError(f"parameter of the policy {name}", parameter, known)
        if type(value) is int and value.bit_length() > MOST_BITS:
            raise ArkvError(
                f"{name}: {parameter} is {shown(value)}, expected one of at most {MOST_BITS} bits"
            )
        hint = hints.get(parameter, Any)
        if not check_type(hint, value):
            raise ArkvError(f"{name}: {parameter} is {shown(value)}, expected {expected(hint)}")
    missing = [f.name for f in known.values() if f.default is f.default_factory is MISSING]
    if absent := [parameter for parameter in missing if parameter not in given]:
        raise ArkvError(f"the policy {name} needs {' and '.join(absent)}: give it as {name}:{absent[0]}=...")


def parse_parameters(text: str) -> dict[str, Any]:
    """`"anchors=24,ratio=1/6"` to a dictionary; what is no Python literal, true or false stays text."""
    parsed = {}
    for part in filter(None, split_commas(text)):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ArkvError(
                f"cannot read {part!r}: expected parameter=value, as in 'linear:anchors=24,recent=48'"
            )
        if (name := name.strip()) in parsed:
            raise ArkvError(f"{name} is given twice, in {shown(text)}: give it once")
        try:
            parsed[name] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parsed[name] = TRUTHS.get(value.strip(), value.strip())
    return parsed


def parameter_types(policy_class: type[CachePolicy]) -> dict[str, Any]:
    """The types of the fields; none at all where one names something imported for type checkers only."""
    try:
        return get_type_hints(policy_class)
    except Exception:  # whatever evaluating somebody's annotations runs into
        return {}
