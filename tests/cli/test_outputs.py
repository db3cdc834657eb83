"""Places that cannot be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from saying import PROMPTS, arkv_says, picture_of

from arkv import registry
from arkv.cli import main
from arkv.models.scenes.adapter import Scenes


@pytest.mark.parametrize("command", ["generate", "bench", "demo"])
def test_place_that_cannot_be_written_is_told_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(registry, "load_model", load)
    file = tmp_path / "file"
    file.touch()
    flags = {
        "generate": ["generate", *picture_of(PROMPTS[0]), "--out"],
        "bench": ["bench", "--json"],
        "demo": ["demo", "--out"],
    }[command]
    assert "Not a directory" in arkv_says(capsys, *flags, file / "out.png", status=1)
    assert list(tmp_path.iterdir()) == [file]


def test_failure_while_writing_leaves_what_was_there(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    out.write_text("older")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert complaint.endswith(f"cannot write {out}: No space left on device\n")
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "older"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
@pytest.mark.parametrize(
    "flags",
    [
        ["generate", *picture_of(PROMPTS[0]), "--out"],
        ["demo", "--out"],
        ["bench", "--json"],
        ["eval", "--out"],
        ["profile", "--out"],
        ["sheet", ".", "--out"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_device_or_a_pipe_is_never_replaced(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe, link = tmp_path / "pipe.png", tmp_path / "null.png"
    os.mkfifo(pipe)
    link.symlink_to(os.devnull)
    for place in (pipe, link):
        assert "it is no file but a device or a pipe" in arkv_says(capsys, *flags, place, status=1)
    assert pipe.is_fifo()
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("flags", "one", "other"),
    [
        (["bench"], "--json", "--plot"),
        (["eval"], "--out", "--plot"),
        (["profile"], "--out", "--map"),
        (["inspect", "--prompt", "a"], "--out", "--animation"),
    ],
    ids=["bench", "eval", "profile", "inspect"],
)
def test_two_outputs_are_never_one_file(
    flags: list[str],
    one: str,
    other: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    told = arkv_says(capsys, *flags, one, "x.png", other, f"../{tmp_path.name}/x.png", status=1)
    assert f"{one} and {other} are both" in told
    assert not list(tmp_path.iterdir())


def test_a_figure_that_cannot_be_drawn_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(registry, "load_model", None)
    told = arkv_says(capsys, "bench", "--plot", tmp_path / "x.png", status=1)
    assert "matplotlib" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "sheet", ["p.txt", "out/index.jsonl", "out/000000.png", "out/new.png", "link/000000.png", "job.yaml"]
)
def test_a_sheet_takes_the_place_of_nothing_that_a_job_reads_or_has_drawn(
    sheet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    for name in ("p.txt", "out/index.jsonl", "out/000000.png", "job.yaml"):
        (tmp_path / name).write_text("precious")
    (tmp_path / "job.yaml").write_text("prompts: p.txt\nout: out\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for command in (
        ["generate", "--prompts-file", "p.txt", "--out", "out", "--sheet", sheet],
        ["run", "job.yaml", "--resume", "--sheet", sheet],
        ["sheet", "out", "--out", sheet],
        ["sheet", "job.yaml", "--out", sheet],
    ):
        assert main(command) == 1
        assert f"arkv: error: cannot write {sheet}: " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_name_that_no_disk_takes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a" * 300 + ".png", "a" * 300):
        assert main(["generate", "--prompt", "a red circle", "--out", str(tmp_path / name)]) == 1
        assert capsys.readouterr().err.endswith(": File name too long\n")
