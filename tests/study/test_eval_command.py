"""What the flags of `arkv eval` ask for beside policies and ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import Tiny
from torch import Tensor

from arkv import registry
from arkv.cli import main


class Numbers(Tiny):
    """Prompts as a file has them, and a judge of sorts."""

    def condition(self, prompts: Any, guided: bool) -> Any:
        return super().condition([(int(prompt),) for prompt in prompts], guided)

    def check_prompts(self, prompts: Any) -> None:
        super().check_prompts([(int(prompt),) for prompt in prompts])

    def satisfies(self, prompt: Any, picture: Tensor) -> bool:
        return int(picture.sum()) % 3 > 0


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: Numbers())
    file = tmp_path / "prompts.txt"
    file.write_text("3\n1\n7\n")
    few = ["--forced-prompts", "0", "--quiet", "--out", str(tmp_path / "rows.jsonl")]
    return ["eval", "--policies", "window", "--ratios", "1/4,1/2", "--prompts-file", str(file), *few]


def test_precision_and_pictures_of_the_first_prompts_of_a_file(command: list[str], tmp_path: Path) -> None:
    pictures, plot = tmp_path / "pictures", tmp_path / "plot.png"
    more = ["--prompts", "2", "--kv-dtypes", "own,int8", "--pictures", str(pictures), "--plot", str(plot)]
    assert main([*command, *more, "--by", "bytes"]) == 0
    header, *rows = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert header["run"]["prompt_list"] == ["3", "1"]
    policies = [f"window:ratio={ratio}{stored}" for ratio in ("1/4", "1/2") for stored in ("", "@int8")]
    assert [row["policy"] for row in rows] == policies
    assert {len(row["outcomes"]) for row in rows} == {2}
    assert len([*pictures.glob("*/*.png")]) == 8
    assert Image.open(plot).format == "PNG"


@pytest.mark.parametrize(
    ("by", "first"),
    [("policy", "window:ratio=1/4"), ("ratio", "window:ratio=1/2"), ("bytes", "window:ratio=1/4@int8")],
)
def test_the_table_is_ordered_as_asked_for(
    by: str, first: str, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--kv-dtypes", "own,int8", "--by", by]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0] == first


def test_pairs_are_printed_by_ratio_or_row_by_row(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--kv-dtypes", "own,int8", "--pair", "window,window@int8", "--pair", "window,window:ratio=1/2"]
    assert main([*command, *more]) == 0
    pairs = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert [line.split()[:3] for line in pairs[1:-1]] == [
        ["window:ratio=1/4", "window:ratio=1/4@int8", "3"],
        ["window:ratio=1/2", "window:ratio=1/2@int8", "3"],
        ["window:ratio=1/4", "window:ratio=1/2", "3"],
        ["window:ratio=1/2", "window:ratio=1/2", "3"],
    ]
    assert main([*command, "--pair", "window,h2o"]) == 1
    assert "there is no row of 'h2o'" in capsys.readouterr().err


def test_more_prompts_than_the_file_has_are_all_of_it(command: list[str], tmp_path: Path) -> None:
    assert main([*command, "--prompts", "99"]) == 0
    header = json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])
    assert header["run"]["prompts"] == 3
