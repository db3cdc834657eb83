import dataclasses
from collections.abc import Collection

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import ndimage  # type: ignore[import-untyped]

from arkv.errors import PromptError
from arkv.models.scenes.codebook import GRID, Codebook
from arkv.models.scenes.drawing import (
    SIDE,
    Scene,
    SceneObject,
    draw,
    sample_picture,
    sample_scene,
)
from arkv.models.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    GROUPS,
    NUMBERS,
    SHAPES,
    Prompt,
    all_prompts,
    parse_prompt,
)
from arkv.models.scenes.judge import examine, find_objects, judge

Picture = NDArray[numpy.uint8]
Samples = list[tuple[Prompt, Picture]]

RED = numpy.array(COLORS["red"], numpy.uint8)


def wrong_texts(prompt: Prompt, rng: numpy.random.Generator) -> list[str]:
    """Texts of the grammar that a true picture of a prompt does not satisfy, one of each kind."""

    def other(kind: Collection[str], word: str) -> str:
        return str(rng.choice([each for each in kind if each != word]))

    plurals = [f"{shape}s" for shape in SHAPES]
    kinds: tuple[Collection[str], ...] = (NUMBERS, COLORS, SHAPES, plurals, BACKGROUNDS)
    words = prompt.text.split()
    changed: list[list[str]] = []
    for index, word in enumerate(words):
        for kind in kinds:
            if word in kind:
                changed.append([*words[:index], other(kind, word), *words[index + 1 :]])
    texts = [" ".join(each) for each in changed]
    if prompt.group == "position":
        first, second = prompt.objects
        texts.append(f"a {second.color} {second.shape} {prompt.relation} a {first.color} {first.shape}")
    elif prompt.group == "single":
        color, shape = prompt.objects[0].color, prompt.objects[0].shape
        texts.append(f"two {color} {shape}s")
    elif prompt.group == "color_attribution":
        first, second = prompt.objects
        if first.shape != second.shape:
            texts.append(f"a {second.color} {first.shape} and a {first.color} {second.shape}")
    return [text for text in texts if _in_grammar(text)]


def _in_grammar(text: str) -> bool:
    try:
        parse_prompt(text)
    except PromptError:
        return False
    return True


def picture_of(*objects: SceneObject, background: str = "white") -> Picture:
    return draw(Scene(objects, background))


def test_true_pictures_are_accepted(samples: Samples, decoded: Samples) -> None:
    assert all(judge(picture, prompt) for prompt, picture in samples)
    assert numpy.mean([judge(picture, prompt) for prompt, picture in decoded]) >= 0.995


@pytest.mark.slow
def test_ten_thousand_true_pictures_are_accepted(codebook: Codebook) -> None:
    rng = numpy.random.default_rng(2)
    verdicts = []
    for index in range(10_000):
        prompt, picture = sample_picture(GROUPS[index % len(GROUPS)], rng, index % 2 == 0)
        verdicts.append(judge(codebook.decode(codebook.encode(picture[None]))[0], prompt))
    assert numpy.mean(verdicts) >= 0.995


def test_pictures_of_something_else_are_refused(decoded: Samples) -> None:
    rng = numpy.random.default_rng(0)
    wrong = [judge(picture, text) for prompt, picture in decoded[:1000] for text in wrong_texts(prompt, rng)]
    assert len(wrong) > 2000
    assert numpy.mean(wrong) <= 0.005


@given(st.sampled_from([text for group in GROUPS for text in all_prompts(group)]), st.data())
def test_an_object_too_many_or_too_few_is_noticed(text: str, data: st.DataObject) -> None:
    prompt = parse_prompt(text)
    rng = numpy.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    scene = sample_scene(prompt, rng)
    assert judge(draw(scene), prompt)
    gone = data.draw(st.integers(0, len(scene.objects) - 1))
    fewer = scene.objects[:gone] + scene.objects[gone + 1 :]
    assert not judge(draw(dataclasses.replace(scene, objects=fewer)), prompt)
    if prompt.group != "counting":
        shown = parse_prompt(f"four red {data.draw(st.sampled_from(SHAPES))}s")
        more = sample_scene(shown, rng).objects
        crowd = scene.objects + more[len(scene.objects) :]
        assert not judge(draw(dataclasses.replace(scene, objects=crowd)), prompt)


@given(st.sampled_from(SHAPES), st.sampled_from(list(COLORS)), st.sampled_from(list(BACKGROUNDS)))
def test_found_objects_lie_where_they_were_drawn(shape: str, color: str, background: str) -> None:
    scene = sample_scene(parse_prompt(f"four {color} {shape}s on {background}"), numpy.random.default_rng(4))
    found = find_objects(draw(scene))
    assert found.background == background
    assert found.unrecognised == 0
    assert {(item.shape, item.color) for item in found.objects} == {(shape, color)}
    for true in scene.objects:
        got = min(found.objects, key=lambda item: abs(item.x - true.x) + abs(item.y - true.y))
        assert (got.x, got.y) == pytest.approx((true.x, true.y), abs=0.5)
        assert got.size == pytest.approx(true.size, abs=1)


RED_CIRCLE = SceneObject("circle", "red", 14, 24, 12)
BLUE_SQUARE = SceneObject("square", "blue", 34, 26, 14)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red circle and a blue square", "as the prompt asks"),
        ("a blue square and a red circle on white", "as the prompt asks"),
        ("a circle and a square", "as the prompt asks"),
        ("a red circle left of a blue square", "as the prompt asks"),
        ("a blue square left of a red circle", "a blue square is not left of a red circle"),
        ("a red circle above a blue square", "a red circle is not above a blue square"),
        ("a red circle and a blue square on gray", "expected a gray background, found white"),
        ("a red circle", "expected 1 object, found 2"),
        ("three red circles", "expected 3 objects, found 2"),
        (
            "a green circle and a blue square",
            "expected a green circle and a blue square, found a red circle and a blue square",
        ),
        (
            "a circle and a triangle",
            "expected a circle and a triangle, found a red circle and a blue square",
        ),
        (
            "a blue circle and a red square",
            "expected a blue circle and a red square, found a red circle and a blue square",
        ),
        (
            "two red circles",
            "expected a red circle and a red circle, found a red circle and a blue square",
        ),
    ],
)
def test_the_reason_says_what_is_wrong(text: str, reason: str) -> None:
    picture = picture_of(RED_CIRCLE, BLUE_SQUARE)
    for prompt in (text, parse_prompt(text)):
        verdict = examine(picture, prompt)
        assert verdict.reason == reason
        assert verdict.satisfied == (reason == "as the prompt asks") == judge(picture, prompt)
        assert len(verdict.detection.objects) == 2


@given(hnp.arrays(numpy.uint8, (SIDE, SIDE, 3)), st.sampled_from(["a red circle", "two red circles"]))
def test_any_picture_gets_a_verdict(picture: Picture, text: str) -> None:
    assert not judge(picture, text)


def test_noise_is_refused(codebook: Codebook) -> None:
    rng = numpy.random.default_rng(0)
    noise = rng.integers(0, 256, (20, SIDE, SIDE, 3), numpy.uint8)
    for picture in [*noise, *codebook.decode(codebook.encode(noise))]:
        assert not examine(picture, "a red circle").satisfied


def test_shuffled_pictures_are_refused(samples: Samples, codebook: Codebook) -> None:
    rng = numpy.random.default_rng(0)
    tokens = codebook.encode(numpy.stack([picture for _, picture in samples[:50]]))
    shuffled = tokens[:, rng.permutation(GRID * GRID)]
    for (prompt, _), picture in zip(samples[:50], codebook.decode(shuffled), strict=True):
        assert not judge(picture, prompt)


@pytest.mark.parametrize("color", [*BACKGROUNDS.values(), *COLORS.values()])
def test_blank_pictures_are_refused(color: tuple[int, int, int]) -> None:
    picture = numpy.empty((SIDE, SIDE, 3), numpy.uint8)
    picture[:] = color
    verdict = examine(picture, "a red circle")
    assert not verdict.satisfied
    assert verdict.reason in ("expected 1 object, found 0", "no background of a known colour")


def test_a_colored_background_is_refused() -> None:
    picture = picture_of(RED_CIRCLE)
    picture[(picture == 255).all(axis=2)] = COLORS["cyan"]
    assert examine(picture, "a red circle").reason == "no background of a known colour"


def blob(*parts: tuple[int, int, int, int]) -> Picture:
    """Red rectangles, each given as left, top, right, bottom, on white."""
    picture = numpy.full((SIDE, SIDE, 3), 255, numpy.uint8)
    for left, top, right, bottom in parts:
        picture[top:bottom, left:right] = RED
    return picture


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(blob((10, 10, 26, 22)), id="wide rectangle"),
        pytest.param(blob((10, 10, 16, 30)), id="tall rectangle"),
        pytest.param(blob((10, 10, 40, 12)), id="line"),
        pytest.param(blob((10, 10, 14, 14)), id="dot"),
        pytest.param(blob((10, 10, 18, 26), (18, 18, 26, 26)), id="L"),
        pytest.param(blob((16, 10, 20, 26), (10, 16, 26, 20)), id="plus"),
        pytest.param(blob((10, 10, 26, 12), (10, 24, 26, 26), (10, 10, 12, 26)), id="C"),
        pytest.param(picture_of(SceneObject("triangle", "red", 24, 24, 14))[::-1], id="triangle on its apex"),
        pytest.param(
            picture_of(SceneObject("triangle", "red", 24, 24, 14)).swapaxes(0, 1),
            id="triangle on its side",
        ),
        pytest.param(
            picture_of(SceneObject("circle", "red", 18, 24, 12), SceneObject("circle", "red", 25, 24, 12)),
            id="two circles in one",
        ),
        pytest.param(
            numpy.where(
                (numpy.arange(SIDE) < 24)[:, None],
                picture_of(SceneObject("circle", "red", 24, 24, 14)),
                picture_of(SceneObject("circle", "blue", 24, 24, 14)),
            ),
            id="circle of two colors",
        ),
    ],
)
def test_what_is_no_shape_is_refused(picture: Picture) -> None:
    verdict = examine(picture, "a red circle")
    assert verdict.detection.objects == ()
    assert verdict.detection.unrecognised > 0
    assert verdict.reason == "found something that is no circle, square or triangle"


def test_something_besides_the_object_is_refused() -> None:
    picture = picture_of(RED_CIRCLE)
    picture[30:34, 40:44] = COLORS["blue"]
    assert not judge(picture, "a red circle")


def test_one_stray_patch_is_forgiven() -> None:
    picture = picture_of(RED_CIRCLE)
    picture[30:32, 40:42] = COLORS["blue"]
    assert judge(picture, "a red circle")


@pytest.mark.parametrize("shape", SHAPES)
def test_a_ragged_outline_is_forgiven(shape: str) -> None:
    rng = numpy.random.default_rng(0)
    accepted = []
    for _ in range(200):
        prompt = parse_prompt(f"a red {shape} on white")
        picture = draw(sample_scene(prompt, rng))
        solid = (picture == RED).all(axis=2)
        outline = ndimage.binary_dilation(solid) & ~ndimage.binary_erosion(solid)
        places = numpy.argwhere(outline) // 2 * 2
        for row, column in rng.choice(places, 2):
            whole = rng.choice([0, 1])
            picture[row : row + 2, column : column + 2] = RED if whole else 255
        accepted.append(judge(picture, prompt))
    assert numpy.mean(accepted) >= 0.97


@pytest.mark.parametrize("second", ["square", "circle"])
def test_objects_that_touch_are_told_apart_by_color(second: str) -> None:
    picture = picture_of(SceneObject("circle", "red", 16, 24, 12), SceneObject(second, "blue", 28, 24, 12))
    assert judge(picture, f"a red circle left of a blue {second}")


def test_pictures_of_another_form_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        judge(numpy.zeros((SIDE, SIDE, 3)), "a red circle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[96, 96, 3\]"):
        judge(numpy.zeros((96, 96, 3), numpy.uint8), "a red circle")
    with pytest.raises(PromptError):
        judge(picture_of(RED_CIRCLE), "a red dog")
