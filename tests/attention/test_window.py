"""Attention of several queries, against that of each of them alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arkv.attention.quantization import PACKED, quantize
from arkv.attention.reference import ragged_attention, slot_attention
from arkv.attention.window import window_attention

BOTH = frozenset({"mass", "scores"})


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 3)]),
    st.integers(1, 7),
    st.booleans(),
    st.sampled_from([None, torch.int8, PACKED]),
    st.integers(0, 10**6),
)
def test_every_query_sees_what_it_would_see_alone(
    rows: int,
    tokens: int,
    heads: tuple[int, int],
    capacity: int,
    ragged: bool,
    stored: torch.dtype | None,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    (heads, kv_heads), slots = heads, heads[1] * capacity
    query = torch.randn(rows, tokens, heads, 8, generator=generator)
    keys, values = torch.randn(2, rows, slots, 8, generator=generator)
    scales = (None, None)
    if stored is not None:
        (keys, key_scale), (values, value_scale) = quantize(keys, stored), quantize(values, stored)
        scales = (key_scale, value_scale)
    visible = torch.rand(rows, tokens, slots, generator=generator) < 0.6
    owner = torch.randint(0, kv_heads + 1, (rows, slots), generator=generator) if ragged else None
    together = window_attention(query, keys, values, visible, kv_heads, owner, BOTH, *scales)
    for token in range(tokens):
        leaf = (query[:, token], keys, values, visible[:, token])
        if owner is None:
            alone = slot_attention(*leaf, kv_heads, BOTH, *scales)
        else:
            alone = ragged_attention(*leaf, owner, kv_heads, BOTH, *scales)
        for several, one in zip(together, alone, strict=True):
            torch.testing.assert_close(several[:, token], one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_what_no_query_may_see_may_be_no_number(ragged: bool) -> None:
    query, keys, values = torch.randn(1, 3, 2, 8), torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    visible = torch.ones(1, 3, 6, dtype=torch.bool)
    visible[..., 4] = False
    owner = torch.tensor([[0, 0, 0, 1, 1, 1]]) if ragged else None
    good = window_attention(query, keys, values, visible, 2, owner, BOTH)
    keys[:, 4], values[:, 4] = torch.nan, torch.inf
    for got, expected in zip(
        window_attention(query, keys, values, visible, 2, owner, BOTH), good, strict=True
    ):
        torch.testing.assert_close(got, expected)
