"""`arkv policies`."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from arkv.cli.parser import Command
from arkv.cli.tables import print_table
from arkv.errors import ArkvError, one_line
from arkv.options import Filled, expected, option, options


@options
class PoliciesOptions:
    """Options of `arkv policies`."""

    name: Filled | None = option(
        default=None, metavar="NAME", kind="positional", help="of one, to be shown in detail"
    )


def run(given: PoliciesOptions, typed: str) -> None:
    """List them, or show one."""
    if given.name is not None:
        _show(given.name)
        return
    from arkv.registry import load_class, names

    rows = []
    for entry in names("policy"):
        try:
            policy_class = load_class("policy", entry.name)
            source = " ".join(str(policy_class.source).split()) or "-"
            settable = [field for field in dataclasses.fields(policy_class) if field.init]
            parameters = ", ".join(map(_default_text, settable)) or "-"
        except Exception as error:
            # Somebody else's broken package must not hide the others.
            source, parameters = f"broken: {told(error)}", "-"
        rows.append((entry.name, entry.origin, source, parameters))
    print_table(("policy", "origin", "source", "parameters and defaults"), rows)
    print(
        "\nAs in --policy linear:ratio=1/6,recent=48. Where there is a budget and a ratio, give one of "
        "them.\n"
        "'arkv policies NAME' shows one in detail."
    )


def _show(name: str) -> None:
    """One policy: where it is from, what it does, and its parameters."""
    from arkv.parameters import parameter_types
    from arkv.registry import load_class, names

    policy_class = load_class("policy", name.partition(":")[0])
    (entry,) = (entry for entry in names("policy") if entry.name == name.partition(":")[0])
    print(f"{entry.name}, from {entry.origin}")
    if source := " ".join(str(policy_class.source).split()):
        print(f"source: {source}")
    first, _, _ = inspect.cleandoc(policy_class.__doc__ or "").partition("\nAttributes:\n")
    print(f"\n{first.strip()}\n")
    hints, meanings = parameter_types(policy_class), _meanings(policy_class)
    rows = [
        (field.name, expected(hints.get(field.name, Any)), _default(field), meanings.get(field.name, ""))
        for field in dataclasses.fields(policy_class)
        if field.init
    ]
    if not rows:
        print("It has no parameters.")
        return
    print_table(("parameter", "may be", "default", "meaning"), rows)
    if {"budget", "ratio"} <= {row[0] for row in rows}:
        print("\nGive a budget or a ratio.")


def _meanings(policy_class: type) -> dict[str, str]:
    """What the docstrings of a class and of those that it derives from say of their attributes."""
    found: dict[str, str] = {}
    for base in reversed(policy_class.__mro__):
        _, _, attributes = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        name = ""
        for line in attributes.splitlines():
            if line and not line.startswith(" "):
                break  # another section
            if line.startswith("    ") and line[4:5].strip() and ":" in line:
                name, _, text = line.strip().partition(":")
                found[name] = text.strip()
            elif name and line.strip():
                found[name] += f" {line.strip()}"
    return found


def told(error: Exception) -> str:
    """An exception in one line; our own speak for themselves."""
    return " ".join(str(error).split()) if isinstance(error, ArkvError) else one_line(error)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return str(field.default_factory())
    return "required"


def _default_text(field: dataclasses.Field[Any]) -> str:
    default = _default(field)
    return f"{field.name} (required)" if default == "required" else f"{field.name}={default}"


COMMAND = Command(PoliciesOptions, run, ("arkv policies", "arkv policies linear"))
