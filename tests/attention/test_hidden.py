"""What is hidden cannot reach a sum: NaN and infinity in every hidden place change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

import arkv
from arkv.attention.quantization import PACKED, quantize
from arkv.attention.reference import Attended, causal_attention, ragged_attention, slot_attention

BOTH = frozenset({"mass", "scores"})
BAD = [float("nan"), float("inf"), -float("inf")]


def poisoned(x: Tensor, hidden: Tensor, bad: float) -> Tensor:
    """A tensor `[rows, slots, ...]` with something bad wherever it is hidden."""
    return torch.where(hidden[(..., *[None] * (x.ndim - 2))], torch.full_like(x, bad), x)


def same(one: Attended, other: Attended) -> None:
    for name in ("output", "mass", "scores"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).isfinite().all(), name


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stored", [None, torch.int8, PACKED], ids=["wide", "eight bits", "four bits"])
@pytest.mark.parametrize("bad", BAD, ids=str)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0, 1), group=st.sampled_from([1, 2]))
def test_nothing_hidden_reaches_the_sum_over_slots(
    bad: float, stored: torch.dtype | None, compiled: bool, seed: int, share: float, group: int
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows, kv_heads, capacity, size = 2, 2, 5, 4
    slots = kv_heads * capacity
    query = torch.randn(rows, kv_heads * group, size, generator=rng)
    keys, values = (torch.randn(rows, slots, size, generator=rng) for _ in range(2))
    visible = torch.rand(rows, slots, generator=rng) < share
    owner = torch.randint(kv_heads + 1, (rows, slots), generator=rng)
    scales: list[Tensor | None] = [None, None]
    if stored is not None:
        (keys, scales[0]), (values, scales[1]) = quantize(keys, stored), quantize(values, stored)

    def with_bad(hidden: Tensor) -> list[Any]:
        """Codes cannot be NaN; their scales can."""
        wide = [x if stored else poisoned(x, hidden, bad) for x in (keys, values)]
        return [*wide, *(None if x is None else poisoned(x, hidden, bad) for x in scales)]

    dense, ragged = slot_attention, ragged_attention
    if compiled:
        dense, ragged = (torch.compile(each, dynamic=False) for each in (dense, ragged))
    for hidden, attend in (
        (~visible, lambda k, v, *s: dense(query, k, v, visible, kv_heads, BOTH, *s)),
        (
            ~visible | (owner == kv_heads),
            lambda k, v, *s: ragged(query, k, v, visible, owner, kv_heads, BOTH, *s),
        ),
    ):
        same(attend(*with_bad(hidden)), attend(keys, values, *scales))


@pytest.mark.parametrize("bad", BAD, ids=str)
@given(seed=st.integers(0, 2**32 - 1), padding=st.lists(st.integers(0, 6), min_size=3, max_size=3))
def test_nothing_masked_reaches_the_sum_over_a_sequence(bad: float, seed: int, padding: list[int]) -> None:
    rng = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(3, 7, 2, 4, generator=rng) for _ in range(3))
    mask = torch.arange(7) >= torch.tensor(padding)[:, None]
    expected = causal_attention(query, key, value, mask)
    got = causal_attention(
        poisoned(query, ~mask, bad), poisoned(key, ~mask, bad), poisoned(value, ~mask, bad), mask
    )
    assert torch.equal(got[mask], expected[mask])


@pytest.mark.parametrize("kv_dtype", [None, "int8", "int4"])
@pytest.mark.parametrize("policy", ["full", "linear", "h2o", "diagonal", "adakv", "random"])
def test_a_batch_after_one_of_nan_is_as_if_it_were_the_first(policy: str, kv_dtype: Any) -> None:
    ratio = {} if policy == "full" else {"ratio": "1/2"}
    decoder = arkv.Decoder(Tiny(), arkv.load_policy(policy, **ratio), kv_dtype=kv_dtype)
    prompts = decoder.model.example_prompts(2, 0)
    expected = decoder.generate(prompts, pixels=False).tokens
    store = decoder.store
    assert store is not None
    with torch.inference_mode():
        spoil_(store)
    assert torch.equal(decoder.generate(prompts, pixels=False).tokens, expected)


def spoil_(store: arkv.Store) -> None:
    """Leave NaN wherever a store can hold one."""
    for leaf in [*store.keys, *store.values, *store.key_scales, *store.value_scales]:
        if leaf is not None and leaf.dtype.is_floating_point:
            leaf.fill_(float("nan"))
    for name in store.fields:
        if store[name].dtype.is_floating_point:
            store[name].fill_(float("nan"))
