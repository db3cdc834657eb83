"""Options: what a value may be, and the one line that a wrong one gets, wherever it was written."""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv.errors import ArkvError
from arkv.jobs.recipe import Recipe
from arkv.options import (
    Count,
    FilePath,
    Memories,
    Policies,
    Positive,
    Size,
    check_type,
    expected,
    fields_of,
    option,
    options,
    read,
    shown,
    split_commas,
    type_of,
)


@options
class Painting:
    out: FilePath = option(help="where to")
    strokes: Positive = option(default=3, help="how many")
    shade: float = option(default=0.5, help="how dark")
    size: Size | None = option(default=None, help="of the canvas")
    framed: bool = option(default=False, help="whether there is a frame")
    batch: Positive | Literal["auto"] = option(default=4, help="at a time")
    policies: Policies = option(default=("full",), help="list")
    memory: Memories | None = option(default=None, help="list")


def complaint_of(**values: Any) -> str:
    with pytest.raises(ArkvError) as caught:
        Painting(**{"out": "x", **values})
    told = str(caught.value)
    assert "\n" not in told
    assert len(told) < 400
    return told


def test_a_value_says_its_name_what_it_was_and_what_it_may_be() -> None:
    assert complaint_of(strokes=0) == "strokes is 0: expected a whole number from 1 to 1000000000"
    assert complaint_of(batch="all") == (
        "batch is 'all': expected a whole number from 1 to 1000000000, or 'auto'"
    )
    assert complaint_of(size=[3]) == (
        "size is [3]: expected a width and a height in pixels, such as 1024x576"
    )
    assert complaint_of(stroke=1) == "unknown option of Painting 'stroke'; did you mean strokes?"
    with pytest.raises(ArkvError, match="^Painting lacks out$"):
        Painting()  # type: ignore[call-arg]


WRONG = {
    "text for a number": {"strokes": "3"},
    "boolean for a number": {"strokes": True},
    "number for a boolean": {"framed": 1},
    "list for a scalar": {"strokes": [3]},
    "fraction for a count": {"strokes": 2.5},
    "more than anybody has": {"strokes": 10**12},
    "a number of thousands of digits": {"strokes": 10**5000},
    "not a number": {"shade": float("nan")},
    "infinity": {"shade": float("inf")},
    "embedded NUL": {"out": "a\0b"},
    "lone surrogate": {"out": "a\udc80"},
    "empty path": {"out": " "},
    "empty list": {"policies": ()},
    "side of zero": {"size": (0, 5)},
    "an object": {"strokes": object()},
}


@pytest.mark.parametrize("values", WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_one_line(values: dict[str, Any]) -> None:
    (name,) = values
    assert complaint_of(**values).startswith(f"{name} is ")


@pytest.mark.parametrize("values", [{"out": "a\udc80"}, {"policies": ("linear", "\udcff")}])
def test_bytes_that_are_no_text_are_told_as_such(values: dict[str, Any]) -> None:
    """A console whose locale is not of UTF-8 hands them over so."""
    assert "bytes that are no text in UTF-8; take a locale" in complaint_of(**values)


@pytest.mark.parametrize("number", [numpy.int64(4), numpy.uint8(4), torch.tensor(4)])
def test_numbers_of_other_libraries_are_numbers(number: Any) -> None:
    assert Painting(out=Path("x"), strokes=number).strokes == 4
    assert type(Painting(out=Path("x"), strokes=number).strokes) is int


def test_a_tilde_is_the_home_of_whoever_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert Painting(out=Path("~/x")).out == Path("/home/me/x")
    assert Recipe(source="~/weights").source == "/home/me/weights"


def test_texts_are_read_where_they_were_typed_and_nowhere_else() -> None:
    typed = {"out": "x", "strokes": "7", "size": "1024X576", "batch": "auto", "memory": "1.5,24GB"}
    typed["policies"] = "full,linear:w={1:2,3:4},recent=3,window"
    made = read(Painting, typed, texts=True)
    assert (made.strokes, made.size, made.batch) == (7, (1024, 576), "auto")
    assert made.memory == (1_500_000_000, 24_000_000_000)
    assert made.policies == ("full", "linear:w={1:2,3:4},recent=3", "window")
    with pytest.raises(ArkvError, match="strokes is '7' in job.yaml: expected"):
        read(Painting, typed, where="job.yaml")


def test_options_are_immutable_and_travel() -> None:
    made = Painting(out=Path("x"), strokes=5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.strokes = 6  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(ArkvError, match="strokes is 0"):
        dataclasses.replace(made, strokes=0)
    recipe = Recipe(policy="linear", ratio="1/6", size=(8, 8))
    assert pickle.loads(pickle.dumps(recipe)) == recipe


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(fields_of(Recipe))), ANYTHING)
def test_any_value_of_a_recipe_is_taken_or_refused_in_one_line(name: str, value: Any) -> None:
    try:
        json.dumps(dataclasses.asdict(Recipe(**{name: value})))
    except ArkvError as error:
        told = str(error)
    else:
        return
    assert told.startswith(f"{name} is ")
    assert len(told.splitlines()) == 1


@given(ANYTHING)
def test_a_value_is_shown_on_one_short_line(value: Any) -> None:
    assert len(shown(value).splitlines()) == 1
    assert len(shown(value)) < 400


def test_values_that_hold_themselves_are_shown() -> None:
    circle: list[Any] = []
    circle.append(circle)
    assert "..." in shown(circle)
    laughs: Any = ["ha"] * 10
    for _ in range(50):
        laughs = [laughs] * 10
    assert len(shown(laughs)) < 400
    assert shown(10**10_000) == "a number of 33220 bits"


@pytest.mark.parametrize(
    ("hint", "value", "right"),
    [
        (int, 3, True),
        (int, True, False),
        (int, numpy.int64(3), True),
        (float | str, 3, True),
        (Literal["mean", "max"], "min", False),
        (tuple[int, ...], [1], False),
        (dict[int, int], {1: "x"}, False),
        (torch.dtype, torch.float32, True),
        (torch.dtype, "float32", False),
        (object, 3, True),
    ],
)
def test_types_of_parameters(hint: Any, value: Any, right: bool) -> None:
    assert check_type(hint, value) is right


def test_every_option_says_what_it_may_be() -> None:
    for field in fields_of(Recipe).values():
        assert field.description
        assert not expected(type_of(field)).startswith("typing")


def test_a_count_may_be_none_of_it() -> None:
    assert expected(Count) == "a whole number from 0 to 1000000000"


@given(st.text(alphabet="a,b([{}])'\""))
def test_parts_between_commas_make_the_text_again(text: str) -> None:
    assert ",".join(split_commas(text)) == text


def test_options_import_nothing_heavy() -> None:
    import subprocess

    code = "import sys, arkv.bulk.description; assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
