"""A class of options as flags."""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from pydantic.fields import FieldInfo

from arkv.options import choices_of, fields_of, option, options, told_of

OTHERS = "Other"
"""Heading of options whose class has no section."""
PLACES = ("FILE", "PLACE", "PATH")
"""What stands for a path in the help."""


@options
class QuietOption:
    """For commands that show how far they are."""

    quiet: bool = option(default=False, help="show no progress")


def flag_name(cls: type, field: str) -> str:
    """What an option is called on the command line."""
    told = told_of(fields_of(cls)[field])
    if told["kind"] == "positional":
        return told["metavar"] or field.upper()
    return told["name"] or f"--{field.replace('_', '-')}"


def sections_of(cls: type) -> dict[str, list[str]]:
    """The names of the options under the headings of the classes that they come from; the own ones first."""
    of_field = {}
    for base in cls.__mro__:
        for name in inspect.get_annotations(base):
            of_field[name] = base.__dict__.get("SECTION", OTHERS)
    sections: dict[str, list[str]] = {}
    for base in cls.__mro__:
        sections.setdefault(base.__dict__.get("SECTION", OTHERS), [])
    for name in fields_of(cls):
        sections[of_field[name]].append(name)
    return {heading: names for heading, names in sections.items() if names}


def parameters_of(cls: type) -> list[click.Parameter]:
    """A flag or an argument for every option. Values stay texts: the class of options reads them."""
    made: list[click.Parameter] = []
    for name, field in fields_of(cls).items():
        told = told_of(field)
        metavar = told["metavar"] or _choices_text(field)
        if told["kind"] == "positional":
            made.append(_Argument([name], type=Value(field), metavar=metavar, required=False))
            made[-1].help_text = field.description  # type: ignore[attr-defined]
            continue
        made.append(
            click.Option(
                [flag_name(cls, name), name],
                type=None if field.annotation is bool else Value(field),
                is_flag=True if field.annotation is bool else None,
                multiple=told["kind"] == "repeated",
                metavar=None if field.annotation is bool else metavar,
                help=help_of(field),
            )
        )
    return made


def help_of(field: FieldInfo) -> str:
    """One line, with what an option is if nothing is said."""
    text = field.description or ""
    if field.is_required():
        return f"{text} (required)"
    default = default_text(field)
    return f"{text} (default: {default})" if default else text


def default_text(field: FieldInfo) -> str:
    """What an option is if nothing is said, as one would type it; empty where its help says it."""
    value = field.default
    if field.is_required() or value is None or value is False or value == ():
        return ""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices_text(field: FieldInfo) -> str:
    words = choices_of(field.annotation)
    number = "N" if _holds(field.annotation, int) else ""
    return "|".join(filter(None, [number, *words])) or "VALUE"


def _holds(hint: Any, wanted: type) -> bool:
    return hint is wanted or any(_holds(part, wanted) for part in typing.get_args(hint))


class _Argument(click.Argument):
    """An argument with a line of help."""

    help_text: str | None = None

    def get_help_record(self, ctx: click.Context) -> tuple[str, str]:
        """Its name and its line."""
        return self.make_metavar(ctx), self.help_text or ""


class Value(click.ParamType):  # type: ignore[type-arg]
    """A text that the class of options reads; knows how to complete it."""

    name = "text"

    def __init__(self, field: FieldInfo) -> None:
        self._field = field

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The text itself."""
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Words, names of models and policies, or files."""
        words = choices_of(self._field.annotation)
        if param.name in ("model", "policy", "policies"):
            from arkv.registry import names

            words = [entry.name for entry in names("model" if param.name == "model" else "policy")]
        found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
        is_path = _holds(self._field.annotation, Path) or told_of(self._field)["metavar"] in PLACES
        return found or ([CompletionItem(incomplete, type="file")] if is_path else [])
