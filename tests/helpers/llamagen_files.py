"""Tiny checkpoints of LlamaGen and of its text encoder as published ones are written."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from arkv.models.llamagen import LlamaGen
from arkv.models.llamagen_checkpoint import Captions, Classes, LlamaGenVariant
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig
from arkv.weights.checkpoint import WeightSlot

TINY_VQ = VQConfig(codes=96, code_dim=8, latent=32, channels=32, multipliers=(1, 1), blocks=1)


def variant(kind: Classes | Captions, layers: int, codes: int) -> LlamaGenVariant:
    config = TransformerConfig(layers, 64, 4, 4, 16, 192, norm_eps=1e-5)
    vq = replace(TINY_VQ, codes=codes)
    return LlamaGenVariant("tiny", "c2i_T_64.pt", config, 4, kind, top_k=0, vq=vq)


CASES = {
    "llamagen_c2i": variant(Classes(10), 3, 96),
    "llamagen_t2i": variant(Captions(8, 24), 2, 80),
}


def write_llamagen(
    folder: Path, variant: LlamaGenVariant, wrap: str | None = "model", suffix: str = ".pt"
) -> LlamaGen:
    """Random weights, with all that published files have beside those in use."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(2)
    model = LlamaGen(variant).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    slots = model.weight_slots()
    weights = {name: torch.zeros(slot.wanted) for name, slot in slots.items()}
    for name, slot in slots.items():
        weights[name] = slot.target.detach().clone() if slot.convert is None else _undone(slot)
    weights["freqs_cis"] = torch.ones(3)
    decoder = {name: slot.target.detach().clone() for name, slot in model.vq.weight_slots("llamagen").items()}
    decoder |= {"encoder.conv_in.weight": torch.ones(3), "quant_conv.bias": torch.ones(2)}
    decoder["quantize.codebook_used"] = torch.ones(4)
    file = (folder / variant.file).with_suffix(suffix)
    if suffix == ".safetensors":
        save_file(weights, file)
    else:
        wrapped = {wrap: weights, "steps": 3, "args": Namespace(x=1)} if wrap else weights
        torch.save(wrapped, file)
    torch.save({"model": decoder}, folder / variant.vq_file)
    return model


def _undone(slot: WeightSlot) -> Tensor:
    """The tensor that is converted to what the target holds: the conversion permutes rows."""
    assert slot.convert is not None
    order = slot.convert(torch.arange(len(slot.target))[:, None].float())[:, 0].long()
    original = torch.empty_like(slot.target)
    original[order] = slot.target.detach()
    return original


class TinyClasses(LlamaGen):
    variant = CASES["llamagen_c2i"]


class TinyCaptions(LlamaGen):
    variant = replace(CASES["llamagen_t2i"], file="t2i_T_64.pt", vq_file="vq_ds16_t2i.pt")


def write_t5(folder: Path, width: int = 24) -> Any:
    """A tiny text encoder in the published layout."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import T5Config, T5ForConditionalGeneration

    words = ["a", "red", "bus", "blue", "bird", "by", "the", "lake", "and", "an", "old", "clock"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in dict.fromkeys(words)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = T5Config(
        vocab_size=32,
        d_model=width,
        d_kv=6,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    torch.manual_seed(4)
    model = T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    model.save_pretrained(folder)
    return model
