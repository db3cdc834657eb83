"""Keys and values in few bits: how wrong they are, what they take, and that nothing else changes."""

from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, POLICIES, Tiny, build, random_tokens, tight
from torch import Tensor

from arkv import ArkvError, Decoder, Grid
from arkv.attention import operators
from arkv.attention.quantization import KV_DTYPES, PACKED, dequantize, quantize, stored_width
from arkv.attention.reference import ragged_attention, slot_attention
from arkv.decoding.loop import Loop
from arkv.estimate import estimate
from arkv.testing.stores import positions

PROMPTS = [(1, 2, 3), (4,)]
KINDS = list(KV_DTYPES)
EIGHT_BITS = ["int8", "fp8"]
# Of logits, in their own spread.
ERROR = {"int8": 0.05, "fp8": 0.5, "int4": 1.0}
# Half a step of 127 of the largest number; half of the last of four bits of each number.
RELATIVE = {"int8": 0.5 / 127, "fp8": 1 / 16}


@pytest.mark.parametrize("kind", EIGHT_BITS)
@given(data=st.data(), exponent=st.integers(-60, 60))
def test_numbers_come_back_within_the_step_of_their_vector(
    kind: str, data: st.DataObject, exponent: int
) -> None:
    numbers = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=16))
    x = torch.tensor([numbers, [-n for n in numbers]]) * 2.0**exponent
    codes, scale = quantize(x, KV_DTYPES[kind])
    assert codes.dtype == KV_DTYPES[kind]
    assert scale.shape == x.shape[:-1]
    back = dequantize(codes, scale, torch.float32)
    largest = x.abs().amax(-1, keepdim=True)
    # What is far below the largest number of a vector is rounded to a step that does not shrink with it.
    allowed = RELATIVE[kind] * (largest if kind == "int8" else x.abs() + largest / 448)
    assert ((back - x).abs() <= allowed * 1.001 + 1e-37).all()
    assert torch.equal(back[0], -back[1])


@given(data=st.data(), exponent=st.integers(-60, 60), width=st.sampled_from([2, 8, 32, 64, 96]))
def test_four_bits_come_back_within_half_a_step_of_their_group(
    data: st.DataObject, exponent: int, width: int
) -> None:
    numbers = data.draw(st.lists(st.floats(-1, 1, width=32), min_size=3 * width, max_size=3 * width))
    x = torch.tensor(numbers).view(3, width) * 2.0**exponent
    codes, scales = quantize(x, PACKED)
    groups = max(1, width // 32)
    assert (codes.shape, codes.dtype) == ((3, width // 2), torch.uint8)
    assert (scales.shape, scales.dtype) == ((3, 2 * groups), torch.bfloat16)
    back = dequantize(codes, scales, torch.float32).numpy()
    for row in range(3):
        for group in numpy.split(numpy.arange(width), groups):
            wide = x[row, group].double().numpy()
            step = (wide.max() - wide.min()) / 15
            allowed = 0.502 * step + abs(wide).max() / 100 + 1e-37
            assert (abs(back[row, group] - wide) <= allowed).all()


def test_of_two_codes_the_lower_is_that_of_the_first_half() -> None:
    x = torch.arange(16.0).repeat_interleave(2).view(1, 32)[:, torch.randperm(32)]
    codes, scales = quantize(x, PACKED)
    assert scales.tolist() == [[1.0, 0.0]]
    assert torch.equal(torch.cat([codes % 16, codes // 16], -1).float(), x)
    assert torch.equal(dequantize(codes, scales, torch.float32), x)


@pytest.mark.parametrize("width", [3, 48, 80])
def test_heads_that_do_not_fill_bytes_and_groups_are_refused(width: int) -> None:
    with pytest.raises(ArkvError, match=f"heads have {width} numbers: expected an even number, above 32"):
        stored_width(PACKED, width)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("x", [torch.zeros(3, 8), torch.full((3, 8), 1e-30), torch.full((3, 8), 3e38)])
def test_zeros_and_extremes_stay_numbers(kind: str, x: Tensor) -> None:
    codes, scale = quantize(x, KV_DTYPES[kind])
    torch.testing.assert_close(dequantize(codes, scale, torch.float32), x, rtol=0.07, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_attention_reads_codes_as_the_numbers_that_they_stand_for(kind: str) -> None:
    torch.manual_seed(0)
    query, visible = torch.randn(2, 4, 8), torch.rand(2, 12) > 0.3
    (keys, key_scale), (values, value_scale) = (
        quantize(torch.randn(2, 12, 8), KV_DTYPES[kind]) for _ in range(2)
    )
    plain = (dequantize(keys, key_scale, torch.float32), dequantize(values, value_scale, torch.float32))
    needs = frozenset({"mass", "scores"})
    expected = slot_attention(query, *plain, visible, 2, needs)
    got = slot_attention(query, keys, values, visible, 2, needs, key_scale, value_scale)
    owner = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1]])
    ragged = ragged_attention(query, *plain, visible, owner, 2, needs)
    narrow = ragged_attention(query, keys, values, visible, owner, 2, needs, key_scale, value_scale)
    for one, other in ((got, expected), (narrow, ragged)):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_decodes_with_few_bits(name: str, kind: Any) -> None:
    """The logits are close to those of whole numbers, while the bytes are as estimated."""
    model = Tiny(GRID)
    policy = build("full", GRID.tokens) if name == "full" else tight(name, model)
    decoder, exact = Decoder(model, policy, kv_dtype=kind), Decoder(model, policy)
    tokens = random_tokens(model, 2, 0)
    forced = decoder.teacher_force(PROMPTS, tokens, guidance=1.5)
    assert decoder.store is not None
    estimated = estimate(model, policy, 2, True, decoder.store.condition, kv_dtype=kind)
    assert decoder.store.kv_bytes == estimated.kv
    whole = estimate(model, policy, 2, True, decoder.store.condition)
    # Eight numbers a head of four bytes each; eight bytes and a scale of four; four bytes and two of two.
    assert estimated.kv / whole.kv == (8 if kind == "int4" else 12) / 32
    assert estimated.full_kv == whole.full_kv
    if name == "full":  # others may keep other tokens where two were almost alike
        expected = exact.teacher_force(PROMPTS, tokens, guidance=1.5).raw
        error = (forced.raw - expected).abs().max() / expected.std()
        assert 0 < error < ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_what_is_stored_is_never_stored_again(kind: str) -> None:
    """As long as a token stays where it is, its codes and its scale are the same bytes."""
    model = Tiny(Grid(5, 4))
    condition = model.condition(PROMPTS, True)
    loop = Loop(model, tight("linear", model), *condition.mask.shape, "none", True, kv_dtype=kind)
    loop.prefill_(condition)
    store, tokens = loop.store, random_tokens(model, 2, 0).repeat(2, 1)

    def held() -> dict[tuple[int, int, int, int], list[bytes]]:
        return {
            (layer, row, slot, int(store.position[layer, row, slot])): [
                bytes(leaf[layer][row, slot].flatten().view(torch.uint8).tolist())
                for leaf in (store.keys, store.values, store.key_scales, store.value_scales)
                if leaf[layer] is not None
            ]
            for layer in range(store.layers)
            for row in range(store.rows)
            for slot in range(store.slots)
            if store.position[layer, row, slot] != -1
        }

    before = held()
    assert all(len(parts) == 4 for parts in before.values())
    for position in range(model.spec.grid.tokens - 1):
        loop.advance_(tokens[:, position], position)
        after = held()
        stayed = before.keys() & after.keys()
        assert len(stayed) >= len(before) - store.layers * store.rows * store.kv_heads * store.plan.period
        assert all(before[token] == after[token] for token in stayed)
        before = after


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_unequal_and_shared_heads_are_stored_in_few_bits(kind: str, sums: Any) -> None:
    model, tokens = Tiny(GRID), random_tokens(Tiny(GRID), 2, 0)
    for shared in (False, True):
        policy = sums(budget=1, budgets=((8, 12), (10, 6)), shared=shared)
        exact = Decoder(model, policy).teacher_force(PROMPTS, tokens).raw
        forced = Decoder(model, policy, kv_dtype=kind).teacher_force(PROMPTS, tokens).raw
        # Before the first eviction nothing but rounding can differ.
        early = slice(0, 6)
        error = (forced[:, early] - exact[:, early]).abs().max() / exact.std()
        assert 0 < error < ERROR[kind]


def test_steps_without_kernels_read_two_codes_a_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no compiler: the operators are not called."""
    monkeypatch.setattr(operators, "available", lambda *_: False)
    monkeypatch.setattr(operators, "slot_attention", None)
    decoder = Decoder(Tiny(GRID), build("window", 8), kv_dtype="int4")
    assert decoder.generate(PROMPTS, seeds=[1, 2]).tokens.shape == (2, GRID.tokens)


def test_another_storage_is_refused() -> None:
    with pytest.raises(ArkvError, match="kv_dtype is 'int2': expected 'int8', 'fp8', 'int4' or None"):
        Decoder(Tiny(), build("full", GRID.tokens), kv_dtype="int2")  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "least"), [("int8", 0.9), ("int4", 0.75)])
@torch.inference_mode()
def test_an_eviction_looks_at_codes_as_at_keys(kind: str, least: float) -> None:
    """R-KV compares keys: the same tokens go, where no two are nearly alike."""
    model = Tiny(GRID)
    policy, condition = tight("rkv", model), model.condition(PROMPTS, True)
    loops = [Loop(model, policy, *condition.mask.shape, "none", True, kv_dtype=k) for k in (None, kind)]
    tokens = random_tokens(model, 2, 0).repeat(2, 1)
    for loop in loops:
        loop.prefill_(condition)
    for position in range(2 * GRID.line):
        for loop in loops:
            loop.advance_(tokens[:, position], position)
    one, other = (positions(loop.store) for loop in loops)
    same = sum(len(set(one[place]) & set(other[place])) for place in one)
    assert same >= least * sum(map(len, one.values()))
