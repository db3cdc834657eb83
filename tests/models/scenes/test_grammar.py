import itertools
import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkv.errors import PromptError
from arkv.models.scenes.grammar import (
    BACKGROUNDS,
    COLORS,
    GROUPS,
    MAX_PROMPT_TOKENS,
    NUMBERS,
    PADDING_ID,
    SHAPES,
    VOCABULARY_SIZE,
    WORDS,
    ObjectSpec,
    Prompt,
    all_prompts,
    encode_prompt,
    is_held_out,
    parse_prompt,
    sample_prompt,
)

every_text = pytest.mark.parametrize("group", GROUPS)
texts = st.sampled_from([text for group in GROUPS for text in all_prompts(group)])


def test_the_nine_colors_are_far_apart() -> None:
    palette = [*COLORS.values(), *BACKGROUNDS.values()]
    assert min(math.dist(*pair) for pair in itertools.combinations(palette, 2)) > 130


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "a red circle",
            Prompt("a red circle", "single", (ObjectSpec("circle", "red"),), None, None),
        ),
        (
            "three blue squares on black",
            Prompt(
                "three blue squares on black",
                "counting",
                (ObjectSpec("square", "blue"),) * 3,
                None,
                "black",
            ),
        ),
        (
            "a circle and a triangle",
            Prompt(
                "a circle and a triangle",
                "two_objects",
                (ObjectSpec("circle", None), ObjectSpec("triangle", None)),
                None,
                None,
            ),
        ),
        (
            "a cyan circle and a purple circle on gray",
            Prompt(
                "a cyan circle and a purple circle on gray",
                "color_attribution",
                (ObjectSpec("circle", "cyan"), ObjectSpec("circle", "purple")),
                None,
                "gray",
            ),
        ),
        (
            "a red circle left of a red square",
            Prompt(
                "a red circle left of a red square",
                "position",
                (ObjectSpec("circle", "red"), ObjectSpec("square", "red")),
                "left of",
                None,
            ),
        ),
        (
            "a green triangle above a yellow square on white",
            Prompt(
                "a green triangle above a yellow square on white",
                "position",
                (ObjectSpec("triangle", "green"), ObjectSpec("square", "yellow")),
                "above",
                "white",
            ),
        ),
    ],
)
def test_a_text_means_what_it_says(text: str, expected: Prompt) -> None:
    assert parse_prompt(text) == expected


@every_text
def test_every_text_of_a_group_reads_back_as_itself(group: str) -> None:
    for text in all_prompts(group):
        prompt = parse_prompt(text)
        assert (prompt.text, prompt.group) == (text, group)


def test_no_text_occurs_twice() -> None:
    listed = [text for group in GROUPS for text in all_prompts(group)]
    assert len(set(listed)) == len(listed)


@given(texts, st.data())
def test_case_spaces_and_full_stops_make_no_difference(text: str, data: st.DataObject) -> None:
    spaces = st.text(" \t\n", min_size=1, max_size=3)
    loose = "".join(
        data.draw(st.sampled_from([word, word.upper(), word.capitalize()])) + data.draw(spaces)
        for word in text.split()
    )
    loose = data.draw(spaces) + loose + data.draw(st.sampled_from(["", ".", ". ", " ."]))
    assert parse_prompt(loose) == parse_prompt(text)
    assert encode_prompt(loose) == encode_prompt(text)
    assert is_held_out(loose) == is_held_out(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a red cirkle", "'cirkle'.*nearest known.*circle"),
        ("a red xylophone", "'xylophone'.*known"),
        ("a circle, please", "'circle,'.*circle"),
        ("", "expected a form such as 'a red circle'"),
        ("red circle", "expected a form such as 'a red circle'"),
        ("a circle", "expected a form"),
        ("three blue square", "expected a form"),
        ("a red circle on white on black", "expected a form"),
        ("on white", "expected a form"),
        ("a circle and a circle", "two shapes that differ"),
        ("a red circle and a red square", "two colours that differ"),
        ("a red circle above a red circle", "two objects that differ"),
    ],
)
def test_a_text_outside_the_grammar_is_explained_in_one_line(text: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint) as caught:
        parse_prompt(text)
    assert "\n" not in str(caught.value)
    with pytest.raises(PromptError, match=complaint):
        encode_prompt(text)


@given(st.text(max_size=40) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        prompt = parse_prompt(text)
    except PromptError:
        return
    assert prompt.text in all_prompts(prompt.group)


@every_text
def test_about_one_text_in_five_is_held_out(group: str) -> None:
    listed = all_prompts(group)
    held_out = sum(map(is_held_out, listed))
    assert held_out >= 5
    assert 0.15 <= held_out / len(listed) <= 0.3


def test_held_out_texts_stay_the_same() -> None:
    # A model's weights are tied to these: training must not have seen them.
    assert [text for text in all_prompts("two_objects") if is_held_out(text)] == [
        "a circle and a triangle",
        "a circle and a triangle on gray",
        "a square and a triangle",
        "a triangle and a circle on gray",
        "a triangle and a square",
        "a triangle and a square on white",
    ]


def test_training_sees_every_word() -> None:
    seen = {
        word
        for group in GROUPS
        for text in all_prompts(group)
        if not is_held_out(text)
        for word in text.split()
    }
    assert seen == set(WORDS)


@pytest.mark.parametrize("held_out", [False, True])
@every_text
def test_samples_come_from_the_group_and_side_asked_for(group: str, held_out: bool) -> None:
    rng = numpy.random.default_rng(3)
    drawn = [sample_prompt(rng, group, held_out) for _ in range(200)]
    assert {prompt.group for prompt in drawn} == {group}
    assert {is_held_out(prompt.text) for prompt in drawn} == {held_out}
    again = numpy.random.default_rng(3)
    assert drawn == [sample_prompt(again, group, held_out) for _ in range(200)]


def test_an_unknown_group_is_refused() -> None:
    with pytest.raises(ValueError, match="'pairs'.*single"):
        all_prompts("pairs")
    with pytest.raises(ValueError, match="'pairs'.*single"):
        sample_prompt(numpy.random.default_rng(0), "pairs", held_out=False)


@given(texts)
def test_token_ids_spell_the_text(text: str) -> None:
    ids = encode_prompt(text)
    assert " ".join(WORDS[index - 1] for index in ids) == text
    assert PADDING_ID not in ids
    assert max(ids) < VOCABULARY_SIZE


def test_the_longest_text_fits_exactly() -> None:
    longest = max(len(encode_prompt(text)) for group in GROUPS for text in all_prompts(group))
    assert longest == MAX_PROMPT_TOKENS


def test_the_vocabulary_holds_every_kind_of_word_once() -> None:
    assert len(set(WORDS)) == len(WORDS) == VOCABULARY_SIZE - 1
    assert {*SHAPES, *COLORS, *BACKGROUNDS, *NUMBERS} <= set(WORDS)
