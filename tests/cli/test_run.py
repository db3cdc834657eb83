"""`arkv run`, as far as the command goes; what runs do is tested with `arkv.bulk`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from letters import Letters
from PIL import Image
from saying import arkv_says

from arkv import registry
from arkv.bulk import description
from arkv.cli import main
from arkv.decoder import Decoder
from arkv.errors import NumericalError
from arkv.jobs.job import picture_seed


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Letters:
    made = Letters()
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: made)
    return made


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a b\nc\nd e\n")
    path = Path("job.yaml")
    path.write_text("prompts: prompts.txt\nout: out\npolicy: window:ratio=1/2\nbatch_size: 2\n")
    return path


def test_the_schema_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(arkv_says(capsys, "run", "--schema"))
    assert told["required"] == ["prompts", "out"]


def test_a_job_is_drawn_told_of_and_shown(
    model: Letters, job: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = arkv_says(capsys, "run", job, "--quiet", "--sheet", "sheet.png").splitlines()
    assert printed[0].startswith("out: 3 of 3 pictures in ")
    assert printed[1] == "sheet.png: 3 of 3 pictures of out"
    assert Image.open("sheet.png").width > 2 * 192
    assert "3 of 3 pictures (100%)" in arkv_says(capsys, "run", job, "--status")
    assert "go on with --resume" in arkv_says(capsys, "run", job, status=1)


@pytest.mark.parametrize(
    "command",
    [
        ["run", "job.yaml"],
        ["generate", "--prompts-file", "prompts.txt", "--out", "out", "--policy", "window:ratio=1/2"],
    ],
    ids=["run", "generate"],
)
def test_a_picture_that_could_not_be_drawn_has_a_status_of_its_own(
    command: list[str],
    model: Letters,
    job: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    generate, bad = Decoder.generate, picture_seed(0, 1)

    def broken(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        if bad in seeds:
            raise NumericalError("not finite")
        return generate(self, prompts, seeds=seeds, **named)

    monkeypatch.setattr(Decoder, "generate", broken)
    assert main([*command, "--quiet"]) == 3
    out, err = capsys.readouterr()
    assert out.endswith("picture 1: not finite\n")
    assert err == "arkv: error: 1 of 3 pictures could not be drawn\n"


REFUSED = {
    "a side for another layout": ("npz_side: 16\nlayout: flat", [], "npz_side is for the layout npz"),
    "a side for the layout of the file": ("npz_side: 16", [], "npz_side is for the layout npz"),
    "a side of zero": ("npz_side: 0\nlayout: npz", [], "npz_side is 0"),
    "a side that no memory holds": ("npz_side: 100000\nlayout: npz", [], "npz_side is 100000"),
    "an engine that is not installed": ("engine: ray", [], "pip install 'arkv[ray]'"),
    "the same by a flag": ("", ["--engine", "ray"], "pip install 'arkv[ray]'"),
    "workers of one process": ("workers: 2", [], "workers is 2"),
    "a policy without such a parameter": ("policy: window:ratio=1/2,sink=3", [], "did you mean sinks?"),
    "a policy without its parameter": ("policy: window:ratio=7", [], "the ratio is 7"),
    "a sheet that is a folder": ("", ["--sheet", "."], "it is a folder"),
    "more pictures than a list can have": ("samples: 999999999", [], "a job has room for"),
    "prompts that are not there": ("prompts: nowhere.txt", [], "cannot read nowhere.txt"),
    "a folder that is a file": ("out: prompts.txt", [], "it is a file"),
    "a folder below a file": ("out: prompts.txt/out", [], "prompts.txt/out"),
}


@pytest.mark.parametrize(("lines", "flags", "told"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_together_is_refused_before_anything_is_begun(
    lines: str,
    flags: list[str],
    told: str,
    job: Path,
    model: Letters,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = [line.partition(":")[0] for line in lines.splitlines()]
    kept = [line for line in job.read_text().splitlines() if line.partition(":")[0] not in names]
    job.write_text("\n".join([*kept, lines]))
    monkeypatch.setattr(description.importlib.util, "find_spec", lambda name: None)
    before = sorted(Path().rglob("*"))
    assert told in arkv_says(capsys, "run", job, "--quiet", *flags, status=1)
    assert sorted(Path().rglob("*")) == before
