"""A tiny checkpoint of Lumina-mGPT 2.0 as the published one is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_rows import Golden
from safetensors.torch import save_file

from arkv.models.lumina2 import LuminaMGPT2
from arkv.models.lumina2_checkpoint import Lumina2Variant, Tokens
from arkv.models.lumina_checkpoint import SEPARATOR, size_name
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig

GOLDEN, PIXELS = Golden("lumina2"), Golden("lumina2_movq")
WIDE = (64, 32)
VQ = VQConfig(40, 4, 4, 32, (1, 1, 2), 2, normalised=False, spatial=True)
SHAPE = TransformerConfig(2, 64, 4, 4, 16, 96, 1e-5, qk_norm="layer")
WORDS = ["Generate", "an", "image", "of", "according", "to", "the", "following", "prompt", "red", "bus"]
WORDS += ["64", "32", "x", ":", " ", "\n", "?"]


def tokens() -> Tokens:
    ids = GOLDEN.ids
    sizes = tuple(range(ids["size_0"], ids["size_0"] + 5))
    return Tokens(ids["code_0"], ids["boi"], ids["eol"], ids["bos"], ids["sep"], sizes)


def tiny(**changes: Any) -> Lumina2Variant:
    variant = Lumina2Variant("lumina2-tiny", 64, "nobody/lumina2", SHAPE, 107, VQ, tokens=tokens())
    return replace(variant, **changes)


class TinyLumina2(LuminaMGPT2):
    """What the golden vectors were made with; loads like the published model."""

    variant = tiny()


def write_lumina2(folder: Path) -> None:
    """The golden weights as they are published, with picture decoder and tokenizer."""
    config = dict(GOLDEN.facts["config"]["hf_config"])
    config["vocabulary_map"] = config.pop("size_names")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(GOLDEN.weights, folder / "model.safetensors")
    left = {"encoder.conv_in.bias": torch.zeros(3), "quant_conv.bias": torch.zeros(4)}
    torch.save(PIXELS.weights | left, folder / "movqgan_270M.ckpt")
    write_tokenizer(folder)


def write_tokenizer(folder: Path, **other: int) -> None:
    """The tokenizer; `other` ids for some of the golden names."""
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    ids = GOLDEN.ids | other
    named = {"<|end|>": ids["bos"], "<racm3:break>": ids["boi"], "<eoss>": ids["eoi"]}
    named |= {"<reserved08799>": ids["eol"], SEPARATOR: ids["sep"]}
    named |= {size_name(cells): ids["size_0"] + cells for cells in range(5)}
    vocabulary = dict(zip(WORDS, range(len(WORDS)), strict=True)) | named
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex(r"\s|x|:|\d+"), "isolated")
    tokenizer.add_special_tokens([AddedToken(name) for name in named])
    tokenizer.enable_truncation(4)  # must not have a say
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|end|>"}}))
