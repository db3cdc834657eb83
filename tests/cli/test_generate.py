"""`arkv generate`: what it writes, what it prints, and how it fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from saying import PROMPTS, arkv_says, picture_of

import arkv
from arkv.cli import main
from arkv.models.scenes.adapter import Scenes


def test_generate_writes_a_picture_and_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the trained weights, from end to end."""
    out = tmp_path / "new" / "picture.png"
    flags = ("--policy", "linear:recent=48", "--ratio", "1/6", "--seed", "7", "--guidance", "1", "--quiet")
    printed = arkv_says(capsys, "generate", *flags, *picture_of(PROMPTS[0]), "--out", out)
    assert printed.startswith(f"{out}: ")
    assert printed.count("\n") == 1
    assert "22% of the full cache" in printed
    image = Image.open(out)
    assert image.size == (48, 48)
    assert image.text["prompt"] == PROMPTS[0]
    assert image.text["seed"] == "7"
    assert image.text["model"] == "scenes"
    assert image.text["policy"] == "linear:ratio=1/6,share_rows=False,anchors=4,recent=48,scoring=softmax"
    assert image.text["Software"] == f"arkv {arkv.__version__}"
    settings = json.loads(image.text["settings"])
    assert settings == {
        "guidance": 1,
        "temperature": 1,
        "top_k": None,
        "top_p": None,
        "guided_tokens": None,
        "dtype": "float32",
        "compile": "none",
        "kv_dtype": None,
        "window": "auto",
    }
    assert [file.name for file in out.parent.iterdir()] == ["picture.png"]


def test_generate_fills_a_folder_that_its_own_metadata_reproduces(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, again = tmp_path / "pictures", tmp_path / "again.png"
    flags = ("generate", "--policy", "window", "--ratio", "1/4")
    arkv_says(capsys, *flags, *picture_of(*PROMPTS), "--seed", "3", "--batch-size", "1", "--out", folder)
    assert sorted(file.name for file in folder.iterdir()) == ["0000.png", "0001.png"]
    second = Image.open(folder / "0001.png")
    assert second.text["prompt"] == PROMPTS[1]
    recorded = ("--policy", second.text["policy"], "--seed", second.text["seed"])
    arkv_says(capsys, "generate", *recorded, *picture_of(PROMPTS[1]), "--out", again)
    assert Image.open(again).tobytes() == second.tobytes()
    assert Image.open(folder / "0000.png").tobytes() != second.tobytes()


def test_generate_puts_several_pictures_of_one_file_on_a_sheet(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["generate", *picture_of(*PROMPTS), "--out", str(out)]) == 0
    assert "token" in capsys.readouterr().err, "progress is shown unless --quiet"
    image = Image.open(out)
    assert image.width > 2 * 192
    assert image.height > 192
    assert json.loads(image.text["prompt"]) == list(PROMPTS)
    assert json.loads(image.text["seed"]) == [0, 1]


BAD = {
    "unknown model": (
        ["--model", "scene"],
        "unknown model 'scene', and there is no such file or folder; did you mean scenes?",
    ),
    "unknown policy": (["--policy", "windw"], "unknown policy 'windw'; did you mean window?"),
    "unknown parameter": (["--policy", "linear:anchor=2", "--ratio", "1/6"], "did you mean anchors?"),
    "parameter without value": (["--policy", "linear:anchors"], "expected parameter=value"),
    "parameter of another type": (["--policy", "linear:anchors=few,ratio=1/6"], "anchors is 'few'"),
    "ratio for the full cache": (
        ["--ratio", "1/6"],
        "the policy full takes no parameters: leave out ratio=1/6",
    ),
    "no budget": (["--policy", "linear"], "give a budget in slots or a ratio"),
    "ratio of zero": (["--policy", "window", "--ratio", "0"], "the ratio is 0"),
    "ratio below zero": (["--policy", "window", "--ratio=-1/6"], "the ratio is -1/6"),
    "ratio that is none": (["--policy", "window", "--ratio", "small"], "cannot read the ratio 'small'"),
    "ratio too small": (["--policy", "linear", "--ratio", "1/100"], "the smallest ratio that does is 28/576"),
    "unknown word": (["--prompt", "three red dragons"], "unknown word 'dragons'"),
    "empty prompt": (["--prompt", ""], "prompt"),
    "negative seed": (["--seed=-1"], "--seed is -1"),
    "negative temperature": (["--temperature=-1"], "temperature is -1"),
    "top-k below zero": (["--top-k=-1"], "--top-k is -1"),
    "top-k above the vocabulary": (["--top-k", "9999"], "expected 1 to "),
    "top-p of zero": (["--top-p", "0"], "--top-p is 0"),
    "guidance that is no number": (["--guidance", "nan"], "guidance is nan"),
    "no such device": (["--device", "abacus"], "unknown device 'abacus'"),
    "another format": (["--out", "picture.jpg"], "expected a name that ends in .png, or a folder"),
}


@pytest.mark.parametrize(("flags", "complaint"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(
    flags: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["generate", "--prompt", PROMPTS[0], "--out", "pictures/"]
    assert complaint in arkv_says(capsys, *usual, "--quiet", *flags, status=1)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_one_line(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("arkv.estimate.available_memory", lambda device: 250_000)
    out = tmp_path / "sheet.png"
    complaint = arkv_says(capsys, "generate", *picture_of(*PROMPTS), "--out", out, "--quiet", status=1)
    assert "the largest batch that fits is 1" in complaint
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_none_leave_no_file(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.no_grad():
        tiny.output.weight.fill_(torch.nan)
    out = tmp_path / "picture.png"
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert "NaN or infinity at visual token 0" in complaint
    assert not list(tmp_path.iterdir())


def damage_all(weights: Path) -> None:
    weights.unlink()


def damage_end(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[:100_000])


def damage_config(weights: Path) -> None:
    config = weights.with_suffix(".json")
    facts = json.loads(config.read_text())
    config.write_text(json.dumps(facts | {"codes": 7}))


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (damage_all, "there is no checkpoint"),
        (damage_end, "is damaged or not a safetensors file"),
        (damage_config, "the model wants (7,"),
    ],
)
def test_bad_checkpoint_is_one_line(
    damage: Callable[[Path], None],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from arkv.models.scenes.adapter import WEIGHTS

    weights = tmp_path / WEIGHTS.name
    for suffix in (".safetensors", ".json"):
        weights.with_suffix(suffix).write_bytes(WEIGHTS.with_suffix(suffix).read_bytes())
    damage(weights)
    load = Scenes.from_pretrained
    monkeypatch.setattr(Scenes, "from_pretrained", lambda **keywords: load(weights, **keywords))
    out = tmp_path / "picture.png"
    assert complaint in arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, status=1)
    assert not out.exists()
