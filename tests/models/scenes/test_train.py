from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from arkv.errors import ArkvError, NumericalError
from arkv.models.scenes import train
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import Codebook
from arkv.models.scenes.drawing import Scene, SceneObject, draw
from arkv.models.transformer import TransformerConfig
from arkv.weights.files import read_config

TINY = TransformerConfig(layers=2, width=32, heads=2, kv_heads=1, head_dim=8, hidden=32)


@pytest.fixture
def init(tmp_path: Path, codebook: Codebook) -> Path:
    """Exported weights of a small model."""
    torch.manual_seed(0)
    model = Scenes(codebook, TINY)
    train.initialise(model)
    path = tmp_path / "init" / "scenes.safetensors"
    path.parent.mkdir()
    train.export(model, path, {"pictures": 100, "hours": 1.0})
    return path


@pytest.fixture(autouse=True)
def _settings_of_the_process() -> Iterator[None]:
    # hypothesis, in the same process, wants the subnormal numbers that training flushes.
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_flush_denormal(False)
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(autouse=True)
def _eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)


def run(init: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Path:
    given = ["train", "--init", str(init), "--out", str(out), "--batch", "2", "--pictures", "8", *more]
    monkeypatch.setattr("sys.argv", given)
    train.main()
    return out / "scenes.safetensors"


def test_a_run_that_was_stopped_goes_on_where_it_was(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(init, tmp_path / "whole", monkeypatch)
    drawn = train.training_batch

    def stop_at_the_third(*arguments: Any) -> Any:
        stop_at_the_third.calls += 1  # type: ignore[attr-defined]
        if stop_at_the_third.calls == 3:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        return drawn(*arguments)

    stop_at_the_third.calls = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_batch", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            run(init, tmp_path / "stopped", patch)
    stopped = run(init, tmp_path / "stopped", monkeypatch)
    expected, found, before = load_file(whole), load_file(stopped), load_file(init)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not torch.equal(expected["output.weight"], before["output.weight"])
    assert read_config(stopped.with_suffix(".json"))["pictures"] == 108
    assert Scenes.from_pretrained(stopped).spec.layers == 2


@pytest.mark.parametrize("other", [("--batch", "4"), ("--seed", "7")])
def test_a_run_goes_on_with_its_own_settings_only(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: tuple[str, str]
) -> None:
    run(init, tmp_path / "run", monkeypatch)
    with pytest.raises(ArkvError, match="--batch 2 --seed 0"):
        run(init, tmp_path / "run", monkeypatch, *other)


def test_a_run_that_breaks_keeps_its_last_good_state(
    init: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NumericalError, match="step"):
        run(init, tmp_path / "run", monkeypatch, "--rate", "inf")
    assert not (tmp_path / "run" / "state.pt").exists()


def test_objects_begin_where_their_first_code_stands(codebook: Codebook) -> None:
    rng = numpy.random.default_rng(0)
    for shape in ("circle", "square", "triangle"):
        for _ in range(20):
            size = float(rng.uniform(10, 16))
            x, y = rng.uniform(1 + size / 2, 47 - size / 2, 2).tolist()
            scene = Scene((SceneObject(shape, "red", x, y, size),), "white")
            codes = codebook.encode(draw(scene)[None])[0]
            assert train.first_cells(scene, codes.view(24, 24)) == [
                int((codes != codes.mode().values).nonzero()[0])
            ]


def test_a_batch_counts_down_what_is_yet_to_begin(codebook: Codebook) -> None:
    words, codes, remaining = train.training_batch(codebook, 12, 576, 24, numpy.random.default_rng(1))
    assert words.shape == (12, 11)
    assert codes.shape == (12, 576)
    assert remaining.shape == (12, 576, 18)
    left = remaining.sum(-1)
    assert set(left[:, 0].tolist()) <= {1, 2, 3, 4}
    steps = -left.diff(dim=1)
    assert set(steps.flatten().tolist()) == {0, 1}
    assert (left[:, -1] == 0).all()
    begins = torch.nn.functional.pad(steps, (0, 1)).bool()
    # Nothing lies left of or above where an object begins but background.
    objects = (codes != codes.mode(1, keepdim=True).values).view(-1, 24, 24)
    around = torch.nn.functional.pad(objects, (1, 1, 1, 0))
    before = around[:, :-1, :-2] | around[:, :-1, 1:-1] | around[:, :-1, 2:] | around[:, 1:, :-2]
    assert objects.flatten(1)[begins].all()
    assert not before.flatten(1)[begins].any()


def test_the_rate_rises_stays_and_falls_to_zero() -> None:
    rates = [train.rate(step, 1000, 0.5) for step in range(1001)]
    assert rates[0] == 1 / train.WARMUP_STEPS
    assert rates[train.WARMUP_STEPS : 500] == [1.0] * (500 - train.WARMUP_STEPS)
    assert rates[750] == 0.5
    assert rates[1000] == 0
