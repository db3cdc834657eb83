import itertools
import math
import time

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkv.models.scenes.drawing import (
    GAP,
    MARGIN,
    MAX_SIZE,
    MIN_SIZE,
    SIDE,
    Scene,
    SceneObject,
    coverage,
    draw,
    sample_picture,
    sample_scene,
)
from arkv.models.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    GROUPS,
    SHAPES,
    all_prompts,
    parse_prompt,
)

texts = st.sampled_from([text for group in GROUPS for text in all_prompts(group)])
seeds = st.integers(0, 2**32 - 1)
shapes = st.sampled_from(SHAPES)
sizes = st.floats(MIN_SIZE, MAX_SIZE)


@given(texts, seeds)
def test_a_scene_shows_what_the_prompt_asks_for(text: str, seed: int) -> None:
    prompt = parse_prompt(text)
    scene = sample_scene(prompt, numpy.random.default_rng(seed))
    assert len(scene.objects) == len(prompt.objects)
    for item, wanted in zip(scene.objects, prompt.objects, strict=True):
        assert item.shape == wanted.shape
        assert item.color in COLORS
        assert wanted.color in (None, item.color)
    assert scene.background in BACKGROUNDS
    assert prompt.background in (None, scene.background)


@given(texts, seeds)
def test_objects_keep_their_distances(text: str, seed: int) -> None:
    prompt = parse_prompt(text)
    scene = sample_scene(prompt, numpy.random.default_rng(seed))
    for item in scene.objects:
        assert MIN_SIZE <= item.size <= MAX_SIZE
        for centre in (item.x, item.y):
            assert MARGIN <= centre - item.size / 2 + 1e-9
            assert centre + item.size / 2 <= SIDE - MARGIN + 1e-9
    for one, other in itertools.combinations(scene.objects, 2):
        reach = (one.size + other.size) / 2
        assert max(abs(one.x - other.x), abs(one.y - other.y)) - reach >= GAP
    if prompt.relation is not None:
        first, second = scene.objects
        before, after = (first.x, second.x) if prompt.relation == "left of" else (first.y, second.y)
        assert before + first.size / 2 <= SIDE / 2 - GAP / 2 + 1e-9
        assert after - second.size / 2 >= SIDE / 2 + GAP / 2 - 1e-9


def test_what_the_prompt_leaves_free_varies() -> None:
    rng = numpy.random.default_rng(0)
    scenes = [sample_scene(parse_prompt("a circle and a square"), rng) for _ in range(300)]
    assert {scene.background for scene in scenes} == set(BACKGROUNDS)
    pairs = {(scene.objects[0].color, scene.objects[1].color) for scene in scenes}
    assert pairs == set(itertools.product(COLORS, repeat=2))
    sizes = [item.size for scene in scenes for item in scene.objects]
    assert min(sizes) < 10.2
    assert max(sizes) > 15.8


@pytest.mark.parametrize("group", GROUPS)
def test_a_seed_decides_the_picture(group: str) -> None:
    first = sample_picture(group, numpy.random.default_rng(5))
    again = sample_picture(group, numpy.random.default_rng(5))
    other = sample_picture(group, numpy.random.default_rng(6))
    assert first[0] == again[0]
    assert numpy.array_equal(first[1], again[1])
    assert not numpy.array_equal(first[1], other[1])
    assert first[1].shape == (SIDE, SIDE, 3)
    assert first[1].dtype == numpy.uint8


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="'pairs'"):
        sample_picture("pairs", numpy.random.default_rng(0))


FILL = {"circle": math.pi / 4, "square": 1.0, "triangle": 0.5}


@given(shapes, sizes, st.floats(9, 39), st.floats(9, 39))
def test_the_painted_area_is_right(shape: str, size: float, x: float, y: float) -> None:
    scene = Scene((SceneObject(shape, "red", x, y, size),), "white")
    # Green falls from 255 on white to 20 in red.
    painted = (255 - draw(scene)[:, :, 1].astype(numpy.float64)).sum() / 235
    assert painted == pytest.approx(FILL[shape] * size**2, rel=0.02)


@given(shapes, sizes, st.floats(9, 39), st.floats(9, 39), st.sampled_from([24, 48, 96]))
def test_a_shape_fills_its_box_and_no_more(shape: str, size: float, x: float, y: float, side: int) -> None:
    scale = side / SIDE
    picture = draw(Scene((SceneObject(shape, "red", x, y, size),), "white"), side)
    assert picture.shape == (side, side, 3)
    rows, columns = numpy.nonzero((picture != 255).any(axis=2))
    left, top = (x - size / 2) * scale, (y - size / 2) * scale
    assert left - 1 < columns.min() <= left + 1.6
    assert left + size * scale - 2.6 <= columns.max() < left + size * scale
    # The apex of a triangle and the poles of a circle fade out.
    assert top - 1 < rows.min() <= top + 1.6
    assert top + size * scale - 2.6 <= rows.max() < top + size * scale


def test_shapes_look_like_themselves() -> None:
    assert coverage("square", 2, 2, 2, 2, 4, 4).tolist() == [
        [0, 0, 0, 0],
        [0, 1, 1, 0],
        [0, 1, 1, 0],
        [0, 0, 0, 0],
    ]
    triangle = coverage("triangle", 8, 8, 16, 16, 16, 16)
    widths = triangle.sum(axis=1)
    assert widths == pytest.approx(numpy.arange(16) + 0.5)
    assert triangle == pytest.approx(triangle[:, ::-1])
    circle = coverage("circle", 8, 8, 16, 16, 16, 16)
    assert circle == pytest.approx(circle[::-1])
    assert circle == pytest.approx(circle.T, abs=0.05)
    assert circle[0, 0] == 0
    assert circle[8, 8] == 1


def test_an_edge_mixes_its_colors_by_area() -> None:
    picture = draw(Scene((SceneObject("square", "red", 20.25, 20, 10),), "black"))
    assert picture[20, 20].tolist() == [225, 20, 30]
    assert picture[20, 15].tolist() == pytest.approx([225 * 0.75, 15, 30 * 0.75], abs=0.51)
    assert picture[20, 25].tolist() == pytest.approx([225 * 0.25, 5, 30 * 0.25], abs=0.51)
    assert picture[20, 14].tolist() == picture[20, 26].tolist() == [0, 0, 0]


@given(shapes, st.floats(-10, 58), st.floats(-10, 58))
def test_an_object_may_leave_the_picture(shape: str, x: float, y: float) -> None:
    assert draw(Scene((SceneObject(shape, "red", x, y, 12),), "white")).shape == (SIDE, SIDE, 3)


def test_pictures_are_quick_to_make() -> None:
    rng = numpy.random.default_rng(0)
    sample_picture("counting", rng)
    durations = []
    for _ in range(200):
        start = time.perf_counter()
        sample_picture("counting", rng)
        durations.append(time.perf_counter() - start)
    # Typically 0.1 ms; the median and the room above it keep a busy machine from failing this.
    assert sorted(durations)[100] < 0.002
