"""How far back heads look: against plain lists, as files, as a map and on the command line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from tiny import GRID, Tiny

import arkv
from arkv import Decoder, Grid, registry
from arkv.cli import main
from arkv.errors import ArkvError, CheckpointError
from arkv.head_profile import PERCENTS, HeadProfile, usual_window
from arkv.study.profile import draw_map, measure
from arkv.testing.oracle import Oracle

PROMPTS = [(1, 2, 3), (4,), (0, 5)]
HALVES = (9,) * 50 + (3,) * 49
PROFILE = HeadProfile(
    model="tiny",
    tokens=20,
    reach=((HALVES, (5,) * 99), ((19,) * 99, (0,) * 99)),
    prompts=3,
    guidance=1.5,
    date="2026-01-01T00:00:00+00:00",
    versions={"arkv": "0.1.0"},
)


def naive(model: Tiny, guidance: float) -> dict[tuple[int, int], list[float]]:
    """The share that each window leaves out, by layer and head, of what is drawn from seeds 0, 1, ..."""
    spec, grid = model.spec, model.spec.grid
    tokens = Decoder(model, arkv.load_policy("full")).generate(PROMPTS, guidance=guidance).tokens
    guided = guidance != 1
    oracle = Oracle(model, model.condition(PROMPTS, guided))
    oracle.prefill()
    places = list(numpy.ndindex(spec.layers, spec.kv_heads))
    shares: dict[tuple[int, int], list[list[float]]] = {place: [] for place in places}
    for step in range(grid.tokens - 1):
        oracle.advance(tokens[:, step].repeat(1 + guided), step)
        for (layer, _, head), mass in oracle.mass.items():
            visual = {place - oracle.length: w for place, w in mass.items() if place >= oracle.length}
            whole = sum(visual.values())
            left_out = [
                sum(w for p, w in visual.items() if step - p > window) / whole
                for window in range(grid.tokens)
            ]
            shares[layer, head].append(left_out)
    return {place: numpy.mean(shares[place], axis=0).tolist() for place in places}


@pytest.mark.parametrize("grid", [GRID, Grid(5, 3, newline=True)], ids=["plain", "newline"])
@pytest.mark.parametrize("guidance", [1.0, 1.5])
@torch.inference_mode()
def test_reaches_are_those_of_plain_lists(grid: Grid, guidance: float) -> None:
    model = Tiny(grid)
    profile = measure(model, PROMPTS, guidance=guidance)
    for (layer, head), left_out in naive(model, guidance).items():
        for percent, window in zip(PERCENTS, profile.reach[layer][head], strict=True):
            # The least window that leaves out no more than that, within rounding.
            assert left_out[window] <= percent / 100 + 1e-6
            assert window == 0 or left_out[window - 1] > percent / 100 - 1e-6
        for window in range(grid.tokens):
            share = profile.left_out(window)[layer][head]
            assert share - 1e-6 <= left_out[window] <= share + 0.01 + 1e-6
    assert len({head for layer in profile.reach for head in layer}) > 2, "heads that can be told apart"
    assert (profile.model, profile.tokens, profile.prompts) == ("tiny", grid.tokens, 3)
    assert profile.guidance == guidance
    assert profile.versions["arkv"] == arkv.__version__


def test_a_share_is_told_for_every_window_and_every_percent() -> None:
    assert [PROFILE.left_out(window)[0][0] for window in (0, 2, 3, 8, 9)] == [0.99, 0.99, 0.5, 0.5, 0]
    assert PROFILE.left_out(18)[1] == (0.99, 0)


def test_batches_change_nothing() -> None:
    model = Tiny()
    whole = measure(model, PROMPTS, seeds=[7, 8, 9])
    assert measure(model, PROMPTS, seeds=[7, 8, 9], batch_size=2).reach == whole.reach
    assert measure(model, PROMPTS, seeds=[1, 2, 3]).reach != whole.reach


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"seeds": [1]}, "1 seeds for 3 prompts"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags: dict, complaint: str) -> None:
    with pytest.raises(ArkvError, match=complaint):
        measure(Tiny(), PROMPTS, **flags)


def test_no_prompts_are_refused() -> None:
    with pytest.raises(ArkvError, match="at least one"):
        measure(Tiny(), [])


def test_a_file_holds_the_whole_profile(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    PROFILE.save(path)
    assert HeadProfile.load(path) == PROFILE
    assert HeadProfile.load(str(path)).reach[0][0] == HALVES
    assert json.loads(path.read_text())["reach"][0][0] == list(HALVES)
    assert len(path.read_text().splitlines()) < 25, "a head a line"
    with pytest.raises(ArkvError, match="cannot write"):
        PROFILE.save(tmp_path)


BROKEN = {
    "not JSON": ("{", "is not JSON"),
    "no object": ("[]", "is not a JSON object"),
    "no layers": ({"reach": []}, "the same number of heads, at least one"),
    "no heads": ({"reach": [[], []]}, "the same number of heads, at least one"),
    "ragged": ({"reach": [[HALVES], [HALVES] * 2]}, "the same number of heads"),
    "flat": ({"reach": [HALVES]}, "not iterable"),
    "text": ({"reach": [[["far"] * 99]]}, "expected whole numbers from 0 to 20"),
    "too far": ({"reach": [[[21] * 99]]}, "expected whole numbers from 0 to 20"),
    "not every percent": ({"reach": [[[3] * 98]]}, "expected 99 numbers a head"),
    "rising": ({"reach": [[[3] * 98 + [4]]]}, "none greater than the last"),
    "tokens of another type": ({"tokens": "many"}, "'tokens' is 'many'"),
    "versions of another type": ({"versions": None}, "'versions' is None"),
}


@pytest.mark.parametrize(("content", "complaint"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_told(content: str | dict, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    whole = json.loads(PROFILE.to_json())
    path.write_text(content if isinstance(content, str) else json.dumps(whole | content))
    with pytest.raises(CheckpointError) as caught:
        HeadProfile.load(path)
    assert complaint in str(caught.value)
    assert f"write one with 'arkv profile --model NAME --out {path}'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({}, "is no profile of heads: 'model' is missing"),
        ({"model": "tiny", "outside": [[0.5]], "radius": 2}, "is a profile of the older kind"),
    ],
)
def test_files_of_something_else_and_of_the_older_kind_are_told(
    content: dict, complaint: str, tmp_path: Path
) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{complaint}.*; write one with 'arkv profile --model NAME"):
        HeadProfile.load(path)


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory; write one with 'arkv profile"):
        HeadProfile.load(tmp_path / "heads.json")


def test_the_models_own_profile_fits_it() -> None:
    spec = arkv.load_model("scenes", device="meta").spec
    assert spec.head_profile is not None
    profile = HeadProfile.load(spec.head_profile)
    assert profile.model == "scenes"
    assert profile.tokens == spec.grid.tokens
    assert [len(layer) for layer in profile.reach] == [spec.kv_heads] * spec.layers
    left_out = profile.left_out(usual_window(spec.grid))
    assert min(map(min, left_out)) < 0.1 < 0.5 < max(map(max, left_out))


def test_the_map_grows_with_the_heads_and_shows_the_shares() -> None:
    pytest.importorskip("matplotlib")
    small = draw_map(PROFILE, 4)
    large = draw_map(replace(PROFILE, reach=((HALVES,) * 6,) * 5), 4)
    assert large.width > small.width > 300
    assert large.height > small.height > 200
    assert draw_map(PROFILE, 2).tobytes() != small.tobytes()


def test_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArkvError, match=r"not installed: pip install 'arkv\[viz\]'"):
        draw_map(PROFILE, 4)


def test_the_command_writes_file_and_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: Tiny())
    out, image = tmp_path / "new" / "heads.json", tmp_path / "heads.png"
    flags = ["--prompts", "3", "--window", "7", "--seed", "4", "--quiet"]
    assert main(["profile", "--out", str(out), "--map", str(image), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed
    model = Tiny()
    expected = measure(model, model.example_prompts(3, 4), seeds=[4, 5, 6])
    assert "more than 7 tokens back" in printed
    assert HeadProfile.load(out).reach == expected.reach
    assert Image.open(image).width > 300


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "scene"], "unknown model 'scene'"),
        (["--map", "heads.jpg"], "cannot write heads.jpg: expected a name that ends in .png"),
    ],
)
def test_bad_input_is_one_line_and_no_file(
    flags: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", "--out", "heads.json", "--quiet", *flags]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("arkv: error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert not list(tmp_path.iterdir())


def test_shares_are_added_where_there_is_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apple's MPS has no float64: numbers have to come to the CPU before they are made wider."""
    came, double, to_cpu = set[int](), torch.Tensor.double, torch.Tensor.cpu

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        moved = to_cpu(tensor).clone()
        came.add(id(moved))
        return moved

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in came:
            raise TypeError("MPS has no float64")
        return double(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch.Tensor, "double", wide)
    model = Tiny()
    measured = measure(model, model.example_prompts(1, 0))
    assert len(measured.reach) == model.spec.layers
