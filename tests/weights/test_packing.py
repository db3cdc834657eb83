"""Packed weights: the same products, and plain weights again for whoever asks for them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import arkv
from arkv.speed.roofline import weight_bytes
from arkv.weights.packing import Linear, can_pack, is_packable, pack_

packs = pytest.mark.skipif(not can_pack(), reason="oneDNN has no bfloat16 here")
SCENE = "a red circle"


def layer(inner: int = 48, outer: int = 80, bias: bool = False, packed: bool = True, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    made = Linear(inner, outer, bias=bias).bfloat16()
    if packed:
        made.pack_()
    return made


def same(a: nn.Module, b: nn.Module) -> bool:
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1)).bfloat16()
    return torch.equal(a(x), b(x))


@packs
@given(inner=st.integers(1, 70), outer=st.integers(1, 70), rows=st.integers(1, 130), bias=st.booleans())
def test_a_packed_weight_gives_what_the_plain_one_gives(
    inner: int, outer: int, rows: int, bias: bool
) -> None:
    made = layer(inner, outer, bias, packed=False)
    x = torch.randn(rows, 1, inner).bfloat16()
    expected = made(x)
    exact = nn.functional.linear(
        x.double(), made.weight.double(), made.bias.double() if made.bias is not None else None
    )
    made.pack_()
    got = made(x)
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    # Sums in float32 and one rounding at the end, however the products are added up.
    torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=2**-8)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=2**-7)


@packs
def test_a_packed_weight_keeps_its_shape_dtype_and_size() -> None:
    plain, packed = layer(packed=False), layer()
    assert packed.weight.shape == plain.weight.shape
    assert packed.weight.dtype == plain.weight.dtype
    assert packed.weight.numel() == plain.weight.numel()
    assert packed.weight.nbytes == plain.weight.nbytes
    assert not packed.weight.requires_grad


@packs
def test_who_wants_gradients_is_told_that_there_are_none() -> None:
    x = torch.randn(2, 48).bfloat16().requires_grad_()
    with pytest.raises(RuntimeError, match="plain weights"):
        layer()(x).sum().backward()


@packs
def test_packing_twice_is_packing_once() -> None:
    packed = layer()
    before = packed.weight
    packed.pack_()
    assert packed.weight is before


@packs
def test_whoever_saves_copies_or_moves_a_layer_gets_the_plain_weight() -> None:
    plain, packed = layer(packed=False), layer()
    for weight in (
        packed.state_dict()["weight"],
        copy.deepcopy(packed).weight,
        pickle.loads(pickle.dumps(packed)).weight,
        layer().to(torch.float64).weight.bfloat16(),
        layer().to("cpu").weight,
    ):
        assert not weight.is_mkldnn
        assert torch.equal(weight, plain.weight)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    assert packed.weight.is_mkldnn, "it is still packed itself"
    assert same(packed, plain)


@packs
def test_weights_can_be_read_into_a_packed_layer() -> None:
    other = layer(packed=False)
    with torch.no_grad():
        other.weight.mul_(2)
    packed = layer()
    packed.load_state_dict(other.state_dict())
    assert same(packed, other)


def test_only_layers_of_bfloat16_on_a_cpu_are_packed() -> None:
    assert not is_packable(torch.zeros(2, 2))
    assert not is_packable(torch.zeros(2, 2, dtype=torch.bfloat16, device="meta"))
    assert is_packable(torch.zeros(2, 2, dtype=torch.bfloat16)) == can_pack()
    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), Linear(4, 4))
    before = [p.clone() for p in model.parameters()]
    pack_(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@packs
def test_one_graph_serves_layers_of_one_shape() -> None:
    """Nothing but a packed weight changes from layer to layer of a model."""
    torch._dynamo.reset()
    layers = [layer(seed=seed) for seed in range(3)]
    traced = torch.compile(lambda of, x: of(x).float() + 1, fullgraph=True, dynamic=False)
    x = torch.randn(5, 1, 48).bfloat16()
    with torch.inference_mode():
        for index, of in enumerate(layers):
            with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
                assert torch.equal(traced(of, x), of(x).float() + 1)
    torch._dynamo.reset()


@packs
def test_a_loaded_model_is_packed_and_draws_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = arkv.load_model("scenes", dtype="bfloat16")
    assert any(isinstance(m, Linear) and m.weight.is_mkldnn for m in packed.modules())
    size = weight_bytes(packed)
    monkeypatch.setattr("arkv.weights.packing.can_pack", lambda: False)
    plain = arkv.load_model("scenes", dtype="bfloat16")
    assert not any(p.is_mkldnn for p in plain.parameters())
    assert weight_bytes(plain) == size
    tokens = [
        arkv.Decoder(model, arkv.load_policy("linear", ratio="1/6")).generate([SCENE], seeds=[0]).tokens
        for model in (packed, plain)
    ]
    assert torch.equal(*tokens)
