"""Draws the pictures of `scenes`: places the objects that a prompt asks for, then paints them.

Coordinates are in pixels, x to the right and y down, with (0, 0) at the picture's top left corner;
the pixel in row r and column c covers the unit square from (c, r) to (c + 1, r + 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy
from numpy.typing import NDArray

from arkv.models.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    Prompt,
    Relation,
    sample_prompt,
)

SIDE: Final = 48
"""The side of a picture in pixels."""

MIN_SIZE: Final = 10.0
"""The least side of an object's bounding box in pixels."""

MAX_SIZE: Final = 16.0
"""The greatest side of an object's bounding box in pixels."""

MARGIN: Final = 1.0
"""The least distance in pixels of a bounding box from the picture's border."""

GAP: Final = 3.0
"""The least distance in pixels, the greater of those along x and y, between two bounding boxes."""

_COLOR_NAMES: Final = tuple(COLORS)
_BACKGROUND_NAMES: Final = tuple(BACKGROUNDS)

# Each row of pixels is the mean of this many scan lines, each of which is covered exactly. Eight
# keep the area of the smallest square within 1.3 %.
_SCAN_LINES: Final = 8

# Positions tried for one object before the whole scene starts afresh.
_PLACEMENTS: Final = 20


@dataclass(frozen=True)
class SceneObject:
    """One object of a picture.

    Attributes:
        shape: One of `grammar.SHAPES`.
        color: One of `grammar.COLORS`.
        x: The centre of the bounding box in pixels from the picture's left border.
        y: The centre of the bounding box in pixels from the picture's top border.
        size: The side of the bounding box in pixels.
    """

    shape: str
    color: str
    x: float
    y: float
    size: float


@dataclass(frozen=True)
class Scene:
    """All that a picture shows.

    Attributes:
        objects: The objects, painted in this order.
        background: One of `grammar.BACKGROUNDS`.
    """

    objects: tuple[SceneObject, ...]
    background: str


def sample_scene(prompt: Prompt, rng: numpy.random.Generator) -> Scene:
    """Draws a scene that a prompt describes, at random in all that the prompt leaves free.

    Sizes are uniform between `MIN_SIZE` and `MAX_SIZE` and independent of each other (but for the
    scenes that turned out too full), places uniform among those that keep `MARGIN`, `GAP` and the
    prompt's relation, whose two objects lie in opposite halves of the picture.

    Args:
        prompt: What to show: at most four objects, as in every prompt of the grammar.
        rng: The source of chance.

    Returns:
        The scene, its objects in the order of the prompt's.
    """
    background = prompt.background
    if background is None:
        background = _BACKGROUND_NAMES[int(rng.integers(len(_BACKGROUND_NAMES)))]
    colors = [
        _COLOR_NAMES[int(rng.integers(len(_COLOR_NAMES)))] if wanted.color is None else wanted.color
        for wanted in prompt.objects
    ]
    # Small objects fit almost anywhere, so an attempt succeeds with a fair chance whatever came
    # before it, and the loop ends.
    boxes = None
    while boxes is None:
        boxes = _place(len(colors), prompt.relation, rng)
    return Scene(
        tuple(
            SceneObject(wanted.shape, color, *box)
            for wanted, color, box in zip(prompt.objects, colors, boxes, strict=True)
        ),
        background,
    )


def draw(scene: Scene, side: int = SIDE) -> NDArray[numpy.uint8]:
    """Paints a scene, anti-aliased: an edge pixel mixes its colours by the area that each covers.

    Args:
        scene: What to paint, in the coordinates of a picture of `SIDE` pixels; what lies beyond
            the picture's borders is cut off.
        side: The side of the picture to make in pixels; the scene is scaled to it.

    Returns:
        The picture, uint8 RGB of shape [side, side, 3].
    """
    picture = numpy.empty((side, side, 3), numpy.uint8)
    picture[:] = BACKGROUNDS[scene.background]
    scale = side / SIDE
    for item in scene.objects:
        half = item.size * scale / 2
        x, y = item.x * scale, item.y * scale
        # The pixels that the box touches, as far as they are in the picture.
        left, right, top, bottom = (
            min(max(border, 0), side)
            for border in (
                math.floor(x - half),
                math.ceil(x + half),
                math.floor(y - half),
                math.ceil(y + half),
            )
        )
        cover = coverage(item.shape, x - left, y - top, 2 * half, 2 * half, bottom - top, right - left)
        patch = picture[top:bottom, left:right]
        mixed = patch + cover[:, :, None] * (numpy.array(COLORS[item.color]) - patch)
        picture[top:bottom, left:right] = numpy.rint(mixed)
    return picture


def coverage(
    shape: str, x: float, y: float, width: float, height: float, rows: int, columns: int
) -> NDArray[numpy.float64]:
    """Measures which part of every pixel of a grid a shape covers.

    Args:
        shape: One of `grammar.SHAPES`: an ellipse, a rectangle, or a triangle with its base at the
            bottom and its apex at the middle of the top, which fills its bounding box.
        x: The centre of the bounding box in pixels from the grid's left border.
        y: The centre of the bounding box in pixels from the grid's top border.
        width: The width of the bounding box in pixels, above zero.
        height: The height of the bounding box in pixels, above zero.
        rows: The height of the grid in pixels.
        columns: The width of the grid in pixels.

    Returns:
        The covered parts, from 0 to 1, float64 of shape [rows, columns].
    """
    # The height of each scan line within the box, from 0 at its top to 1 at its bottom.
    lines = (numpy.arange(rows * _SCAN_LINES) + 0.5) / _SCAN_LINES
    level = (lines - y) / height + 0.5
    inside = (level >= 0) & (level <= 1)
    if shape == "square":
        part = inside.astype(numpy.float64)
    elif shape == "circle":
        part = 2 * numpy.sqrt(numpy.where(inside, level * (1 - level), 0.0))
    else:
        part = numpy.where(inside, level, 0.0)
    reach = (part * (width / 2))[:, None]
    edges = numpy.arange(columns + 1) - x
    # What a scan line covers to the left of every pixel border; its differences are the pixels'.
    covered = numpy.clip(edges, -reach, reach)
    sums = covered.reshape(rows, _SCAN_LINES, columns + 1).sum(axis=1) / _SCAN_LINES
    return numpy.diff(sums, axis=1)


def sample_picture(
    group: str, rng: numpy.random.Generator, held_out: bool = False
) -> tuple[Prompt, NDArray[numpy.uint8]]:
    """Draws a prompt of a group and a picture of it.

    Args:
        group: One of `grammar.GROUPS`.
        rng: The source of chance.
        held_out: Whether the prompt is one of those kept out of training.

    Returns:
        The prompt, and the picture as uint8 RGB of shape [SIDE, SIDE, 3].

    Raises:
        ValueError: There is no such group.
    """
    prompt = sample_prompt(rng, group, held_out)
    return prompt, draw(sample_scene(prompt, rng))


def _place(
    count: int, relation: Relation | None, rng: numpy.random.Generator
) -> list[tuple[float, float, float]] | None:
    """Tries to find room for some objects.

    Returns:
        The x, y and size of each, or None where the tries ran out.
    """
    boxes: list[tuple[float, float, float]] = []
    for size in rng.uniform(MIN_SIZE, MAX_SIZE, count).tolist():
        reach = MARGIN + size / 2
        for x, y in rng.uniform(reach, SIDE - reach, (_PLACEMENTS, 2)).tolist():
            box = (x, y, size)
            if all(_apart(box, other) for other in boxes) and (
                relation is None or _in_its_half(box, relation, first=not boxes)
            ):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def _apart(box: tuple[float, float, float], other: tuple[float, float, float]) -> bool:
    distance = max(abs(box[0] - other[0]), abs(box[1] - other[1]))
    return distance - (box[2] + other[2]) / 2 >= GAP


def _in_its_half(box: tuple[float, float, float], relation: Relation, first: bool) -> bool:
    # Harder to learn where only the two places together decide, and no better a test of a cache.
    centre = box[0 if relation == "left of" else 1] - SIDE / 2
    reach = (box[2] + GAP) / 2
    return centre <= -reach if first else centre >= reach
