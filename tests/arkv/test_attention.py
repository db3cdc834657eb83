import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Entry, attend

from arkv.attention import causal_attention, slot_attention


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    capacity=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_a_query_over_slots_is_softmax_attention_over_what_is_held(
    rows: int, kv_heads: int, group: int, capacity: int, seed: int
) -> None:
    query = normal(rows, kv_heads * group, 4, seed=seed)
    keys, values = (normal(rows, kv_heads * capacity, 4, seed=seed + i) for i in (1, 2))
    resident = normal(rows, kv_heads, capacity, seed=seed + 3) > 0
    resident[..., -1] = True
    attended, mass = slot_attention(query, keys, values, resident, needs_mass=True)
    assert mass is not None
    for row, head in numpy.ndindex(rows, kv_heads):
        slots = [head * capacity + i for i in range(capacity) if resident[row, head, i]]
        held = [Entry(s, keys[row, s].double().numpy(), values[row, s].double().numpy()) for s in slots]
        total = numpy.zeros(len(held))
        for q in range(head * group, (head + 1) * group):
            expected, weights = attend(query[row, q].double().numpy(), held)
            numpy.testing.assert_allclose(attended[row, q], expected, atol=1e-5)
            total += weights
        numpy.testing.assert_allclose(mass[row, head][resident[row, head]], total, atol=1e-5)
    assert torch.equal(mass == 0, ~resident)


def test_mass_is_not_computed_for_those_who_do_not_ask() -> None:
    held = torch.ones(1, 1, 3, dtype=torch.bool)
    query, slots = normal(1, 2, 4, seed=0), normal(1, 3, 4, seed=1)
    attended, mass = slot_attention(query, slots, slots, held, needs_mass=False)
    assert mass is None
    assert torch.equal(attended, slot_attention(query, slots, slots, held, needs_mass=True)[0])


def test_scores_are_exponentiated_without_overflow() -> None:
    query = torch.full((1, 1, 4), 100.0)
    keys = torch.stack([torch.full((4,), 100.0), torch.full((4,), -100.0)])[None]
    held = torch.ones(1, 1, 2, dtype=torch.bool)
    attended, mass = slot_attention(query, keys, keys, held, needs_mass=True)
    assert torch.equal(attended, query)
    assert mass is not None
    assert mass.tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_come_back_narrow_with_mass_in_float32(dtype: torch.dtype) -> None:
    held = torch.ones(1, 1, 5, dtype=torch.bool)
    query, slots = normal(1, 2, 4, seed=0), normal(1, 5, 4, seed=1)
    exact, _ = slot_attention(query, slots, slots, held, needs_mass=False)
    attended, mass = slot_attention(query.to(dtype), slots.to(dtype), slots.to(dtype), held, needs_mass=True)
    assert attended.dtype == dtype
    assert mass is not None
    assert mass.dtype == torch.float32
    torch.testing.assert_close(attended.float(), exact, atol=3e-2, rtol=0)


@given(
    tokens=st.integers(1, 11), kv_heads=st.integers(1, 2), group=st.integers(1, 2), seed=st.integers(0, 99)
)
def test_causal_attention_is_softmax_attention_over_the_past(
    tokens: int, kv_heads: int, group: int, seed: int
) -> None:
    heads = kv_heads * group
    query = normal(2, tokens, heads, 4, seed=seed)
    key, value = (normal(2, tokens, kv_heads, 4, seed=seed + i) for i in (1, 2))
    mask = normal(2, tokens, seed=seed + 3) > -0.5
    result = causal_attention(query, key, value, mask)
    assert result.shape == query.shape
    assert result.isfinite().all()
    for row, token, head in numpy.ndindex(2, tokens, heads):
        past = [i for i in range(token + 1) if mask[row, i]]
        if past:
            k, v = (x[row, :, head // group].double().numpy() for x in (key, value))
            expected, _ = attend(
                query[row, token, head].double().numpy(), [Entry(i, k[i], v[i]) for i in past]
            )
            numpy.testing.assert_allclose(result[row, token, head], expected, atol=1e-5)


def test_no_mask_is_a_mask_of_all_true() -> None:
    query, key = normal(2, 9, 4, 8, seed=0), normal(2, 9, 2, 8, seed=1)
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(causal_attention(query, key, key, None), causal_attention(query, key, key, everything))
