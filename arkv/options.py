"""Options: whatever somebody may write down, with its type, its bounds, its default and one line of help.

A class of options says all of it once. The flags of the command line, the names in a job's file, the
arguments in Python and the tables in the documentation are made from it, and a wrong value gets the same one
line everywhere: which option, what it was, what it may be.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import pydantic.dataclasses
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ArgsKwargs, PydanticUndefined
from typing_extensions import dataclass_transform

from arkv.errors import ArkvError, UnknownNameError
from arkv.scalars import MOST, brief

CONFIG = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, arbitrary_types_allowed=True)
OUT_OF_RANGE = ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number")

Class = TypeVar("Class")


class OptionError(ArkvError):
    """A value that an option cannot have.

    Attributes:
        option: the name of its field; None where several do not go together.
        out_of_range: whether its type is right.
    """

    def __init__(self, told: str, option: str | None = None, out_of_range: bool = False) -> None:
        super().__init__(told)
        self.option, self.out_of_range = option, out_of_range


@dataclasses.dataclass(frozen=True)
class Says:
    """What values of a type look like, where the type alone does not say it; and an example of one."""

    text: str


def option(
    *,
    help: str,
    default: Any = PydanticUndefined,
    metavar: str | None = None,
    kind: Literal["flag", "repeated", "positional"] = "flag",
    name: str | None = None,
) -> Any:
    """A field of a class of options.

    Args:
        help: one line, which says in parentheses what None stands for.
        default: what it is if nothing is said; without, something has to be.
        metavar: what stands for the value in the help.
        kind: how it is given on a command line: once by its name, several times, or without a name.
        name: of the flag, where it is not the field's.
    """
    told: dict[str, Any] = {"metavar": metavar, "kind": kind, "name": name}
    return pydantic.Field(default=default, description=help, json_schema_extra={"x-arkv": told})


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(option,))
def options(cls: type[Class]) -> type[Class]:
    """Make a class of options: a frozen dataclass that takes keyword arguments and checks them.

    Raises:
        ArkvError: (the constructor) an argument is unknown or lacking, or a value is none that it may have.
    """
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, kw_only=True, config=CONFIG)
    construct = made.__init__

    @functools.wraps(construct)
    def __init__(self: Any, *arguments: Any, **values: Any) -> None:
        try:
            construct(self, *arguments, **values)
        except ValidationError as error:
            raise refusal(type(self), error, values) from None

    made.__init__ = __init__
    return typing.cast(type[Class], made)


def read(
    cls: type[Class],
    values: Mapping[str, Any],
    *,
    where: str = "",
    texts: bool = False,
    named: Callable[[str], str] = str,
) -> Class:
    """Options from their values by name.

    Args:
        cls: a class of options.
        values: by the names of fields.
        where: what they stand in, for messages.
        texts: whether numbers may be written as texts, as on a command line.
        named: the name of a field in messages.

    Raises:
        OptionError: a value is none that the option may have, or one is lacking.
        UnknownNameError: there is no such option.
    """
    made = cls.__new__(cls)
    try:
        # What the constructor does, but that takes no texts for numbers.
        typing.cast(Any, cls).__pydantic_validator__.validate_python(
            ArgsKwargs((), dict(values)), self_instance=made, strict=False if texts else None
        )
    except ValidationError as error:
        raise refusal(cls, error, values, where, named) from None
    return made


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The options of a class by name."""
    return typing.cast(Any, cls).__pydantic_fields__


def told_of(field: FieldInfo) -> dict[str, str | None]:
    """What else was said of an option: `metavar`, `kind` and `name`."""
    extra = typing.cast(dict[str, Any], field.json_schema_extra)
    return extra["x-arkv"]


def type_of(field: FieldInfo) -> Any:
    """The type of an option, with its bounds."""
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def refusal(
    cls: type,
    error: ValidationError,
    values: Mapping[str, Any],
    where: str = "",
    named: Callable[[str], str] = str,
) -> ArkvError:
    """What pydantic found, in one line; of several, the first."""
    fields = fields_of(cls)
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "unexpected_keyword_argument"), found[0])
    kind, name = first["type"], str(first["loc"][0]) if first["loc"] else ""
    raised = first.get("ctx", {}).get("error")
    if isinstance(raised, ArkvError):
        return raised
    if kind == "unexpected_keyword_argument":
        return UnknownNameError(f"name in {where}" if where else f"option of {cls.__name__}", name, fields)
    if kind in ("missing", "missing_keyword_only_argument") and len(first["loc"]) == 1:  # not of a list
        lacking = [str(one["loc"][0]) for one in found if one["type"] == kind]
        told = " and ".join(map(named, lacking))
        return OptionError(f"{where or cls.__name__} lacks {told}", lacking[0])
    if name not in fields:
        return OptionError(f"{where or cls.__name__}: expected names with values")
    out_of_range = all(one["type"] in OUT_OF_RANGE for one in found if str(one["loc"][0]) == name)
    typed = named is not str
    inside = f" in {where}" if where and not typed else ""
    what = shown(values.get(name), texts=typed)
    wanted = f"expected {expected(type_of(fields[name]))}"
    if _is_undecoded(values.get(name)):
        wanted = "bytes that are no text in UTF-8; take a locale of UTF-8, or set PYTHONUTF8=1"
    return OptionError(f"{named(name)} is {what}{inside}: {wanted}", name, out_of_range)


def check_type(hint: Any, value: Any) -> bool:
    """Whether a value has a type, as far as anybody can say."""
    try:
        TypeAdapter(hint, config=CONFIG).validate_python(_plain_number(value))
    except ValidationError:
        return False
    except (pydantic.PydanticUserError, TypeError, NameError, AttributeError):
        return True  # a protocol, for instance, or a type that is there for type checkers only
    return True


def expected(hint: Any) -> str:
    """What a value of a type may be, in words."""
    bounds: list[Any] = []
    while typing.get_origin(hint) is Annotated:
        hint, *more = typing.get_args(hint)
        bounds += more
    says = [one.text for one in bounds if isinstance(one, Says)]
    if says:
        return says[0]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = [expected(part) for part in parts if part is not types.NoneType]
        return ", or ".join(dict.fromkeys(words))
    if origin is tuple and parts[1:] == (...,):
        return f"{expected(parts[0])}, any number of times"
    if origin is Literal:
        return _listed([repr(part) for part in parts])
    words_of: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false"}
    words_of |= {str: "a text", Path: "a path", types.NoneType: "nothing", None: "nothing"}
    name = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    return words_of.get(hint, name) + _range(bounds)


def choices_of(hint: Any) -> list[str]:
    """The words that a type lists, wherever in it."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return [str(part) for part in parts]
    if origin is Annotated:
        return choices_of(parts[0])
    if origin in (typing.Union, types.UnionType):
        return [word for part in parts for word in choices_of(part)]
    return []


def _is_undecoded(value: Any) -> bool:
    """Whether a text, or one of several, has what Python makes of bytes that it cannot decode."""
    texts = value if isinstance(value, (list, tuple)) else [value]
    return any("\udc80" <= letter <= "\udcff" for text in texts if isinstance(text, str) for letter in text)


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(bounds: list[Any]) -> str:
    """Bounds in words, behind those of a type."""
    least = next((one.ge for one in bounds if isinstance(one, Ge)), None)
    above = next((one.gt for one in bounds if isinstance(one, Gt)), None)
    most = next((one.le for one in bounds if isinstance(one, Le)), None)
    if least is not None and most is not None:
        return f" from {least} to {most}"
    if above is not None and most is not None:
        return f" above {above} and at most {most}"
    if above is not None:
        return f" above {above}"
    return f" of at least {least}" if least is not None else ""


def shown(value: Any, texts: bool = False) -> str:
    """A value on one short line.

    Args:
        value: anything.
        texts: whether it was typed as a text, whatever it means: a plain one has no quotation marks.
    """
    if texts and isinstance(value, str) and 0 < len(value) <= 40 and value.isascii() and value.isprintable():
        return value if " " not in value else repr(value)
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    return brief(value)


def split_commas(text: str) -> list[str]:
    """The parts between commas, but for commas inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if character == "," and not depth and not quote:
            parts.append("")
            continue
        parts[-1] += character
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth = max(0, depth - 1)
    return parts


def _plain_number(value: Any) -> Any:
    """A number of numpy or torch as one of Python; anything else as it is."""
    if isinstance(value, (bool, int, float, str, bytes)) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):
        return value


def _text(value: Any) -> Any:
    """Raise `ValueError` for texts that no file name and no file in UTF-8 can hold."""
    if isinstance(value, str):
        value.encode()
        if "\0" in value:
            raise ValueError("holds a NUL")
    return value


def _filled(value: Any) -> Any:
    if isinstance(value, str) and not value.strip():
        raise ValueError("is empty")
    return _text(value)


def _place(value: Any) -> Any:
    """A path with `~` expanded; what is none as it is."""
    filled = _filled(os.fspath(value) if isinstance(value, Path) else value)
    return os.path.expanduser(filled) if isinstance(filled, str) else filled


def _path(value: Any) -> Any:
    place = _place(value)
    return Path(place) if isinstance(place, str) else place


def _size(value: Any) -> Any:
    """`"1024x576"` or a list of two to a tuple."""
    if isinstance(value, str):
        parts = value.lower().split("x")
        return tuple(int(part) for part in parts if part.isdecimal()) if len(parts) == 2 else value
    return tuple(value) if isinstance(value, list) and len(value) == 2 else value


def _comma_list(value: Any) -> Any:
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    return tuple(part.strip() for part in split_commas(_text(value)) if part.strip())


def _policies(value: Any) -> Any:
    """A comma list of policies whose own parameters have commas between them, too."""
    if not isinstance(value, str):
        return _comma_list(value)
    policies: list[str] = []
    for part in _comma_list(value):
        if "=" in part and ":" not in part.partition("=")[0] and policies:
            policies[-1] += f",{part}"
        else:
            policies.append(part)
    return tuple(policies)


def _bytes(value: Any) -> Any:
    """Gigabytes, with or without their name, as a number of bytes."""
    if isinstance(value, str):
        value = float(value.strip().lower().removesuffix("b").removesuffix("g").strip())
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < MOST:
        raise ValueError("is no size")
    return int(value * 10**9)


Plain = BeforeValidator(_plain_number)
"""For numbers of any kind; behind their bounds."""
Number = Annotated[float, Plain]
Count = Annotated[int, Ge(0), Le(MOST), Plain]
Positive = Annotated[int, Ge(1), Le(MOST), Plain]
Seed = Annotated[int, Ge(0), Le(2**64 - 1), Plain]
Text = Annotated[str, BeforeValidator(_text)]
Filled = Annotated[str, BeforeValidator(_filled), Says("a text that is not empty")]
Place = Annotated[str, BeforeValidator(_place), Says("a path, or a repository of the hub")]
PathText = Annotated[str, BeforeValidator(_place), Says("a path")]
FilePath = Annotated[Path, BeforeValidator(_path), Says("a path")]
Side = Annotated[int, Ge(1), Le(65536), Plain]
Size = Annotated[
    tuple[Side, Side], BeforeValidator(_size), Says("a width and a height in pixels, such as 1024x576")
]
Ratio = Annotated[
    Filled | Number, pydantic.Field(union_mode="left_to_right"), Says("a share such as 1/6 or 0.25")
]
AtLeastOne = MinLen(1)
CommaList = BeforeValidator(_comma_list)
"""For tuples that are typed with commas."""
Indices = Annotated[tuple[Count, ...], AtLeastOne, CommaList, Says("whole numbers from 0, as in 0,12,23")]
Counts = Annotated[tuple[Positive, ...], AtLeastOne, CommaList, Says("whole numbers from 1, as in 1,4,16")]
Ratios = Annotated[tuple[Ratio, ...], AtLeastOne, CommaList, Says("shares, as in 1,1/2,1/6")]
Policies = Annotated[
    tuple[Filled, ...], AtLeastOne, BeforeValidator(_policies), Says("policies, as in full,linear:recent=48")
]
Bytes = Annotated[int, Ge(1), BeforeValidator(_bytes), Says("gigabytes above 0, as in 24 or 24GB")]
Memories = Annotated[tuple[Bytes, ...], AtLeastOne, CommaList, Says("gigabytes above 0, as in 16,24")]
