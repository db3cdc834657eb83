"""Decoding against the clock is decoding: the same tokens, and of a part of a picture the same steps."""

from __future__ import annotations

import gc
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import POLICIES, Tiny, build, legal_budgets, tight
from torch import Tensor
from tqdm import tqdm

from arkv import Decoder, Grid
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError
from arkv.model import Condition
from arkv.speed import timing
from arkv.speed.engine import Engine, PolicyEngine, StepByStep
from arkv.speed.timing import WHOLE, Extent, Trace, decode


def timed(model: Tiny, engine: Engine, extent: Extent, guidance: float = 1.5, pictures: int = 2) -> Trace:
    spans = extent.spans(model.spec.grid)
    with tqdm(disable=True) as bar:
        return decode(model, engine, pictures, Sampling(guidance), spans, 3, bar)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_tokens_are_those_of_the_decoder(guidance: float) -> None:
    model = Tiny()
    policy = tight("linear", model)
    expected = Decoder(model, policy).generate(
        model.example_prompts(2, 3), seeds=[3, 4], guidance=guidance, temperature=1.0
    )
    engine = PolicyEngine(model, policy, "none", guided=guidance != 1)
    for _ in range(2):  # a second batch in the same store
        trace = timed(model, engine, WHOLE, guidance)
        assert torch.equal(trace.tokens, expected.tokens)
    assert len(trace.steps) == model.spec.grid.tokens - 1, "the last token enters no cache"
    assert all(seconds > 0 for seconds in trace.steps)
    assert list(trace.memory) == list(range(model.spec.grid.rows))


def test_the_first_tokens_are_the_same_as_of_a_whole_picture() -> None:
    model = Tiny()
    engine = PolicyEngine(model, build("full", 0), "none", guided=True)
    whole, part = (timed(model, engine, extent) for extent in (WHOLE, Extent(tokens=7)))
    assert torch.equal(part.tokens[:, :7], whole.tokens[:, :7])
    assert len(part.steps) == 7


class Noting(StepByStep):
    """Notes what it is asked for."""

    kv_bytes, slot_bytes = 0, 0.0

    def __init__(self, model: Tiny) -> None:
        super().__init__(model)
        self.asked: list[Any] = []

    def prefill(self, condition: Condition) -> Tensor:
        self.asked.append("begin")
        return torch.zeros(len(condition.mask), 17)

    def advance(self, tokens: Tensor, position: int) -> Tensor:
        self.asked.append(position)
        return torch.zeros(len(tokens), 17)

    def skip(self, position: int) -> None:
        self.asked.append(f"skip to {position}")

    def resident(self, position: int) -> float:
        return position + 1

    def release(self) -> None: ...


def test_lines_are_reached_by_skipping() -> None:
    model = Tiny(Grid(4, 3))
    engine = Noting(model)
    trace = timed(model, engine, Extent(lines=(0, 1, 3)))
    # After the last token there is no step.
    assert engine.asked == ["begin", *range(6), "skip to 9", 9, 10]
    assert len(trace.steps) == 8
    assert list(trace.memory) == [0, 1, 3]


@pytest.mark.parametrize("name", POLICIES)
def test_a_line_can_be_skipped_to_under_every_policy(name: str) -> None:
    model = Tiny(Grid(4, 6))
    engine = PolicyEngine(model, tight(name, model), "none", guided=True)
    for _ in range(2):
        assert len(timed(model, engine, Extent(lines=(2, 3))).steps) == 11


def held(model: Tiny, engine: PolicyEngine, first: int, position: int) -> Tensor:
    """Tokens of every head at a step that was skipped to, after some first steps."""
    with torch.inference_mode():
        engine.begin(model.condition([(1, 2)], guided=False), seed_keys([0]), Sampling())
        engine.decode(range(first))
        engine.skip(position)
        engine.decode(range(position, position + 1))
    return engine.store.sum_by_head((engine.store.position >= 0).long())


@settings(max_examples=max(1, settings().max_examples // 3))
@given(st.sampled_from(["full", "linear", "often", "window", "adakv"]), st.data())
def test_a_skipped_cache_holds_as_much_as_a_decoded_one(name: str, data: st.DataObject) -> None:
    model = Tiny(Grid(4, 3), layers=1)
    parameters = {"every": data.draw(st.integers(1, 7))} if name == "often" else {}
    budget = data.draw(st.sampled_from(legal_budgets(name, model, **parameters)))
    policy = build(name, budget, **parameters)
    position = data.draw(st.integers(0, model.spec.grid.tokens - 2))
    first = data.draw(st.integers(0, position))
    engine = PolicyEngine(model, policy, "none", guided=False)
    skipped, decoded = (held(model, engine, steps, position) for steps in (first, position))
    # Which head of a layer holds how much is AdaKV's to find; all together hold the same.
    assert torch.equal(skipped.sum(-1), decoded.sum(-1))
    if name != "adakv":
        assert torch.equal(skipped, decoded)
    assert decoded.mean().item() == engine.resident(position)


def live_bytes(*_: object) -> int:
    """Of all tensors that Python can reach, storages counted once."""
    held = {}
    for thing in gc.get_objects():
        # Other tests may have left tensors without memory behind, on no device or within `vmap`.
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            with suppress(NotImplementedError):
                storage = thing.untyped_storage()
                held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.mark.parametrize("name", ["full", "linear", "h2o", "adakv", "headkv"])
def test_memory_stays_flat_from_the_second_line_to_the_last(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "used_memory", live_bytes)
    model = Tiny(Grid(4, 4))
    trace = timed(model, PolicyEngine(model, tight(name, model), "none", guided=True), WHOLE)
    second, *later = list(trace.memory.values())[1:]
    assert second
    assert set(later) == {second}


def test_extents_out_of_range() -> None:
    grid = Grid(4, 6)
    assert Extent(tokens=99).spans(grid) == WHOLE.spans(grid) == [range(23)]
    assert Extent(lines=(3, 0, 3)).spans(grid) == [range(6), range(18, 23)]
    with pytest.raises(ArkvError, match="lines 0 to 3"):
        Extent(lines=(4,)).spans(grid)
    for wrong in ({"tokens": 0}, {"lines": ()}, {"lines": (-1,)}, {"tokens": 3, "lines": (0,)}):
        with pytest.raises(ArkvError):
            Extent(**wrong)  # type: ignore[arg-type]
