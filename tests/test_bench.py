"""Measuring: which configurations, in which order, and what comes out."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from arkv.bench import Configuration, configurations, describe_run, measure
from arkv.decoder import Decoder, Result, Statistics
from arkv.errors import ArkvError, BudgetError, UnknownNameError
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig


@pytest.fixture(scope="module")
def model() -> Scenes:
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    return Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config).eval()


def test_ratios_go_to_the_policies_that_have_one() -> None:
    assert configurations(["full", "linear:recent=48", "window:budget=90"], ["1/6", "1/3"], [1, 4]) == [
        Configuration(policy, size)
        for size in (1, 4)
        for policy in ("full", "linear:recent=48,ratio=1/6", "linear:recent=48,ratio=1/3", "window:budget=90")
    ]


def test_unknown_policy() -> None:
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        configurations(["linaer"], ["1/6"], [1])


def test_impossible_configurations_are_refused_before_the_first_picture(model: Scenes) -> None:
    wanted = [Configuration("full", 1), Configuration("linear:ratio=1/100", 1)]
    with pytest.raises(BudgetError, match="smallest ratio"):
        measure(model, wanted)
    with pytest.raises(ArkvError, match="repeats is 0"):
        measure(model, wanted[:1], repeats=0)


def test_configurations_take_turns_and_the_full_cache_is_the_reference(
    model: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    # Seconds by round, the cold one first: the machine is slow in the second round.
    took = {"FullCache": iter([9.0, 2.0, 8.0, 2.0]), "SlidingWindow": iter([9.0, 1.0, 4.0, 0.5])}

    def generate(self: Decoder, prompts: list[str], **_: object) -> Result:
        name = type(self.policy).__name__
        order.append((name, len(prompts)))
        size = len(prompts) * 576
        return Result([], torch.empty(0), Statistics(len(prompts), size, 576, next(took[name]), 10, 40))

    monkeypatch.setattr(Decoder, "generate", generate)
    full, window = measure(model, [Configuration("full", 2), Configuration("window:ratio=1/6", 2)], repeats=3)
    assert order == [("FullCache", 2), ("SlidingWindow", 2)] * 4
    assert window.seconds == [1.0, 4.0, 0.5]
    assert window.tokens_per_second == 2 * 576
    assert window.pictures_per_second == 2
    assert window.milliseconds_per_step == pytest.approx(1000 / 576)
    assert (full.speedup, window.speedup) == (1, 2)
    assert (full.ratio, window.ratio) == (1, 1 / 6)


def test_measurement_and_its_circumstances_are_json(model: Scenes) -> None:
    (row,) = measure(model, [Configuration("window:ratio=1/6", 1)], repeats=1, guidance=1, seed=5)
    assert row.speedup is None
    assert not row.guided
    assert len(row.seconds) == 1
    assert row.kv_bytes < row.full_kv_bytes
    assert json.loads(json.dumps(asdict(row)))["policy"] == "window:ratio=1/6"
    run = json.loads(json.dumps(describe_run(model, seed=5, guidance=None)))
    assert run["seed"] == 5
    assert run["dtype"] == "float32"
    assert run["guidance"] == model.spec.guidance
