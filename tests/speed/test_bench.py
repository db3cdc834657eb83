"""Measuring: which configurations, in which order, and what comes out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError, BudgetError, MemoryLimitError, UnknownNameError
from arkv.estimate import estimate
from arkv.machine.description import describe_run
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig
from arkv.registry import load_policy
from arkv.speed import bench
from arkv.speed.bench import Configuration, at_equal_memory, configurations, measure, refusal
from arkv.speed.engine import DYNAMIC, PolicyEngine
from arkv.speed.measurement import Measurement, Refusal, from_dict, speedups
from arkv.speed.speed_figure import draw_speed
from arkv.speed.timing import Extent, Trace

FULL, WINDOW = Configuration("full", 2), Configuration("window:ratio=1/6", 2)


@pytest.fixture(scope="module")
def model() -> Scenes:
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    return Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config).eval()


@pytest.fixture(scope="module")
def row(model: Scenes) -> Measurement:
    (row,) = run(model, [replace(WINDOW, batch_size=1)], repeats=2, guidance=1, extent=Extent(tokens=50))
    assert isinstance(row, Measurement)
    return row


def run(model: Scenes, wanted: Sequence[Configuration], **settings: Any) -> list[Measurement | Refusal]:
    """The last row of each configuration."""
    rows = measure(model, wanted, bandwidth=1e9, **settings)
    return list({(row.policy, row.batch_size): row for row in rows}.values())


def test_ratios_go_to_the_policies_that_have_one() -> None:
    policies = ["full", "linear:recent=48", DYNAMIC, "window:budget=90"]
    assert configurations(policies, ["1/6", "1/3"], [1, 4]) == [
        Configuration(policy, size)
        for size in (1, 4)
        for policy in (
            "full",
            "linear:recent=48,ratio=1/6",
            "linear:recent=48,ratio=1/3",
            DYNAMIC,
            "window:budget=90",
        )
    ]


def test_unknown_policy() -> None:
    with pytest.raises(UnknownNameError, match="did you mean linear"):
        configurations(["linaer"], ["1/6"], [1])


def test_impossible_configurations_are_refused_before_the_first_picture(model: Scenes) -> None:
    impossible = Configuration("linear:ratio=1/100", 1)
    with pytest.raises(BudgetError, match="smallest ratio"):
        measure(model, [FULL, impossible])
    with pytest.raises(ArkvError, match="repeats is 0"):
        measure(model, [FULL], repeats=0)
    with pytest.raises(ArkvError, match="line 24"):
        measure(model, [FULL], extent=Extent(lines=(24,)))
    assert refusal(model, FULL) is None
    for wanted, reason in ((impossible, "smallest ratio"), (Configuration(DYNAMIC, 1), "no scenes")):
        refused = refusal(model, wanted)
        assert refused is not None
        assert reason in refused.error


class Script:
    """Decodes nothing; every step takes as long as it says, by policy and then by batch."""

    def __init__(self, took: dict[str, list[float]]) -> None:
        self.took = {name: iter(seconds) for name, seconds in took.items()}
        self.order: list[tuple[str, int]] = []

    def decode(
        self, model: Scenes, engine: PolicyEngine, pictures: int, _: object, spans: list[range], *__: object
    ) -> Trace:
        name = type(engine._policy).__name__
        self.order.append((name, pictures))
        with torch.inference_mode():
            condition = model.condition(model.example_prompts(pictures, 0), guided=True)
            engine.begin(condition, seed_keys(range(pictures)), Sampling(2.0))
        took, line = next(self.took[name]), model.spec.grid.line
        positions = [position for span in spans for position in span]
        # A line's steps take a hundredth of a second more than the last line's.
        steps = [took + 0.01 * (position // line) for position in positions]
        return Trace(torch.empty(0), 9, 1.0, steps, {position // line: 5 for position in positions})


def test_configurations_take_turns_and_the_full_cache_is_the_reference(
    model: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cold one first; the machine is slow in the second round.
    script = Script({"FullCache": [9.0, 2.0, 8.0, 2.0], "SlidingWindow": [9.0, 1.0, 4.0, 0.5]})
    monkeypatch.setattr(bench, "decode", script.decode)
    full, window = run(model, [FULL, WINDOW], repeats=3)
    assert isinstance(full, Measurement)
    assert isinstance(window, Measurement)
    assert script.order == [("FullCache", 2), ("SlidingWindow", 2)] * 4
    assert window.turns
    assert (full.ratio, window.ratio) == (1, 1 / 6)
    # The last token enters no cache.
    mean = 0.01 * statistics.mean(position // 24 for position in range(575))
    assert window.seconds == pytest.approx([1 + 575 * (took + mean) for took in (1.0, 4.0, 0.5)])
    assert window.tokens_per_second == pytest.approx(2 * 576 / window.seconds[0])
    assert window.pictures_per_second == pytest.approx(2 / window.seconds[0])
    assert window.milliseconds_per_step == pytest.approx(1115, abs=10)
    assert window.milliseconds_per_step_p95 == pytest.approx(4200, abs=20)
    first, *_, last = window.by_line
    assert (first.milliseconds, last.milliseconds) == pytest.approx((1000, 1230))
    assert (first.slots, last.slots) == (9 + 12.5, 9 + 96 + 12)
    bytes_of_rest = window.step_bytes - window.weight_bytes
    assert window.roofline_share == pytest.approx(
        (window.weight_bytes + bytes_of_rest) / 1e9 / statistics.mean([1 + mean, 4 + mean, 0.5 + mean])
    )
    assert speedups([window, full]) == pytest.approx(
        [statistics.median(f / w for f, w in zip(full.seconds, window.seconds, strict=True)), 1]
    )
    assert speedups([window]) == [None]
    assert speedups([replace(window, batch_size=4), full]) == [None, 1]


def test_a_part_of_a_picture_is_not_taken_for_the_whole(
    model: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(extent: Extent) -> Measurement:
        monkeypatch.setattr(bench, "decode", Script({"FullCache": [1.0, 1.0]}).decode)
        (row,) = run(model, [FULL], repeats=1, extent=extent)
        assert isinstance(row, Measurement)
        return row

    whole = measured(Extent())
    lines = measured(Extent(lines=(0, 10, 23)))
    # What grows evenly is interpolated exactly.
    assert lines.seconds == pytest.approx(whole.seconds)
    assert lines.pictures_per_second == pytest.approx(whole.pictures_per_second)
    assert (lines.lines, whole.lines) == ([0, 10, 23], None)
    assert [line.line for line in lines.by_line] == [0, 10, 23]
    tokens = measured(Extent(tokens=30))
    assert (tokens.tokens, whole.tokens) == (30, None)
    assert tokens.pictures_per_second is None
    assert tokens.seconds == pytest.approx([1 + 24 * 1 + 6 * 1.01])
    assert [line.line for line in tokens.by_line] == [0]


def test_bytes_of_a_step_are_weights_and_what_is_held(model: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "decode", Script({"FullCache": [1.0] * 4}).decode)
    rows = run(model, [FULL, replace(FULL, batch_size=6)], repeats=1)
    slot = 2 * 16 * 4  # key and value of the one head of the one layer, in float32
    for row, pictures in zip(rows, (2, 6), strict=True):
        assert isinstance(row, Measurement)
        held = 9 + statistics.mean(range(1, 576))
        assert row.step_bytes - row.weight_bytes == pytest.approx(2 * pictures * slot * (held + 1))


def test_a_row_comes_after_every_round(model: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script({"FullCache": [9.0, 2.0, 1.0], "SlidingWindow": [9.0, 1.0, 3.0]})
    monkeypatch.setattr(bench, "decode", script.decode)
    rows = measure(model, [FULL, WINDOW], repeats=2, bandwidth=1e9)
    for policy, rounds in ((FULL, 1), (WINDOW, 1), (FULL, 2), (WINDOW, 2)):
        row = next(rows)
        assert isinstance(row, Measurement)
        assert (row.policy, len(row.seconds)) == (policy.policy, rounds)
        assert len(script.order) == (3 if policy is FULL else 4) + 2 * (rounds - 1)
    assert next(rows, None) is None


def test_caches_that_do_not_fit_together_follow_one_another(
    model: Scenes, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = estimate(model, load_policy("full"), 2).batch
    monkeypatch.setattr("arkv.estimate.available_memory", lambda _: int(1.2 * one))
    script = Script({"FullCache": [1.0] * 2, "SlidingWindow": [1.0] * 2})
    monkeypatch.setattr(bench, "decode", script.decode)
    rows = run(model, [FULL, replace(FULL, policy="window:ratio=1/2")], repeats=1)
    assert script.order == [("FullCache", 2)] * 2 + [("SlidingWindow", 2)] * 2
    assert not any(row.turns for row in rows if isinstance(row, Measurement))


def test_where_memory_is_short_the_others_go_on(model: Scenes, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script({"FullCache": [1.0] * 2, "SlidingWindow": [1.0] * 2})

    def decode(model: Scenes, engine: PolicyEngine, *rest: Any) -> Trace:
        if type(engine._policy).__name__ == "FullCache":
            raise MemoryLimitError("too much")
        return script.decode(model, engine, *rest)

    monkeypatch.setattr(bench, "decode", decode)
    full, window = run(model, [FULL, WINDOW], repeats=1)
    assert full == Refusal("scenes", "full", 2, None, "too much")
    assert isinstance(window, Measurement)
    assert from_dict(json.loads(json.dumps(asdict(full)))) == full


def test_batches_fill_equal_memory(model: Scenes) -> None:
    memory = 20_000_000
    found = at_equal_memory(model, ["full", "window:ratio=1/6", DYNAMIC], memory)
    assert [one.memory for one in found] == [memory] * 3
    full, window, baseline = (one.batch_size for one in found)
    assert baseline == full < window
    condition = model.condition(model.example_prompts(bench.SAMPLE, 0), guided=True).mask.shape[1]
    for one in found[:2]:
        for more, fits in ((0, True), (1, False)):
            needed = estimate(
                model, load_policy(one.policy), one.batch_size + more, condition=condition
            ).total
            assert (needed <= memory) is fits
    with pytest.raises(MemoryLimitError, match="one picture needs"):
        at_equal_memory(model, ["full"], 1000)


def test_measurement_and_its_circumstances_are_json(model: Scenes, row: Measurement) -> None:
    assert not row.guided
    assert len(row.seconds) == 2
    assert row.kv_bytes < row.full_kv_bytes
    assert from_dict(json.loads(json.dumps(asdict(row))) | {"commit": "abc"}) == row
    described = json.loads(json.dumps(describe_run(model, seed=5, guidance=None)))
    assert described["seed"] == 5
    assert described["dtype"] == "float32"
    assert described["guidance"] == model.spec.guidance


def test_a_figure_has_a_panel_for_what_was_measured(row: Measurement) -> None:
    rows = [replace(row, batch_size=size, by_line=row.by_line) for size in (1, 4)]
    two = draw_speed(rows, "a title " * 30)
    in_memory = [replace(one, memory=10**9, pictures_per_second=2.0) for one in rows]
    three = draw_speed(rows + in_memory, "a title")
    assert three.width > two.width
    assert two.height == three.height
    assert len(two.convert("L").getcolors()) > 10
