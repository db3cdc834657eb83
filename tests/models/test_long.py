"""Rasters of 8,190 and 9,312 tokens: what is held after every eviction, and what a batch will take."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import Tiny

from arkv import Grid, Observation, Store, load_model, load_policy
from arkv.decoding.checks import check_selection
from arkv.decoding.step import recycle_
from arkv.estimate import estimate
from arkv.policies.linear import LineAR


@pytest.mark.parametrize("grid", [Grid(90, 90, newline=True), Grid(96, 96, newline=True)], ids=str)
def test_what_is_held_of_a_long_picture_is_what_a_list_would_hold(grid: Grid) -> None:
    policy = LineAR(ratio="1/8")
    spec = replace(Tiny(grid).spec, layers=1, heads=2, kv_heads=2)
    store = Store(spec, policy.plan(grid, spec), 1, 3, policy.fields, torch.float32)
    store.reset_(torch.ones(1, 3, dtype=torch.bool))
    policy.begin(store)
    budget, line, recent = round(grid.tokens / 8), grid.line, policy.recent_tokens(grid)
    lists: list[list[int]] = [[], []]
    scores = torch.zeros(2, grid.tokens)
    generator = torch.Generator().manual_seed(0)
    for first in range(0, grid.tokens, line):
        now = torch.tensor(first)
        if first == (grid.rows - 1) * line:
            check_selection(policy, store, policy.select(store, now))
        slots = recycle_(policy, store, now)
        for head, held in enumerate(lists):
            if len(held) > budget:
                middle = [p for p in held if policy.anchors <= p < first - recent]
                middle.sort(key=lambda p: float(scores[head, p]))
                lists[head] = sorted(set(held) - set(middle[: len(held) - budget]))
        for step in range(first, min(first + line, grid.tokens)):
            store.claim_(slots[..., step - first], torch.tensor(step))
        for head, position in enumerate(store.position[0, 0].view(2, -1)):
            lists[head] += range(first, first + line)
            assert sorted(position[position >= 0].tolist()) == lists[head]
        scores = torch.rand(2, grid.tokens, generator=generator)
        owner, index = store.head[0, 0].clamp(max=1).long(), store.position[0, 0].clamp(min=0).long()
        seen = scores[owner, index].expand(store.position.shape) * store.resident
        policy.observe(store, Observation(seen, None), torch.tensor(first + line - 1))
    assert int(store.position.max()) == grid.tokens - 1


@pytest.mark.parametrize(
    ("name", "tokens", "token_bytes"),
    [("emu3-gen", 8190, 131_072), ("emu3.5-image", 4160, 262_144), ("lumina-mgpt-2", 9312, 524_288)],
)
def test_keys_and_values_of_a_long_picture_are_counted_exactly(
    name: str, tokens: int, token_bytes: int
) -> None:
    model = load_model(name, device="meta", dtype="bfloat16")
    full = estimate(model, load_policy("full"), 1, condition=64)
    assert full.kv == full.full_kv == 2 * (tokens + 64) * token_bytes
    small = estimate(model, load_policy("linear", ratio="1/8"), 1, condition=64)
    assert small.kv == 2 * (round(tokens / 8) + model.spec.grid.line + 64) * token_bytes
