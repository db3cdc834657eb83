"""Weights in eight and four bits: what they stand for, what is multiplied, and how they come from a file."""

from __future__ import annotations

import copy
import io
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from janus_files import WIDER, write_janus
from llamagen_files import CASES, write_llamagen
from lumina_files import WIDE, tiny
from saying import arkv_says
from tiny import Tiny, random_tokens
from torch import Tensor, nn

import arkv
from arkv import Decoder, Model, load_policy
from arkv.errors import ArkvError
from arkv.estimate import estimate
from arkv.jobs.fingerprint import weights_of
from arkv.jobs.provenance import weights_digest
from arkv.models.janus import JanusPro
from arkv.models.llamagen import LlamaGen
from arkv.models.lumina import LuminaMGPT
from arkv.speed import baselines
from arkv.speed.roofline import weight_bytes
from arkv.weights.checkpoint import draw_weights_
from arkv.weights.packing import Linear, pack_, unpacked
from arkv.weights.quantization import GROUPS, WeightDtype, dequantize, quantize
from arkv.weights.quantized import FEW_ON_CPU, QuantizedLinear, layers, quantize_

KINDS: tuple[WeightDtype, ...] = ("int8", "int4")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
kinds = pytest.mark.parametrize("kind", KINDS)


def matrix(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


def layer(
    rows: int, columns: int, kind: WeightDtype, dtype: torch.dtype, bias: bool = False
) -> QuantizedLinear:
    plain = nn.Linear(columns, rows, bias=bias, dtype=dtype)
    made = QuantizedLinear(columns, rows, plain.bias, kind, dtype, torch.device("cpu"))
    made.quantize_(matrix(rows, columns))
    return made


def with_dequantized(model: Model) -> Model:
    """The same model, its quantised layers plain ones with the weights that the codes stand for."""
    plain = copy.deepcopy(model)
    for name, small in [*layers(plain)]:
        linear = Linear(small.in_features, small.out_features, bias=small.bias is not None)
        linear.weight, linear.bias = nn.Parameter(small.dequantized()), small.bias
        parent, _, leaf = name.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, linear)
    return plain


# What codes stand for


@kinds
@given(rows=st.integers(1, 5), groups=st.integers(1, 5), seed=st.integers(0, 99), spread=st.floats(-3, 3))
def test_no_weight_is_further_off_than_half_a_step(
    kind: WeightDtype, rows: int, groups: int, seed: int, spread: float
) -> None:
    plain = matrix(rows, 32 * groups, seed) * 10**spread
    found = dequantize(*quantize(plain, kind, torch.float32), kind)
    if kind == "int8":
        steps = plain.abs().amax(1, keepdim=True).expand_as(plain) / 127
    else:
        size = GROUPS[0] if groups % 2 == 0 else GROUPS[1]
        least, greatest = plain.unflatten(1, (-1, size)).aminmax(dim=-1, keepdim=True)
        steps = ((greatest - least) / 15).expand(-1, -1, size).flatten(1)
    assert ((found - plain).abs() <= 0.5001 * steps + 1e-6 * plain.abs().amax()).all()


@kinds
def test_rows_of_one_number_are_kept(kind: WeightDtype) -> None:
    """Also rows of zeros: nothing is divided by a step of zero."""
    plain = torch.tensor([0.0, 1.0, -0.375])[:, None].expand(3, 64)
    assert torch.allclose(dequantize(*quantize(plain, kind, torch.float32), kind), plain)


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, FEW_ON_CPU, FEW_ON_CPU + 1, 70])
def test_products_are_those_with_the_weight_that_the_codes_stand_for(
    kind: WeightDtype, dtype: torch.dtype, rows: int
) -> None:
    small = layer(80, 192, kind, dtype, bias=True)
    x = matrix(rows, 192, seed=1).to(dtype)[:, None]
    exact = nn.functional.linear(x.double(), small.dequantized().double(), small.bias.double())
    pack_(small)
    # PyTorch's product with four bits is fast in this dtype only.
    assert small.packed == (kind == "int4" and dtype == torch.bfloat16)
    found = small(x)
    assert found.shape == (rows, 1, 80)
    assert found.dtype == dtype
    eps = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, atol=eps, rtol=eps)


@given(
    rows=st.integers(1, 20).map(lambda n: 16 * n),
    columns=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 9),
)
def test_codes_come_out_of_the_processors_order_as_they_went_in(rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(0, 256, (rows, columns // 2), generator=torch.Generator().manual_seed(seed))
    small = layer(rows, columns, "int4", torch.float32)
    small.codes = nn.Parameter(codes.to(torch.uint8), requires_grad=False)
    small.pack_()
    assert torch.equal(small.dequantized(), dequantize(codes.to(torch.uint8), small.scales, "int4"))
    small.unpack_()
    assert torch.equal(small.codes, codes.to(torch.uint8))


@kinds
def test_whoever_saves_copies_or_moves_a_layer_gets_plain_codes(kind: WeightDtype) -> None:
    plain, packed = layer(80, 64, kind, torch.bfloat16), layer(80, 64, kind, torch.bfloat16)
    pack_(packed)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    for codes in (torch.load(file)["codes"], copy.deepcopy(packed).codes):
        assert torch.equal(codes, plain.codes)
    x = matrix(2, 64)
    assert packed.packed == (kind == "int4"), "it is still packed itself"
    torch.testing.assert_close(packed(x.bfloat16()), plain(x.bfloat16()), atol=0.02, rtol=0.02)
    wide = packed.to(torch.float32)
    assert torch.equal(wide.codes, plain.codes)
    assert wide.weight.dtype == wide.scales.dtype == wide(x).dtype == torch.float32


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_product_in_another_dtype_than_bfloat16_is_no_loop_over_single_numbers(
    kind: WeightDtype, dtype: torch.dtype
) -> None:
    """PyTorch's products with codes took up to forty times as long there as making the plain matrix."""
    small, x = layer(512, 2048, kind, dtype), matrix(64, 2048).to(dtype)
    pack_(small)

    def seconds(weight: Callable[[], Tensor]) -> float:
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            weight()
            times.append(time.perf_counter() - begun)
        return min(times)

    plain = seconds(lambda: nn.functional.linear(x, small.dequantized()))
    assert seconds(lambda: small(x)) < 5 * plain


# Models


def drawn(name: str) -> Model:
    """A tiny model of a family, with weights that make its logits differ."""
    made: Model = {
        "janus": lambda: JanusPro(WIDER),
        "llamagen": lambda: LlamaGen(CASES["llamagen_c2i"]),
        "lumina": lambda: LuminaMGPT(tiny(), WIDE),
    }[name]()
    draw_weights_(made, 0)
    return made.eval()


@kinds
@pytest.mark.parametrize("name", ["janus", "llamagen", "lumina"])
def test_a_quantised_model_is_one_with_the_weights_that_its_codes_stand_for(
    name: str, kind: WeightDtype
) -> None:
    """Logits of every step; and they are not those of the plain weights."""
    model = drawn(name)
    tokens, prompts = random_tokens(model, 2), model.example_prompts(2, 0)
    heads = [p for n, p in model.named_parameters() if "blocks" not in n]

    def logits(of: Model) -> Tensor:
        return (
            Decoder(of, load_policy("linear", ratio="1/2", anchors=1, recent=1))
            .teacher_force(prompts, tokens)
            .raw
        )

    before = logits(model)
    quantize_(model, kind)
    pack_(model)
    assert [*map(id, heads)] == [id(p) for n, p in model.named_parameters() if "blocks" not in n]
    found = logits(model)
    finite = before.isfinite()
    torch.testing.assert_close(found, logits(with_dequantized(model)), atol=1e-4, rtol=1e-4)
    off = (found - before)[finite].std() / before[finite].std()
    assert 1e-3 < off < {"int8": 0.05, "int4": 0.6}[kind]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("int4", torch.float32),
        ("int4", torch.bfloat16),  # packed
        pytest.param("int8", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_quantised_model_is_compiled_into_one_graph_and_draws_the_same(
    kind: WeightDtype, dtype: torch.dtype
) -> None:
    torch._dynamo.reset()
    model = drawn("llamagen").to(dtype)
    quantize_(model, kind)
    pack_(model)
    policy, prompts = load_policy("streaming", ratio="1/2", sinks=1), model.example_prompts(2, 0)
    eager = Decoder(model, policy).generate(prompts, temperature=1.5, window=1).tokens
    decoder = Decoder(model, policy, compile="inductor")
    compiled = decoder.generate(prompts, temperature=1.5, window=1).tokens
    assert torch.equal(compiled, eager) or dtype == torch.bfloat16, "rounding may move a token"
    with torch.compiler.set_stance("fail_on_recompile"):
        decoder.generate(prompts, seeds=[7, 8], temperature=1.5, window=1)
    torch._dynamo.reset()


def test_a_layer_whose_rows_fit_no_group_stays_plain() -> None:
    model = drawn("janus")  # 112 columns of `down` are no groups of 32
    quantize_(model, "int4")
    assert {name.rpartition(".")[2] for name, _ in layers(model)} == {"qkv", "output", "gate_up"}


def test_a_model_of_which_nothing_can_be_stored_so_says_it() -> None:
    with pytest.raises(ArkvError, match=r"weights is 'int4', and no layer of tiny can be stored so"):
        quantize_(Tiny(), "int4")
    with pytest.raises(ArkvError, match=r"weights is 'int3': expected 'int8' or 'int4', or None"):
        arkv.load_model("scenes", weights="int3")  # type: ignore[arg-type]


@kinds
def test_estimate_and_roofline_count_what_there_is(kind: WeightDtype) -> None:
    plain, small = (arkv.load_model("scenes", dtype="bfloat16", weights=w) for w in (None, kind))
    shape = arkv.load_model("scenes", dtype="bfloat16", device="meta", weights=kind)
    sizes = [estimate(model, load_policy("full"), 1).weights for model in (plain, small, shape)]
    assert sizes[1] == sizes[2] == sum(t.nbytes for t in [*small.parameters(), *small.buffers()])
    in_blocks = sum(block.weight.nbytes for _, block in layers(small))
    part = {"int8": 0.5, "int4": 0.25 + 2 / 64}[kind]
    assert sizes[0] - sizes[1] == pytest.approx((1 - part) * in_blocks, rel=0.01)
    assert weight_bytes(plain) - weight_bytes(small) == pytest.approx((1 - part) * in_blocks, rel=0.01)


# From files


@kinds
def test_weights_rounded_on_their_way_from_a_file_are_those_rounded_afterwards(
    tmp_path: Path, kind: WeightDtype
) -> None:
    """Queries, keys and values come one by one, in any order, and from several files."""
    write_janus(tmp_path, "transformers", shards=3)
    small = JanusPro.from_pretrained(tmp_path, weights=kind)
    plain = JanusPro.from_pretrained(tmp_path)
    quantize_(plain, kind)
    assert small.state_dict().keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


@kinds
def test_what_a_family_reorders_is_rounded_in_its_own_order(tmp_path: Path, kind: WeightDtype) -> None:
    write_llamagen(tmp_path, CASES["llamagen_c2i"])
    torch.manual_seed(0)
    small = type("Small", (LlamaGen,), {"variant": CASES["llamagen_c2i"]}).from_pretrained(
        tmp_path, weights=kind
    )
    plain = type("Small", (LlamaGen,), {"variant": CASES["llamagen_c2i"]}).from_pretrained(tmp_path)
    quantize_(plain, kind)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


@kinds
def test_random_weights_are_rounded_too(kind: WeightDtype, monkeypatch: pytest.MonkeyPatch) -> None:
    small = drawn("janus")
    quantize_(small, kind)
    draw_weights_(small, 0)
    plain = drawn("janus")
    quantize_(plain, kind)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(small.state_dict()[name], tensor), name


def test_a_model_that_knows_nothing_of_it_is_rounded_when_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("arkv.registry.load_class", lambda *_: Tiny)
    assert [*layers(arkv.load_model("scenes", weights="int8"))]
    with pytest.raises(ArkvError, match="unknown option of the model scenes 'lora'"):
        arkv.load_model("scenes", lora="somewhere")


def test_pictures_of_other_weights_are_told_apart_and_packing_is_not() -> None:
    """A job's account goes by content: codes in a processor's own order are the same weights."""
    accounts = [weights_of(arkv.load_model("scenes", weights=kind)) for kind in (None, *KINDS)]
    assert len({*accounts}) == 3
    model = arkv.load_model("scenes", weights="int4")
    with unpacked(model):
        assert weights_of(model) == accounts[2]
        facts = weights_digest(model)
    assert weights_digest(model) == facts


def test_transformers_own_loop_is_not_given_weights_of_few_bits() -> None:
    model = drawn("janus")
    quantize_(model, "int8")
    with pytest.raises(ArkvError, match="transformers' own loop takes plain weights"):
        baselines.build(model)  # type: ignore[arg-type]


def test_the_estimate_says_how_weights_are_stored(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("estimate", "--dtype", "bfloat16", "--model", "janus-pro-7b")
    plain, small = (arkv_says(capsys, *flags, *more) for more in ((), ("--weights", "int4")))
    assert "bfloat16 with weights in int4" in small
    lines = [text[text.index("\nweights") :].splitlines()[1] for text in (plain, small)]
    sizes = [int(line.split()[-1].replace(",", "")) for line in lines]
    assert sizes[1] < 0.36 * sizes[0]
