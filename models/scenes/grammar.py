"""The prompts of `scenes`: every text there is, what it asks for, and its token ids.

The grammar is small and closed, so that a text means exactly one thing and the judge can be exact.
A prompt belongs to one of five groups, named after GenEval's:

- ``single``: "a red circle"
- ``counting``: "three blue squares"
- ``two_objects``: "a circle and a triangle" (two shapes that differ, any colours)
- ``color_attribution``: "a red circle and a blue square" (two colours that differ)
- ``position``: "a red circle left of a blue square", "a red circle above a blue square"

and any of them may end in "on white", "on gray" or "on black".
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import numpy

from arkv.errors import PromptError

Rgb = tuple[int, int, int]
Relation = Literal["left of", "above"]

SHAPES: Final[tuple[str, ...]] = ("circle", "square", "triangle")

# The nine colours are at least 130 apart from each other in RGB (Euclidean), so that a pixel of an
# anti-aliased edge is not taken for a third colour. Orange is absent because it lies between red
# and yellow; cyan has a corner of the cube to itself.
COLORS: Final[dict[str, Rgb]] = {
    "red": (225, 20, 30),
    "green": (10, 150, 50),
    "blue": (20, 60, 230),
    "yellow": (250, 225, 20),
    "purple": (160, 20, 200),
    "cyan": (20, 215, 235),
}
BACKGROUNDS: Final[dict[str, Rgb]] = {
    "white": (255, 255, 255),
    "gray": (128, 128, 128),
    "black": (0, 0, 0),
}
NUMBERS: Final[dict[str, int]] = {"two": 2, "three": 3, "four": 4}
RELATIONS: Final[tuple[Relation, ...]] = ("left of", "above")
GROUPS: Final[tuple[str, ...]] = (
    "single",
    "counting",
    "two_objects",
    "color_attribution",
    "position",
)

_PLURALS: Final[dict[str, str]] = {f"{shape}s": shape for shape in SHAPES}

WORDS: Final[tuple[str, ...]] = (
    "a",
    "and",
    "left",
    "of",
    "above",
    "on",
    *SHAPES,
    *_PLURALS,
    *COLORS,
    *BACKGROUNDS,
    *NUMBERS,
)
"""Every word of the grammar, in the order of the token ids: word ``WORDS[i]`` has id ``i + 1``."""

PADDING_ID: Final = 0
"""The token id that no word has."""

VOCABULARY_SIZE: Final = len(WORDS) + 1
"""The number of token ids, padding included."""

MAX_PROMPT_TOKENS: Final = 10
"""The words of the longest prompt, such as "a red circle left of a blue square on white"."""

_IDS: Final[dict[str, int]] = {word: index for index, word in enumerate(WORDS, start=1)}

_COLOR: Final = "|".join(COLORS)
_SHAPE: Final = "|".join(SHAPES)
_FORMS: Final[dict[str, re.Pattern[str]]] = {
    "single": re.compile(rf"a ({_COLOR}) ({_SHAPE})"),
    "counting": re.compile(rf"({'|'.join(NUMBERS)}) ({_COLOR}) ({'|'.join(_PLURALS)})"),
    "two_objects": re.compile(rf"a ({_SHAPE}) and a ({_SHAPE})"),
    "color_attribution": re.compile(rf"a ({_COLOR}) ({_SHAPE}) and a ({_COLOR}) ({_SHAPE})"),
    "position": re.compile(rf"a ({_COLOR}) ({_SHAPE}) ({'|'.join(RELATIONS)}) a ({_COLOR}) ({_SHAPE})"),
}
_BACKGROUND: Final = re.compile(rf"(.*) on ({'|'.join(BACKGROUNDS)})")

# Chosen so that even the smallest group, of 24 texts, has some held out, with and without a
# background.
_HELD_OUT_SALT: Final = "kept:"


@dataclass(frozen=True)
class ObjectSpec:
    """One object that a prompt asks for.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`, or None where any will do.
    """

    shape: str
    color: str | None


@dataclass(frozen=True)
class Prompt:
    """What a text asks for.

    Attributes:
        text: The text as the grammar writes it: lower case, single spaces, no full stop.
        group: One of `GROUPS`.
        objects: Every object that the picture has to show; it may show no others.
        relation: Where the first object lies, seen from the second; None where that is free.
        background: One of `BACKGROUNDS`, or None where any will do.
    """

    text: str
    group: str
    objects: tuple[ObjectSpec, ...]
    relation: Relation | None
    background: str | None


def parse_prompt(text: str) -> Prompt:
    """Reads a text of the grammar.

    Letter case, extra white space and full stops at the end make no difference.

    Args:
        text: Such as "A red circle left of a blue square on white."

    Returns:
        What the text asks for, with the text as the grammar writes it.

    Raises:
        PromptError: A word is outside the grammar, or the words are in none of its forms.
    """
    if not isinstance(text, str):
        raise PromptError(f"the prompt is {text!r:.60}: expected a text such as 'a red circle'")
    normal = _normalise(text)
    words = normal.split()
    for word in words:
        if word not in _IDS:
            raise PromptError(_unknown_word(word))
    background: str | None = None
    body = normal
    if (match := _BACKGROUND.fullmatch(normal)) is not None:
        body, background = match.groups()
    for group, form in _FORMS.items():
        if (match := form.fullmatch(body)) is not None:
            objects, relation = _read_form(group, match.groups())
            return Prompt(normal, group, objects, relation, background)
    raise PromptError(
        f"cannot read the prompt {normal!r:.200}: expected a form such as 'a red circle', "
        "'three blue squares', 'a circle and a triangle', 'a red circle and a blue square' or "
        "'a red circle left of a blue square', with or without 'on white' at its end"
    )


@functools.cache
def all_prompts(group: str) -> tuple[str, ...]:
    """Lists every text of a group, in a fixed order and without repeats.

    Args:
        group: One of `GROUPS`.

    Raises:
        ValueError: There is no such group.
    """
    _check_group(group)
    endings = ("", *(f" on {background}" for background in BACKGROUNDS))
    return tuple(body + ending for body in _bodies(group) for ending in endings)


def is_held_out(text: str) -> bool:
    """Says whether a text is kept out of training, as about one in five is.

    The answer depends on nothing but the text, read as `parse_prompt` reads it, and so is the same
    in every process and version.

    Args:
        text: A text of the grammar; others get an answer that means nothing.
    """
    return zlib.crc32(f"{_HELD_OUT_SALT}{_normalise(text)}".encode()) % 5 == 0


def sample_prompt(rng: numpy.random.Generator, group: str, held_out: bool) -> Prompt:
    """Draws a prompt, every text of the group and of the chosen side being as likely.

    Args:
        rng: The source of chance, advanced by one draw.
        group: One of `GROUPS`.
        held_out: Whether to draw from the texts kept out of training, or from the others.

    Raises:
        ValueError: There is no such group.
    """
    choices = _split(group, held_out)
    return choices[int(rng.integers(len(choices)))]


def encode_prompt(text: str) -> list[int]:
    """Turns a text into token ids, one for each word, without padding.

    Args:
        text: A text that `parse_prompt` reads.

    Returns:
        From 3 to `MAX_PROMPT_TOKENS` ids, each at least 1 and less than `VOCABULARY_SIZE`.

    Raises:
        PromptError: The text is outside the grammar.
    """
    return [_IDS[word] for word in parse_prompt(text).text.split()]


def _normalise(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")


def _check_group(group: str) -> None:
    if group not in GROUPS:
        raise ValueError(f"no prompt group {group!r}: expected one of {', '.join(GROUPS)}")


def _unknown_word(word: str) -> str:
    word = word[:40]
    near = difflib.get_close_matches(word, WORDS, n=3)
    known = f"the nearest known are {', '.join(near)}" if near else f"known: {', '.join(WORDS)}"
    return f"unknown word {word!r} in the prompt; {known}"


def _read_form(group: str, parts: tuple[str, ...]) -> tuple[tuple[ObjectSpec, ...], Relation | None]:
    """Turns the variable words of a matched form into the objects and their relation."""
    if group == "single":
        color, shape = parts
        return (ObjectSpec(shape, color),), None
    if group == "counting":
        number, color, plural = parts
        return (ObjectSpec(_PLURALS[plural], color),) * NUMBERS[number], None
    if group == "two_objects":
        if parts[0] == parts[1]:
            raise PromptError(
                f"'a {parts[0]} and a {parts[0]}' names one shape twice: expected two shapes that "
                "differ, such as 'a circle and a triangle', or a number, such as 'two red circles'"
            )
        return tuple(ObjectSpec(shape, None) for shape in parts), None
    first = ObjectSpec(parts[1], parts[0])
    second = ObjectSpec(parts[-1], parts[-2])
    if group == "color_attribution":
        if first.color == second.color:
            raise PromptError(
                f"both objects are {first.color}: expected two colours that differ, such as "
                "'a red circle and a blue square'"
            )
        return (first, second), None
    if first == second:
        raise PromptError(
            f"both objects are 'a {first.color} {first.shape}': expected two objects that differ, "
            "such as 'a red circle left of a blue square'"
        )
    return (first, second), next(relation for relation in RELATIONS if relation == parts[2])


def _bodies(group: str) -> Iterator[str]:
    """Yields the texts of a known group without their endings."""
    solids = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    if group == "single":
        for solid in solids:
            yield f"a {solid}"
    elif group == "counting":
        for number, solid in itertools.product(NUMBERS, solids):
            yield f"{number} {solid}s"
    elif group == "two_objects":
        for first, second in itertools.permutations(SHAPES, 2):
            yield f"a {first} and a {second}"
    elif group == "color_attribution":
        for first, second in itertools.permutations(solids, 2):
            if first.split()[0] != second.split()[0]:
                yield f"a {first} and a {second}"
    else:
        for relation in RELATIONS:
            for first, second in itertools.permutations(solids, 2):
                yield f"a {first} {relation} a {second}"


@functools.cache
def _split(group: str, held_out: bool) -> tuple[Prompt, ...]:
    """Lists the parsed prompts of a group that are held out, or those that are not."""
    return tuple(parse_prompt(text) for text in all_prompts(group) if is_held_out(text) == held_out)
