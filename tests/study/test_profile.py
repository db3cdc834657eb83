"""Shares of distant attention: against plain lists, as files, as a map and on the command line."""

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
from arkv.study.profile import HeadProfile, draw_map, measure
from arkv.testing.oracle import Oracle

PROMPTS = [(1, 2, 3), (4,), (0, 5)]
PROFILE = HeadProfile(
    model="tiny",
    outside=((0.25, 0.5), (1.0, 0.0)),
    radius=2,
    prompts=3,
    guidance=1.5,
    date="2026-01-01T00:00:00+00:00",
    versions={"arkv": "0.1.0"},
)


def naive(model: Tiny, radius: int, guidance: float) -> list[list[float]]:
    """The shares by layer and head, cell by cell, of what `measure` draws from seeds 0, 1, ..."""
    spec, grid = model.spec, model.spec.grid
    tokens = Decoder(model, arkv.load_policy("full")).generate(PROMPTS, guidance=guidance).tokens
    guided = guidance != 1
    oracle = Oracle(model, model.condition(PROMPTS, guided))
    oracle.prefill()
    shares: dict[tuple[int, int], list[float]] = {
        place: [] for place in numpy.ndindex(spec.layers, spec.kv_heads)
    }
    for step in range(grid.tokens - 1):
        oracle.advance(tokens[:, step].repeat(1 + guided), step)
        row, column = divmod(step, grid.line)
        if row <= radius:
            continue
        for (layer, _, head), mass in oracle.mass.items():
            far = everywhere = 0.0
            for place, weight in mass.items():
                if place < oracle.length:
                    continue
                r, c = divmod(place - oracle.length, grid.line)
                everywhere += weight
                far += weight * (row - r > radius or abs(column - c) > radius)
            shares[layer, head].append(far / everywhere)
    return [
        [float(numpy.mean(shares[layer, head])) for head in range(spec.kv_heads)]
        for layer in range(spec.layers)
    ]


@pytest.mark.parametrize("grid", [GRID, Grid(5, 3, newline=True)], ids=["plain", "newline"])
@pytest.mark.parametrize(("radius", "guidance"), [(0, 1.5), (1, 1.0), (2, 1.5)])
@torch.inference_mode()
def test_shares_are_those_of_plain_lists(grid: Grid, radius: int, guidance: float) -> None:
    model = Tiny(grid)
    profile = measure(model, PROMPTS, radius=radius, guidance=guidance)
    assert numpy.allclose(profile.outside, naive(model, radius, guidance), atol=2e-6)
    assert len({share for layer in profile.outside for share in layer}) > 2, "heads that can be told apart"
    assert (profile.model, profile.radius, profile.prompts) == ("tiny", radius, 3)
    assert profile.guidance == guidance
    assert profile.versions["arkv"] == arkv.__version__


def test_batches_change_nothing() -> None:
    model = Tiny()
    whole = measure(model, PROMPTS, radius=1, seeds=[7, 8, 9])
    parts = measure(model, PROMPTS, radius=1, seeds=[7, 8, 9], batch_size=2)
    assert numpy.allclose(whole.outside, parts.outside, atol=2e-6)
    other = measure(model, PROMPTS, radius=1, seeds=[1, 2, 3])
    assert not numpy.allclose(whole.outside, other.outside, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"radius": 3}, "the radius is 3: expected 0 to 2"),
        ({"radius": -1}, "the radius is -1"),
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
    assert HeadProfile.load(str(path)).outside == ((0.25, 0.5), (1.0, 0.0))
    assert json.loads(path.read_text())["outside"] == [[0.25, 0.5], [1.0, 0.0]]
    with pytest.raises(ArkvError, match="cannot write"):
        PROFILE.save(tmp_path)


BROKEN = {
    "not JSON": ("{", "is not JSON"),
    "no object": ("[]", "is not a JSON object"),
    "another object": ("{}", "'outside' is missing"),
    "no layers": ({"outside": []}, "the same number of heads, at least one"),
    "no heads": ({"outside": [[], []]}, "the same number of heads, at least one"),
    "ragged": ({"outside": [[0.1], [0.2, 0.3]]}, "the same number of heads"),
    "flat": ({"outside": [0.1, 0.2]}, "not iterable"),
    "text": ({"outside": [["much"]]}, "has 'much', expected shares"),
    "not a share": ({"outside": [[1.5]]}, "has 1.5, expected shares from 0 to 1"),
    "not a number": ({"outside": [[float("nan")]]}, "has nan, expected shares"),
    "radius of another type": ({"radius": "wide"}, "'radius' is 'wide'"),
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


def test_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory; write one with 'arkv profile"):
        HeadProfile.load(tmp_path / "heads.json")


def test_the_models_own_profile_fits_it() -> None:
    spec = arkv.load_model("scenes", device="meta").spec
    assert spec.head_profile is not None
    profile = HeadProfile.load(spec.head_profile)
    assert profile.model == "scenes"
    assert [len(layer) for layer in profile.outside] == [spec.kv_heads] * spec.layers
    assert min(map(min, profile.outside)) < 0.2 < 0.8 < max(map(max, profile.outside))


def test_the_map_grows_with_the_heads_and_shows_the_shares() -> None:
    pytest.importorskip("matplotlib")
    small = draw_map(PROFILE)
    large = draw_map(replace(PROFILE, outside=((0.5,) * 6,) * 5))
    assert large.width > small.width > 300
    assert large.height > small.height > 200
    assert draw_map(replace(PROFILE, outside=((0.25, 0.5), (1.0, 0.9)))).tobytes() != small.tobytes()


def test_missing_matplotlib_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ArkvError, match=r"not installed: pip install 'arkv\[viz\]'"):
        draw_map(PROFILE)


def test_the_command_writes_file_and_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: Tiny())
    out, image = tmp_path / "new" / "heads.json", tmp_path / "heads.png"
    flags = ["--prompts", "3", "--radius", "1", "--seed", "4", "--quiet"]
    assert main(["profile", "--out", str(out), "--map", str(image), *flags]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: " in printed
    model = Tiny()
    expected = measure(model, model.example_prompts(3, 4), seeds=[4, 5, 6], radius=1)
    assert HeadProfile.load(out).outside == expected.outside
    assert Image.open(image).width > 300


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--model", "scene"], "unknown model 'scene'"),
        (["--radius", "23"], "the radius is 23: expected 0 to 22"),
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
    measured = measure(model, model.example_prompts(1, 0), radius=1)
    assert len(measured.outside) == model.spec.layers
