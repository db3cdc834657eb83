"""`job.yaml`: whatever stands in it is a job, or is refused in one line before anything is begun."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arkv.bulk import Description, read_description
from arkv.bulk.description import LARGEST_FILE, schema
from arkv.errors import ArkvError
from arkv.jobs.list_options import LayoutName
from arkv.jobs.recipe import Recipe
from arkv.options import choices_of, fields_of
from arkv.pictures.layouts import LAYOUTS

USUAL = "prompts: p.txt\nout: pictures\n"

HOSTILE = {
    "refers to itself": "samples: &a [*a]",
    "a name that refers to itself": "a: &a {b: *a}",
    "billion laughs": "\n".join(
        ["samples: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
        + [f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)]
    ),
    "deeper than the stack": "samples: " + "[" * 3000 + "]" * 3000,
    "a flow that does not end": "samples: " + "[" * 3000,
    "a mapping as a name": "{a: b}: 3",
    "a list as a name": "? [a]\n: 3",
    "a name that is a number": "3: 4",
    "a name that stands twice": "seed: 3\nseed: 4",
    "a name that stands twice in other quotation marks": "'seed': 3\n\"seed\": 4",
    "a float for a count": "samples: 1.0e+23",
    "a float without a point for a count": "samples: 1e23",
    "more pictures than anybody has": "samples: 1000000000000",
    "a number of thousands of digits": "seed: " + "9" * 5000,
    "a hexadecimal number of thousands of digits": "seed: 0x" + "f" * 5000,
    "a seed below zero": "seed: -1",
    "a side of zero": "npz_side: 0",
    "a side that no memory holds": "npz_side: 1000000",
    "a side for another layout": "npz_side: 16\nlayout: webdataset",
    "a batch of none": "batch_size: 0",
    "workers below zero": "workers: -3",
    "a boolean for a number": "samples: true",
    "a yes for a number": "samples: yes",
    "a number for a boolean": "random_weights: 1",
    "a text for a number": "samples: '3'",
    "a list for a text": "model: [scenes]",
    "a mapping for a text": "policy: {linear: 3}",
    "nothing for a text": "model:",
    "not a number": "guidance: .nan",
    "infinity": "temperature: .inf",
    "a ratio that is not a number": "ratio: .nan",
    "a share of nothing": "top_p: 0",
    "a share beyond one": "top_p: 1.5",
    "a day that there is not": "model: 2001-02-31",
    "a day for a text": "model: 2001-02-03",
    "bytes for a text": "model: !!binary aGVsbG8=",
    "a set": "model: !!set {a, b}",
    "a tag of Python": "model: !!python/object/apply:os.system ['true']",
    "a number that is none": "seed: !!int x",
    "a time that is none": "seed: !!timestamp x",
    "a merge with a number": "<<: 3",
    "embedded NUL": 'model: "a\\0b"',
    "embedded NUL in a path": 'source: "a\\0b"',
    "lone surrogate": 'policy: "\\ud800"',
    "an empty text": "device: ''",
    "a policy that there is not": "policy: liner",
    "an engine that there is not": "engine: slurm",
    "a size of one number": "size: [512]",
    "a size of zero": "size: [0, 512]",
}


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.txt").write_text("three red circles\n")


def refusal_of(content: bytes) -> str:
    Path("job.yaml").write_bytes(content)
    with pytest.raises(ArkvError) as caught:
        read_description(Path("job.yaml")).check()
    told = str(caught.value)
    assert len(told.splitlines()) == 1
    assert len(told) < 1000
    assert sorted(path.name for path in Path().iterdir()) == ["job.yaml", "p.txt"]
    return told


@pytest.mark.parametrize("lines", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_job_is_one_line_and_begins_nothing(lines: str) -> None:
    refusal_of((USUAL + lines + "\n").encode())


FILES = {
    "empty": b"",
    "no names": b"- a\n- b\n",
    "a text": b"hello",
    "no UTF-8": b"\xff\xfe\x00",
    "control characters": b"a: \x01",
    "larger than a job": b"#" * (LARGEST_FILE + 1),
    "empty prompts": b"prompts: ''\nout: x\n",
    "no folder": b"prompts: p.txt\n",
    "an empty folder": b"prompts: p.txt\nout: ' '\n",
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_file_that_is_no_job_is_one_line(content: bytes) -> None:
    refusal_of(content)


def test_what_is_said_of_a_wrong_value() -> None:
    assert refusal_of(USUAL.encode() + b"samples: 0") == (
        "samples is 0 in job.yaml: expected a whole number from 1 to 1000000000"
    )
    assert "did you mean policy?" in refusal_of(USUAL.encode() + b"polcy: full")
    assert "the name 'seed' stands twice" in refusal_of(USUAL.encode() + b"seed: 1\nseed: 2")


def test_a_folder_or_nothing_in_place_of_the_file_is_one_line() -> None:
    for place in (Path(), Path("nowhere.yaml")):
        with pytest.raises(ArkvError, match="^cannot read "):
            read_description(place)


def test_more_pictures_than_a_list_can_have_are_refused_before_it_is_made() -> None:
    with pytest.raises(ArkvError, match="a job has room for 100000000"):
        Description(prompts="p.txt", out="x", samples=10**9).job()


def test_an_engine_that_is_not_installed_begins_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from arkv.bulk import description, run

    monkeypatch.setattr(description.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArkvError, match="pip install 'arkv"):
        run(Description(prompts="p.txt", out="pictures", engine="ray"))
    assert not Path("pictures").exists()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NAMES = [*(name for name in fields_of(Description) if name != "recipe"), *fields_of(Recipe)]


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), ANYTHING, max_size=4))
def test_any_yaml_is_a_job_or_refused_in_one_line(values: dict[str, Any]) -> None:
    import yaml

    path = Path("any.yaml")
    path.write_text(yaml.safe_dump({"prompts": "p.txt", "out": "x", **values}), encoding="utf-8")
    try:
        description = read_description(path)
    except ArkvError as error:
        told = str(error)
    else:
        assert Description.from_values(json.loads(json.dumps(description.values()))) == description
        return
    assert len(told.splitlines()) == 1


@given(st.binary(max_size=40) | st.text(alphabet="a:-[]{}&*!|>'\"%@` \n#?,<0.x").map(str.encode))
def test_any_bytes_are_a_job_or_refused_in_one_line(content: bytes) -> None:
    path = Path("any.yaml")
    path.write_bytes(content)
    with pytest.raises(ArkvError) as caught:
        read_description(path)
    assert len(str(caught.value).splitlines()) == 1


def test_the_schema_names_everything_and_nothing_else() -> None:
    told = schema()
    assert set(told["properties"]) == set(NAMES)
    assert told["required"] == ["prompts", "out"]
    assert told["additionalProperties"] is False
    assert all(each["description"] for each in told["properties"].values())
    assert "x-arkv" not in json.dumps(told)
    assert {"minimum": 8, "maximum": 4096, "type": "integer"} in told["properties"]["npz_side"]["anyOf"]


def test_layouts_in_words_are_those_there_are() -> None:
    assert choices_of(LayoutName) == list(LAYOUTS)


def test_a_file_of_many_names_is_refused_in_time(tmp_path: Path) -> None:
    """Each is looked for among the others; and a few lines may stand for very many."""
    begun, job = time.monotonic(), tmp_path / "job.yaml"
    job.write_text("{" + ", ".join(f"n{number}: 1" for number in range(20_000)) + "}")
    with pytest.raises(ArkvError, match="unknown name"):
        read_description(job)
    nested = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    job.write_text(f"a0: &a0 [x]\n{nested}\nprompts: *a29\nout: x\n")
    with pytest.raises(ArkvError) as told:
        read_description(job)
    assert len(str(told.value)) < 500
    assert time.monotonic() - begun < 30
