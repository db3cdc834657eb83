"""The baseline is transformers' own model, and decodes what arkv's adapter decodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import Tiny
from torch import Tensor
from transformers import JanusForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaAttention

from arkv import load_policy
from arkv.decoding.compiling import Compile
from arkv.decoding.loop import Loop
from arkv.decoding.sampling import guide
from arkv.errors import ArkvError
from arkv.model import Condition
from arkv.models.janus import JanusPro
from arkv.models.janus_checkpoint import JanusVariant
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig
from arkv.speed.baselines import TransformersEngine, build
from arkv.speed.engine import BASELINES, DYNAMIC, STATIC, StepByStep
from arkv.weights.packing import can_pack, pack_

PROMPTS = [[0, 5, 6, 7, 2], [0, 9, 2], [0, 3, 4, 5, 6, 7, 2]]  # so that rows are padded


@pytest.fixture(scope="module")
def model() -> JanusPro:
    variant = JanusVariant(
        "tiny",
        "nobody/tiny",
        TransformerConfig(layers=2, width=64, heads=4, kv_heads=4, head_dim=16, hidden=112),
        vocabulary=72,
        side=4,
        vq=VQConfig(codes=48, code_dim=8, latent=24, channels=32, multipliers=(1, 2), blocks=2),
    )
    model = JanusPro(variant).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.25, generator=generator)
    return model


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Nothing is compiled; gives the settings that compilation was asked for with."""
    asked: list[dict[str, Any]] = []

    def compile(function: Any, **settings: Any) -> Any:
        asked.append(settings)
        return function

    monkeypatch.setattr(torch, "compile", compile)
    return asked


class Full(StepByStep):
    """arkv's own loop with the full cache, asked for logits."""

    kv_bytes, slot_bytes = 0, 0.0

    def __init__(self, model: JanusPro, mode: Compile) -> None:
        super().__init__(model)
        self._model, self._mode = model, mode

    def prefill(self, condition: Condition) -> Tensor:
        rows, length = condition.mask.shape
        self._loop = Loop(self._model, load_policy("full"), rows, length, self._mode, guided=True)
        return self._loop.prefill_(condition)

    def advance(self, tokens: Tensor, position: int) -> Tensor:
        return self._loop.advance_(tokens, position)

    def skip(self, position: int) -> None: ...

    def resident(self, position: int) -> float:
        return position + 1

    def release(self) -> None: ...


def greedy(model: JanusPro, engine: StepByStep, scale: float = 5.0) -> tuple[Tensor, Tensor]:
    """Likeliest tokens of a picture a prompt, and the logits that they were drawn from."""
    tokens, seen = [], []
    with torch.inference_mode():
        logits = engine.prefill(model.condition(PROMPTS, guided=True))
        for position in range(model.spec.grid.tokens):
            seen.append(logits.clone())
            tokens.append(guide(logits, torch.tensor(scale)).argmax(-1))
            if position + 1 < model.spec.grid.tokens:
                logits = engine.advance(tokens[-1].repeat(2), position)
    return torch.stack(tokens, 1), torch.stack(seen)


def compare(model: JanusPro, kind: str) -> None:
    expected, logits = greedy(model, Full(model, "none"))
    assert len(expected.unique()) > 5
    engine = TransformersEngine(model, kind)
    for _ in range(2):  # a second batch begins anew
        got, seen = greedy(model, engine)
        assert torch.equal(got, expected)
        assert (seen - logits).abs().max() < 1e-4 * logits.std()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("kind", BASELINES)
def test_tokens_are_those_of_the_adapter(model: JanusPro, kind: str) -> None:
    compare(model, kind)


@pytest.mark.slow
def test_tokens_of_the_compiled_model_are_those_of_the_adapter(model: JanusPro) -> None:
    compare(model, STATIC)


def test_only_the_static_cache_is_compiled_and_as_transformers_does(
    model: JanusPro, eager: list[dict[str, Any]]
) -> None:
    TransformersEngine(model, DYNAMIC)
    assert not eager
    TransformersEngine(model, STATIC)
    (settings,) = eager
    assert (settings["backend"], settings["mode"]) == ("inductor", "reduce-overhead")


def test_the_model_is_the_class_of_transformers_with_weights_that_are_not_copied(model: JanusPro) -> None:
    built = build(model)
    assert isinstance(built, JanusForConditionalGeneration)
    language_model = built.model.language_model
    assert isinstance(language_model.layers[0].self_attn, LlamaAttention)
    assert len(language_model.layers) == model.spec.layers
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    for part in (language_model, built.model.generation_head, built.model.generation_aligner):
        for parameter in part.parameters():
            assert parameter.untyped_storage().data_ptr() in own


@pytest.mark.usefixtures("eager")
def test_packed_weights_are_given_to_it_plain(model: JanusPro) -> None:
    packed = copy.deepcopy(model).bfloat16()
    plain = copy.deepcopy(packed)
    pack_(packed)
    given = dict(build(packed).named_parameters())
    assert any(p.is_mkldnn for p in packed.parameters()) == can_pack()
    for name, weight in build(plain).named_parameters():
        assert weight.device.type == "meta" or torch.equal(given[name], weight)


@pytest.mark.parametrize("kind", BASELINES)
def test_a_skipped_cache_is_as_large_as_a_decoded_one(model: JanusPro, kind: str) -> None:
    rows, length = 2 * len(PROMPTS), max(map(len, PROMPTS))
    token = 2 * model.spec.layers * rows * model.spec.kv_heads * model.spec.head_dim * 4
    engine = TransformersEngine(model, kind)
    with torch.inference_mode():
        engine.prefill(model.condition(PROMPTS, guided=True))
        engine.skip(8)
        engine.advance(torch.zeros(rows, dtype=torch.long), 8)
    slots = length + (9 if kind == DYNAMIC else model.spec.grid.tokens)
    assert engine.kv_bytes == token * slots
    assert engine.slot_bytes == token / (model.spec.layers * rows * model.spec.kv_heads)
    assert engine.resident(8) == 9


def test_other_models_have_no_baseline() -> None:
    with pytest.raises(ArkvError, match="transformers has no tiny"):
        TransformersEngine(Tiny(), DYNAMIC)


def test_gpu_the_baselines_draw_what_the_full_cache_does(model: JanusPro, device: torch.device) -> None:
    there = copy.deepcopy(model).to(device)
    modes: tuple[Compile, ...] = ("none", "cudagraphs") if device.type == "cuda" else ("none",)
    expected, _ = greedy(there, Full(there, modes[-1]))
    for kind in BASELINES if device.type == "cuda" else (DYNAMIC,):
        tokens, _ = greedy(there, TransformersEngine(there, kind))
        assert torch.equal(tokens, expected), kind
