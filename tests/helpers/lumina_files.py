"""A tiny checkpoint of Lumina-mGPT as the published ones are written."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from arkv.models.lumina import LuminaMGPT
from arkv.models.lumina_checkpoint import LuminaVariant, Tokens
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig

DATA = Path(__file__).parents[1] / "data"
CODES = 24
WIDE = (96, 64)
VQ = VQConfig(CODES, 16, 16, 32, (1, 1), 2, normalised=False, attention=False)
WORDS = ["Generate", "an", "image", "of", "according", "to", "the", "following", "prompt", "red", "bus"]
WORDS += ["64", "96", "x", ":", " ", "\n"]


@cache
def tensors() -> dict[str, Tensor]:
    return load_file(DATA / "lumina.safetensors")


@cache
def facts() -> dict[str, Any]:
    return json.loads((DATA / "lumina.json").read_text())  # type: ignore[no-any-return]


def tokens() -> Tokens:
    return Tokens.from_names(facts()["config"]["hf_config"]["vocabulary_map"], CODES, 3)


def tiny(**changes: Any) -> LuminaVariant:
    config = TransformerConfig(2, 64, 4, 4, 16, 96, 1e-5, qk_norm="layer")
    variant = LuminaVariant("lumina-tiny", 96, "nobody/lumina-7b-96", config, 64, VQ, tokens=tokens())
    return replace(variant, **changes)


class TinyLumina(LuminaMGPT):
    """What the golden vectors were made with; loads like the published models."""

    variant = tiny()


def write_lumina(folder: Path) -> None:
    """The golden weights as they are published, with picture decoder and tokenizer."""
    config = facts()["config"]["hf_config"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in tensors().items()
        if name.startswith("weights.")
    }
    save_file(weights, folder / "model.safetensors")
    write_vqgan(folder / "vqgan.ckpt")
    write_tokenizer(folder / "tokenizer.json")


def write_vqgan(path: Path) -> None:
    """A picture decoder as Chameleon's is published, with what its training left behind."""
    generator = torch.Generator().manual_seed(2)
    slots = LuminaMGPT(tiny(), WIDE).vq.weight_slots("taming")
    state = {name: 0.3 * torch.randn(slot.wanted, generator=generator) for name, slot in slots.items()}
    state |= {"encoder.conv_in.bias": torch.zeros(3), "loss.discriminator.main.0.bias": torch.zeros(3)}
    torch.save({"epoch": 7, "state_dict": state, "lr_schedulers": []}, path)


def write_tokenizer(path: Path) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    ids = dict(facts()["config"]["hf_config"]["vocabulary_map"])
    free = [name for name in ids if name.startswith("text")]
    vocabulary = {name: i for name, i in ids.items() if not name.startswith("text")}
    vocabulary |= {word: ids[name] for word, name in zip(WORDS, free, strict=False)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"\s+|x|:|\d+"), "isolated")
    tokenizer.add_special_tokens([AddedToken(name) for name in vocabulary if name not in WORDS])
    tokenizer.enable_truncation(4)  # must not have a say
    tokenizer.save(str(path))
