"""The demo and its contact sheets."""

from __future__ import annotations

import numpy
import pytest
from PIL import Image

from arkv.decoder import Statistics
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.grammar import GROUPS, is_held_out, parse_prompt
from arkv.pictures.sheet import (
    BAD,
    CAPTION,
    CAPTION_LINES,
    GOOD,
    PAPER,
    Cell,
    Row,
    contact_sheet,
    enlarge,
    in_rows,
    text_width,
    wrap,
)
from arkv.registry import load_model
from arkv.study.demo import CONTENDERS, PROMPTS, Trial, demo_prompts, draw_sheet, run_windowed


def checkers(side: int) -> Image.Image:
    pixels = numpy.indices((side, side)).sum(0) % 2 * 255
    return Image.fromarray(pixels.astype(numpy.uint8)).convert("RGB")


def has_color(image: Image.Image, color: tuple[int, int, int]) -> bool:
    return color in {found for _, found in image.getcolors(image.width * image.height)}


def trial(verdict: bool | None, index: int = 0, pictures: int = 4) -> Trial:
    stats = Statistics(pictures, pictures * 576, 576, 2.0, pictures * 1_610_000, pictures * 7_210_000, 576)
    return Trial(CONTENDERS[index], [checkers(48)] * pictures, [verdict] * pictures, stats)


def test_prompts_cover_every_group_and_were_not_trained_on() -> None:
    assert len(set(PROMPTS)) == 8
    assert {parse_prompt(prompt).group for prompt in PROMPTS} == set(GROUPS)
    assert all(map(is_held_out, PROMPTS))


@pytest.mark.parametrize("judged", [0, 1, 32, 200])
def test_no_shown_prompt_is_judged_again(judged: int) -> None:
    model = Scenes.from_pretrained(device="meta")
    assert set(model.example_prompts(200, seed=0)) & set(PROMPTS), "or this test shows nothing"
    prompts = demo_prompts(model, judged)
    assert prompts[:8] == list(PROMPTS)
    assert len(prompts) == 8 + judged
    assert not set(prompts[8:]) & set(PROMPTS)


def test_score_counts_what_is_right() -> None:
    assert trial(True).score() == "4 of 4"
    assert trial(True).score(2) == "2 of 2"
    assert trial(None).score() == "0 of 4"


def test_sheet_has_a_row_a_policy_and_a_column_a_prompt() -> None:
    one = draw_sheet([trial(None)], PROMPTS[:2])
    rows = draw_sheet([trial(None), trial(None, 1)], PROMPTS[:2])
    columns = draw_sheet([trial(None, pictures=8)], PROMPTS)
    assert rows.height >= one.height + 192
    # The note is the widest thing on a sheet of few pictures.
    assert columns.width > 8 * 192 > one.width
    assert not has_color(one, GOOD)
    assert not has_color(one, BAD)


@pytest.mark.parametrize(("verdict", "color"), [(True, GOOD), (False, BAD)])
def test_verdicts_are_marked(verdict: bool, color: tuple[int, int, int]) -> None:
    assert has_color(draw_sheet([trial(verdict)], PROMPTS[:1]), color)


@pytest.mark.parametrize(("side", "shown"), [(48, 192), (50, 200), (192, 192), (384, 384)])
def test_pictures_are_enlarged_by_a_whole_factor(side: int, shown: int) -> None:
    picture = checkers(side)
    large = enlarge(picture)
    assert large.size == (shown, shown)
    factor = shown // side
    pixels = numpy.asarray(picture).repeat(factor, 0).repeat(factor, 1)
    assert numpy.array_equal(numpy.asarray(large), pixels)


def test_pictures_lie_on_the_sheet_unchanged() -> None:
    sheet = contact_sheet([Row([Cell(checkers(192), "a caption")])])
    pixels, picture = numpy.asarray(sheet), numpy.asarray(checkers(192))
    places = [
        (y, x)
        for y in range(sheet.height - 191)
        for x in range(sheet.width - 191)
        if numpy.array_equal(pixels[y, x : x + 192], picture[0])
        and numpy.array_equal(pixels[y : y + 192, x : x + 192], picture)
    ]
    assert len(places) == 1
    assert sheet.getpixel((0, 0)) == PAPER


def test_captions_are_broken_at_words_and_cut_when_too_long() -> None:
    lines = wrap("a blue circle above a red circle on gray", CAPTION, 192)
    assert " ".join(lines) == "a blue circle above a red circle on gray"
    assert all(text_width(line, CAPTION) <= 192 for line in lines)
    cut = wrap("word " * 100, CAPTION, 192)
    assert len(cut) == CAPTION_LINES
    assert cut[-1].endswith(" ...")
    assert wrap("", CAPTION, 192) == []


@pytest.mark.parametrize(
    ("count", "shape"), [(1, [1]), (2, [2]), (3, [2, 1]), (9, [3, 3, 3]), (65, [8] * 8 + [1])]
)
def test_many_pictures_are_spread_over_rows(count: int, shape: list[int]) -> None:
    assert [len(row.cells) for row in in_rows([Cell(checkers(48))] * count)] == shape


def test_the_demo_shows_that_a_window_saves_passes() -> None:
    windowed = run_windowed(load_model("scenes"))
    assert windowed.same
    assert windowed.alone.passes > 4 * windowed.several.passes
