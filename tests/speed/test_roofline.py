"""What a step moves: the weights that it touches and the slots that it attends to."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import POLICIES, Tiny, build, legal_budgets, tight

from arkv import Grid
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.model import Model
from arkv.speed import roofline
from arkv.speed.engine import PolicyEngine
from arkv.speed.roofline import StepBytes, copy_bandwidth, resident_slots, weight_bytes


def test_weights_are_those_of_blocks_and_head_and_one_row_of_codes() -> None:
    model = Tiny()
    parts = [*model.transformer.parameters(), *model.output.parameters()]
    assert weight_bytes(model) == sum(p.nbytes for p in parts) + model.codes.weight[0].nbytes


def test_a_shared_or_sliced_weight_counts_as_far_as_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Tiny()
    before = weight_bytes(model) - model.output.weight.nbytes
    model.output.weight = model.codes.weight  # tied: the head reads all of the table
    assert weight_bytes(model) == before - model.codes.weight[0].nbytes + model.codes.weight.nbytes
    half = len(model.codes.weight) // 2

    def head(self: Model, hidden: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        return hidden[:, 0] @ model.codes.weight[half:].T

    monkeypatch.setattr(Tiny, "head", head)
    blocks = sum(p.nbytes for p in model.transformer.blocks.parameters())
    codes = model.codes.weight[0].nbytes * (1 + len(model.codes.weight) - half)
    assert weight_bytes(model) == blocks + codes


def decode(model: Tiny, engine: PolicyEngine) -> list[float]:
    """The visual tokens of a head that each step finds, its own included: counted in the store."""
    condition = model.condition([(1, 2)], guided=False)
    engine.begin(condition, seed_keys([0]), Sampling())
    counts = []
    for position in range(model.spec.grid.tokens - 1):
        engine.decode(range(position, position + 1))
        store = engine.store
        counts.append((store.position >= 0).sum().item() / (store.layers * store.rows * store.kv_heads))
    return counts


@given(st.sampled_from(["full", "linear", "often", "window"]), st.data())
def test_resident_slots_are_those_of_the_store(name: str, data: st.DataObject) -> None:
    model = Tiny(Grid(3, 4), layers=1)
    policy = build(name, data.draw(st.sampled_from(legal_budgets(name, model))))
    plan = policy.plan(model.spec.grid, model.spec)
    with torch.inference_mode():
        counted = decode(model, PolicyEngine(model, policy, "none", guided=False))
    assert counted == [resident_slots(plan, model.spec, position) for position in range(len(counted))]


@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_holds_more(name: str) -> None:
    model = Tiny(Grid(4, 6))
    policy = tight(name, model)
    plan = policy.plan(model.spec.grid, model.spec)
    with torch.inference_mode():
        counted = decode(model, PolicyEngine(model, policy, "none", guided=False))
    for position, count in enumerate(counted):
        assert count <= resident_slots(plan, model.spec, position) + 1e-9


def test_bytes_add_up() -> None:
    assert StepBytes(weights=5, read=3.5, written=1).total == 9.5


def test_a_copy_reads_and_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline.Clock, "seconds", lambda self: [4.0, 0.5, 2.0])
    assert copy_bandwidth(torch.device("cpu"), size=1000) == 4000
    monkeypatch.undo()
    assert copy_bandwidth(torch.device("cpu"), size=2**20) > 1e6
