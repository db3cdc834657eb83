"""A folder that somebody else can write to: what a run reads there decides on nothing outside of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from letters import install

from arkv.bulk import Description, run
from arkv.errors import ArkvError
from arkv.jobs.job import picture_seed
from arkv.jobs.recipe import Recipe

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has links that anybody can make")

RECIPE = Recipe(model="letters", policy="window:ratio=1/2")
WRONG = "0" * 64


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site").split(os.pathsep)[0])


@pytest.fixture
def described(tmp_path: Path) -> Description:
    (tmp_path / "prompts.txt").write_text("a b\nc\nd e\n")
    return Description(
        prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "out"), recipe=RECIPE, batch_size=4
    )


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious" / "thesis.tex"
    path.parent.mkdir()
    path.write_text("years of work")
    return path


def state(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder; of links, where they lead."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


NAMES: dict[str, Callable[[Path], str]] = {
    "above": lambda precious: "../precious/thesis.tex",
    "absolute": str,
    "roundabout": lambda precious: "000000.png/../../precious/thesis.tex",
    "with a dot": lambda precious: "./000001.png",
    "the index itself": lambda precious: "index.jsonl",
    "the log": lambda precious: "log.jsonl",
    "beside": lambda precious: "notes.txt",
    "in other letters": lambda precious: "000001.PNG",
    "of a picture that the job does not have": lambda precious: "000099.png",
    "an archive of another layout": lambda precious: "samples.npz",
    "a device": lambda precious: "/dev/null",
    "with NUL": lambda precious: "000001.png\0.tex",
    "very long": lambda precious: "x" * 100_000,
    "empty": lambda precious: "",
    "with a backslash": lambda precious: "..\\precious\\thesis.tex",
    "a lone surrogate": lambda precious: "\ud800.png",
}


@pytest.fixture
def begun(described: Description) -> Path:
    """A folder with an index, with something of its owner's, and with a file that would be drawn again."""
    out = Path(described.out)
    run(described)
    (out / "notes.txt").write_text("mine")
    (out / "000000.png").write_bytes(b"damaged")
    return out


CASES = [(name, pictures, part) for name in NAMES for pictures, part in (([1], "index.jsonl"),)]
CASES += [
    ("above", [], "index.jsonl"),
    ("above", [99], "index.jsonl"),
    ("absolute", [1], "index-00003.jsonl"),
]


@pytest.mark.parametrize(("name", "pictures", "part"), CASES)
def test_a_row_of_a_foreign_file_is_refused_before_anything_is_touched(
    name: str, pictures: list[int], part: str, described: Description, begun: Path, precious: Path
) -> None:
    header = (begun / "index.jsonl").read_bytes().splitlines(keepends=True)[0]
    row = {"file": NAMES[name](precious), "pictures": pictures, "seeds": [], "bytes": 1, "sha256": WRONG}
    with (begun / part).open("ab") as index:
        index.write((b"" if part == "index.jsonl" else header) + json.dumps(row).encode() + b"\n")
    before = state(begun)
    with pytest.raises(
        ArkvError, match=r"names .* which this job would not write; nothing was touched"
    ) as caught:
        run(described, resume=True)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert state(begun) == before
    assert precious.read_text() == "years of work"


def test_a_first_line_that_names_a_foreign_archive_is_refused(
    described: Description, begun: Path, precious: Path
) -> None:
    header, *rows = (begun / "index.jsonl").read_text().splitlines(keepends=True)
    run_of = json.loads(header)["run"] | {
        "archives": {"../precious/thesis.tex": {"bytes": 1, "sha256": WRONG, "of": WRONG}}
    }
    (begun / "index.jsonl").write_text(json.dumps({"run": run_of}) + "\n" + "".join(rows))
    before = state(begun)
    with pytest.raises(ArkvError, match="which this job would not write; nothing was touched"):
        run(described, resume=True)
    assert state(begun) == before
    assert precious.read_text() == "years of work"


ROWS: dict[str, dict[str, Any]] = {
    "pictures of another file": {"pictures": [2]},
    "another seed": {"seeds": [1]},
    "no size": {"bytes": None},
    "a size below zero": {"bytes": -1},
    "a size that is true": {"bytes": True},
    "a size beyond all": {"bytes": 10**400},
    "no hash": {"sha256": "../precious/thesis.tex"},
    "failures of other pictures": {"failed": {"2": "x"}},
    "failures that are none": {"failed": [1]},
    "a name that is a list": {"file": ["000001.png"]},
    "nothing": {"file": None, "pictures": None},
}


@pytest.mark.parametrize("changes", ROWS.values(), ids=ROWS)
@pytest.mark.filterwarnings("ignore::arkv.errors.ArkvWarning")
def test_a_row_that_cannot_be_right_is_set_aside(changes: dict[str, Any], described: Description) -> None:
    out = Path(described.out)
    run(described)
    whole, index = state(out), (out / "index.jsonl").read_bytes()
    row = {
        "file": "000001.png",
        "pictures": [1],
        "seeds": [picture_seed(0, 1)],
        "bytes": 5,
        "sha256": WRONG,
        **changes,
    }
    with (out / "index.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert run(described, resume=True).pictures == 0
    assert (out / "index.jsonl.set-aside").read_text() == json.dumps(row) + "\n"
    assert (out / "index.jsonl").read_bytes() == index
    assert (out / "000001.png").read_bytes() == whole["000001.png"]


def plant_link(path: Path, precious: Path) -> None:
    path.symlink_to(precious)


def plant_folder(path: Path, precious: Path) -> None:
    path.mkdir()


def plant_fifo(path: Path, precious: Path) -> None:
    os.mkfifo(path)


def plant_broken_link(path: Path, precious: Path) -> None:
    path.symlink_to(precious.with_name("new"))


PLANTED = {
    "a link": plant_link,
    "a link to nothing": plant_broken_link,
    "a folder": plant_folder,
    "a FIFO": plant_fifo,
}
PLACES = ["000001.png", "index.jsonl", "index-00001.jsonl", "samples.npz", ".lock"]


@pytest.mark.parametrize(
    ("plant", "place"),
    [
        *((plant, "000001.png") for plant in PLANTED),
        *(("a link", place) for place in PLACES[1:]),
        ("a FIFO", "index.jsonl"),
        ("a FIFO", "samples.npz"),
    ],
)
def test_what_is_no_plain_file_is_never_read_or_replaced(
    plant: str, place: str, described: Description, precious: Path
) -> None:
    described = Description.from_values({**described.values(), "layout": "npz"})
    out = Path(described.out)
    run(described)
    (out / place).unlink(missing_ok=True)
    PLANTED[plant](out / place, precious)
    (out / "000000.png").write_bytes(b"damaged")
    before = state(out)
    with pytest.raises(ArkvError, match=r"only a plain file|symbolic link|folder") as caught:
        run(described, resume=True)
    assert "\n" not in str(caught.value)
    assert state(out) == before
    assert state(precious.parent) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("place", ["log.jsonl", ".000001.png.part", ".index.jsonl.part"])
def test_a_planted_link_is_never_written_through(place: str, described: Description, precious: Path) -> None:
    out = Path(described.out)
    run(described)
    (out / place).unlink(missing_ok=True)
    (out / place).symlink_to(precious)
    (out / "000001.png").unlink()
    (out / "index.jsonl").write_bytes((out / "index.jsonl").read_bytes()[:-5])
    assert run(described, resume=True).pictures == 1
    assert state(precious.parent) == {"thesis.tex": b"years of work"}
    assert not (out / "000001.png").is_symlink()


@pytest.mark.parametrize("place", ["00001", "00001/samples"])
def test_a_folder_of_the_job_that_is_a_link_is_refused(
    place: str, described: Description, tmp_path: Path, precious: Path
) -> None:
    listed = tmp_path / "metadata.jsonl"
    listed.write_text("".join(json.dumps({"tag": "t", "prompt": text}) + "\n" for text in "abc"))
    described = Description.from_values({**described.values(), "prompts": str(listed)})
    out = Path(described.out)
    run(described)
    (out / place).rename(tmp_path / "elsewhere")
    (out / place).symlink_to(precious.parent)
    with pytest.raises(ArkvError, match="a symbolic link where a folder is expected"):
        run(described, resume=True)
    assert state(precious.parent) == {"thesis.tex": b"years of work"}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_somebody_else_is_left_alone(
    resume: bool, described: Description, tmp_path: Path
) -> None:
    """Whatever its files are called."""
    from PIL import Image

    out = Path(described.out)
    out.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(out / f"{number:06d}.png")
    for index in (None, b'{"run": {}}\n', b"dear diary\n"):
        if index is not None:
            (out / "index.jsonl").write_bytes(index)
        before = state(out)
        with pytest.raises(ArkvError, match="take another folder|take another name"):
            run(described, resume=resume)
        assert state(out) == before
