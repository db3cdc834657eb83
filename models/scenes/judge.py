"""Judges whether a picture shows exactly what its prompt asks for.

The judge looks at nothing but the pixels. It is meant to agree with a person who looks at the
picture: an outline that is a little ragged, or a stray patch, is forgiven; a wrong number, colour,
shape, place or background, or anything that is no shape at all, is not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from arkv.models.scenes.drawing import SIDE, SceneObject, coverage
from arkv.models.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    SHAPES,
    ObjectSpec,
    Prompt,
    Relation,
    parse_prompt,
)

_NAMES: Final = (*BACKGROUNDS, *COLORS)
_PALETTE: Final = numpy.array([*BACKGROUNDS.values(), *COLORS.values()], numpy.float64)

# Four objects of the greatest size leave 55 % of the picture free.
_LEAST_BACKGROUND: Final = 0.4

# Up to one stray 2x2 patch is noise.
_SPECK_PIXELS: Final = 5

# Fewer inner pixels than this do not make an object of their own.
_CORE_PIXELS: Final = 6

# True objects are at least 10 px in size and as wide as high; what lies far from that is no object
# of this world.
_LEAST_SIZE: Final = 7.0
_GREATEST_ASPECT: Final = {"circle": 1.2, "square": 1.2, "triangle": 1.4}

# The least overlap (intersection over union) of an object with the ideal shape. One wrong patch
# costs a triangle, half of its box, the most.
_LEAST_OVERLAP: Final = {"circle": 0.84, "square": 0.84, "triangle": 0.78}

# From this overlap on a fit is as good as it needs to be.
_CLEAR_OVERLAP: Final = 0.92

# How a fit is improved: the steps in pixels, and the moves of the left, right, top and bottom edge
# of its box, either way, as changes of centre and size.
_STEPS: Final = (1.0, 0.5)
_MOVES: Final = tuple(
    (sign * x, sign * y, sign * width, sign * height)
    for x, y, width, height in (
        (0.5, 0.0, -1.0, 0.0),
        (0.5, 0.0, 1.0, 0.0),
        (0.0, 0.5, 0.0, -1.0),
        (0.0, 0.5, 0.0, 1.0),
    )
    for sign in (-1, 1)
)

_EIGHT: Final = numpy.ones((3, 3), numpy.bool_)

# For a width w and a height h, each shape covers w h _FILL, the variance of x in it is
# w^2 / _X_SPREAD and that of y is h^2 / _Y_SPREAD, and the bounding box's centre lies _LIFT h above
# the centre of mass.
_FILL: Final = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}
_X_SPREAD: Final = {"circle": 16.0, "square": 12.0, "triangle": 24.0}
_Y_SPREAD: Final = {"circle": 16.0, "square": 12.0, "triangle": 18.0}
_LIFT: Final = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6}


@dataclass(frozen=True)
class Detection:
    """What a picture shows.

    Attributes:
        background: One of `grammar.BACKGROUNDS`, or None where most of the picture is in none.
        objects: The objects found, in no particular order.
        unrecognised: How many things there are besides that are larger than a speck.
    """

    background: str | None
    objects: tuple[SceneObject, ...]
    unrecognised: int


@dataclass(frozen=True)
class Verdict:
    """The judge's answer.

    Attributes:
        satisfied: Whether the picture shows exactly what the prompt asks for.
        reason: One line that says what is wrong, or that nothing is.
        detection: What was found in the picture.
    """

    satisfied: bool
    reason: str
    detection: Detection


@dataclass(frozen=True)
class _Fit:
    """An ideal shape in its bounding box, in pixels, and its overlap with what was found."""

    shape: str
    x: float
    y: float
    width: float
    height: float
    overlap: float


def judge(picture: NDArray[numpy.uint8], prompt: Prompt | str) -> bool:
    """Says whether a picture shows exactly what its prompt asks for.

    Args:
        picture: Any picture, uint8 RGB of shape [SIDE, SIDE, 3].
        prompt: A prompt or its text.

    Raises:
        PromptError: The text is outside the grammar.
        ValueError: The picture is of another shape or type.
    """
    return examine(picture, prompt).satisfied


def examine(picture: NDArray[numpy.uint8], prompt: Prompt | str) -> Verdict:
    """Judges a picture and says why.

    The picture has to show as many objects as the prompt names and nothing else, each of the named
    shape and colour, in the named relation (the centres at least a quarter of the mean size apart)
    and on the named background.

    Args:
        picture: Any picture, uint8 RGB of shape [SIDE, SIDE, 3].
        prompt: A prompt or its text.

    Raises:
        PromptError: The text is outside the grammar.
        ValueError: The picture is of another shape or type.
    """
    wanted = parse_prompt(prompt) if isinstance(prompt, str) else prompt
    detection = find_objects(picture)
    fault = _fault(detection, wanted)
    return Verdict(fault is None, fault or "as the prompt asks", detection)


def find_objects(picture: NDArray[numpy.uint8]) -> Detection:
    """Finds the background and the objects of a picture.

    Args:
        picture: Any picture, uint8 RGB of shape [SIDE, SIDE, 3].

    Raises:
        ValueError: The picture is of another shape or type.
    """
    if picture.dtype != numpy.uint8 or picture.shape != (SIDE, SIDE, 3):
        raise ValueError(
            f"expected a uint8 picture of shape [{SIDE}, {SIDE}, 3], "
            f"got {picture.dtype} of shape {list(picture.shape)}"
        )
    pixels = picture.astype(numpy.float64)
    # |p - c|^2 without the |p|^2 that all colours share.
    nearest = ((_PALETTE**2).sum(axis=1) - 2 * pixels @ _PALETTE.T).argmin(axis=2)
    counts = numpy.bincount(nearest.ravel(), minlength=len(_NAMES))
    commonest = int(counts.argmax())
    background = _NAMES[commonest]
    if background not in BACKGROUNDS or counts[commonest] < _LEAST_BACKGROUND * nearest.size:
        return Detection(None, (), 0)

    things, _ = ndimage.label(nearest != commonest, _EIGHT)
    cores = _find_cores(nearest)
    objects: list[SceneObject] = []
    unrecognised = 0
    for index, window in enumerate(ndimage.find_objects(things), start=1):
        # A margin of one pixel, for edge pixels that are closer to the background than to it.
        view = tuple(slice(max(part.start - 1, 0), part.stop + 1) for part in window)
        thing = things[view] == index
        if thing.sum() <= _SPECK_PIXELS:
            continue
        pieces = _split(thing, cores[view])
        if not pieces:
            unrecognised += 1
        for piece in pieces:
            color = _commonest_color(nearest[view][piece])
            item = _recognise(pixels[view], piece, thing, background, color)
            if item is None:
                unrecognised += 1
            else:
                x, y = item.x + view[1].start, item.y + view[0].start
                objects.append(SceneObject(item.shape, color, x, y, item.size))
    return Detection(background, tuple(objects), unrecognised)


def _find_cores(nearest: NDArray[numpy.int64]) -> NDArray[numpy.int64]:
    """Numbers the patches of inner pixels, each of one colour, from 1; 0 is elsewhere.

    Objects that touch have cores that do not, as long as they differ in colour or the bridge between
    them is thin.
    """
    cores = numpy.zeros(nearest.shape, numpy.int64)
    total = 0
    for color in numpy.unique(nearest):
        if _NAMES[color] in COLORS:
            # Beyond the picture's border an object goes on for all we know.
            inner = ndimage.binary_erosion(nearest == color, border_value=1)
            labels, count = ndimage.label(inner)
            cores[labels > 0] = labels[labels > 0] + total
            total += count
    small = numpy.bincount(cores.ravel()) < _CORE_PIXELS
    cores[small[cores]] = 0
    return cores


def _split(thing: NDArray[numpy.bool_], cores: NDArray[numpy.int64]) -> list[NDArray[numpy.bool_]]:
    """Divides a connected thing among the cores inside it, each pixel to the nearest."""
    inside = numpy.where(thing, cores, 0)
    numbers = [number for number in numpy.unique(inside).tolist() if number]
    if len(numbers) <= 1:
        return [thing] * len(numbers)
    rows, columns = ndimage.distance_transform_edt(inside == 0, return_distances=False, return_indices=True)
    owner = inside[rows, columns]
    return [thing & (owner == number) for number in numbers]


def _commonest_color(nearest: NDArray[numpy.int64]) -> str:
    counts = numpy.bincount(nearest, minlength=len(_NAMES))
    counts[: len(BACKGROUNDS)] = 0
    return _NAMES[int(counts.argmax())]


def _recognise(
    pixels: NDArray[numpy.float64],
    piece: NDArray[numpy.bool_],
    thing: NDArray[numpy.bool_],
    background: str,
    color: str,
) -> SceneObject | None:
    """Finds the shape whose ideal picture overlaps a piece best.

    Args:
        pixels: The colours around the piece, of shape [rows, columns, 3].
        piece: Which pixels are the piece's, but for those at its edge that it covers a little.
        thing: Which pixels are the piece's or those of others that touch it.
        background: The name of the colour around the piece.
        color: The name of the piece's own colour.

    Returns:
        The object in the coordinates of `pixels`, or None where no shape comes close enough.
    """
    base = numpy.array(BACKGROUNDS[background])
    way = numpy.array(COLORS[color]) - base
    covered = numpy.clip((pixels - base) @ way / (way @ way), 0.0, 1.0)
    covered[~ndimage.binary_dilation(piece, _EIGHT) | (thing & ~piece)] = 0.0

    # The box of each shape follows from the centre of mass and the spread. A pixel is itself a
    # square of variance 1/12, which the spread of pixel centres leaves out.
    mass = covered.sum()
    columns, rows = covered.sum(axis=0), covered.sum(axis=1)
    across, down = numpy.arange(len(columns)) + 0.5, numpy.arange(len(rows)) + 0.5
    x, y = float(columns @ across / mass), float(rows @ down / mass)
    x_variance = float(columns @ (across - x) ** 2 / mass) + 1 / 12
    y_variance = float(rows @ (down - y) ** 2 / mass) + 1 / 12
    fits = []
    for shape in SHAPES:
        width = math.sqrt(x_variance * _X_SPREAD[shape])
        height = math.sqrt(y_variance * _Y_SPREAD[shape])
        fits.append(_fit(covered, shape, x, y - _LIFT[shape] * height, width, height))
    best = max(fits, key=lambda fit: fit.overlap)
    best = _improve(covered, best)
    size = (best.width + best.height) / 2
    aspect = max(best.width, best.height) / min(best.width, best.height)
    if (
        best.overlap < _LEAST_OVERLAP[best.shape]
        or size < _LEAST_SIZE
        or aspect > _GREATEST_ASPECT[best.shape]
    ):
        return None
    return SceneObject(best.shape, color, best.x, best.y, size)


def _fit(
    covered: NDArray[numpy.float64], shape: str, x: float, y: float, width: float, height: float
) -> _Fit:
    ideal = coverage(shape, x, y, width, height, *covered.shape)
    shared = float(numpy.minimum(covered, ideal).sum())
    # The ideal shape's whole area, which may lie outside the view in part.
    area = _FILL[shape] * width * height
    overlap = shared / (float(covered.sum()) + area - shared)
    return _Fit(shape, x, y, width, height, overlap)


def _improve(covered: NDArray[numpy.float64], fit: _Fit) -> _Fit:
    """Moves the edges of a fit's box one by one for as long as the overlap grows.

    A spur or a bite at the outline throws the centre and the spread off, but hardly this.
    """
    for step in _STEPS:
        improved = fit.overlap < _CLEAR_OVERLAP
        while improved:
            improved = False
            for x, y, width, height in _MOVES:
                moved = _fit(
                    covered,
                    fit.shape,
                    fit.x + step * x,
                    fit.y + step * y,
                    fit.width + step * width,
                    fit.height + step * height,
                )
                if moved.overlap > fit.overlap:
                    fit, improved = moved, True
    return fit


def _fault(detection: Detection, prompt: Prompt) -> str | None:
    """Says in one line what keeps a picture from being what the prompt asks for, if anything."""
    if detection.background is None:
        return "no background of a known colour"
    if prompt.background not in (None, detection.background):
        return f"expected a {prompt.background} background, found {detection.background}"
    if detection.unrecognised:
        return f"found something that is no {', '.join(SHAPES[:-1])} or {SHAPES[-1]}"
    if len(detection.objects) != len(prompt.objects):
        return f"expected {_objects(len(prompt.objects))}, found {len(detection.objects)}"
    matches = [
        order for order in itertools.permutations(detection.objects) if all(map(_fits, order, prompt.objects))
    ]
    if not matches:
        return f"expected {_listed(prompt.objects)}, found {_listed(detection.objects)}"
    relation = prompt.relation
    if relation is not None and not any(_in_relation(order, relation) for order in matches):
        first, second = prompt.objects
        return f"{_name(first)} is not {relation} {_name(second)}"
    return None


def _fits(item: SceneObject, spec: ObjectSpec) -> bool:
    return item.shape == spec.shape and spec.color in (None, item.color)


def _in_relation(order: Sequence[SceneObject], relation: Relation) -> bool:
    first, second = order
    ahead = second.x - first.x if relation == "left of" else second.y - first.y
    return ahead >= (first.size + second.size) / 8


def _objects(count: int) -> str:
    return "1 object" if count == 1 else f"{count} objects"


def _listed(items: Sequence[SceneObject | ObjectSpec]) -> str:
    return " and ".join(_name(item) for item in items)


def _name(item: SceneObject | ObjectSpec) -> str:
    return f"a {item.shape}" if item.color is None else f"a {item.color} {item.shape}"
