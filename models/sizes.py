"""Sizes of pictures, for families that draw more than one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from arkv.errors import ArkvError
from arkv.scalars import whole

Size = tuple[int, int]
"""Width and height, in pixels."""


def sides(size: Any) -> Size | None:
    """Width and height, as whole numbers; None for what is no such pair."""
    found = [whole(side) for side in size] if isinstance(size, Iterable) and not isinstance(size, str) else []
    width, height = found if len(found) == 2 else (None, None)
    return None if width is None or height is None else (width, height)


def check_size(size: Any, legal: Sequence[Size], usual: Size, name: str) -> Size:
    """A size of those that a model draws.

    Args:
        size: what somebody asked for; None for the usual one.
        legal: the sizes there are.
        usual: one of them.
        name: of the model, for messages.

    Raises:
        ArkvError: it is none of them; says which are near.
    """
    if size is None:
        return usual
    asked = sides(size)
    if asked is None:
        raise ArkvError(f"the size is {size!r:.60}: expected width and height in pixels, such as {legal[0]}")
    if asked not in legal:
        near = sorted(legal, key=lambda one: abs(one[0] - asked[0]) + abs(one[1] - asked[1]))
        raise ArkvError(
            f"the size is {asked}: {name} was trained for sizes (width, height) such as "
            f"{', '.join(map(str, near[:3]))}"
        )
    return asked
