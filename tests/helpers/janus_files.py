"""Tiny checkpoints of Janus-Pro as published ones are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from arkv.models import janus_checkpoint as janus
from arkv.models.janus import JanusPro
from arkv.models.janus_checkpoint import JanusVariant
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig

VARIANT = JanusVariant(
    "tiny",
    "nobody/tiny",
    TransformerConfig(layers=2, width=64, heads=4, kv_heads=4, head_dim=16, hidden=112),
    vocabulary=72,
    side=4,
    vq=VQConfig(codes=48, code_dim=8, latent=24, channels=32, multipliers=(1, 2), blocks=2),
)


def make_tokenizer(path: Path, without: str = "") -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [janus.BEGIN, "<|User|>", "<|Assistant|>", janus.PADDING, janus.IMAGE]
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special if name != without])
    tokenizer.save(str(path))


WIDER = replace(VARIANT, vocabulary=320)


def published_config(variant: JanusVariant, layout: janus.Layout) -> dict[str, Any]:
    """What `config.json` says of a variant; the original layout says nothing of the picture decoder."""
    shape, decoder = variant.transformer, variant.vq
    llama = {
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": 64,
        "vocab_size": variant.vocabulary,
    }
    if layout == "deepseek":
        return {"model_type": "multi_modality", "language_config": llama}
    pictures = {
        "embed_dim": decoder.code_dim,
        "num_embeddings": decoder.codes,
        "latent_channels": decoder.latent,
        "base_channels": decoder.channels,
        "channel_multiplier": list(decoder.multipliers),
        "num_res_blocks": decoder.blocks - 1,
    }
    vision = {"image_size": 16 * variant.side, "patch_size": 16}
    return {"model_type": "janus", "text_config": llama, "vq_config": pictures, "vision_config": vision}


def write_janus(folder: Path, layout: janus.Layout, shards: int = 1) -> JanusPro:
    """A tiny checkpoint with random weights and all that a published one has beside those in use."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    model = JanusPro(WIDER).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.2)
    tensors = {name: slot.target.detach().clone() for name, slot in model.weight_slots(layout).items()}
    if layout == "deepseek":
        unused = ["vision_model.pos", "aligner.layers.0.bias", "language_model.lm_head.weight"]
        unused += ["gen_vision_model.encoder.conv_in.bias", "gen_vision_model.quantize.codebook_used"]
        stem, save = "pytorch_model{}.bin", torch.save
    else:
        unused = ["model.vision_model.x", "model.aligner.fc1.bias", "lm_head.weight"]
        stem, save = "model{}.safetensors", save_file
    tensors |= {name: torch.ones(3) for name in unused}
    (folder / "config.json").write_text(json.dumps(published_config(WIDER, layout)))
    make_tokenizer(folder / "tokenizer.json")
    if shards == 1:
        save(tensors, folder / stem.format(""))
    else:
        names = [stem.format(f"-{i + 1:05}-of-{shards:05}") for i in range(shards)]
        parts = [{n: tensors[n] for n in sorted(tensors)[i::shards]} for i in range(shards)]
        for name, part in zip(names, parts, strict=True):
            save(part, folder / name)
        index = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (folder / f"{stem.format('')}.index.json").write_text(json.dumps({"weight_map": index}))
    return model
