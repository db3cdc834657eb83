"""Tiny checkpoints of Emu3 as the published ones are written."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from golden_rows import Golden
from safetensors.torch import save_file

from arkv.models.emu3 import Emu3
from arkv.models.emu3_checkpoint import Emu3Variant
from arkv.models.emu3_tokens import SPECIAL, Tokens, code_name
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig

GOLDEN, PIXELS = Golden("emu3"), Golden("emu3_vq")
CODES = 48
WIDE = (12, 8)
VQ = VQConfig(CODES, 4, 4, 32, (1, 1, 2), 2, normalised=False, spatial=True, doublings=2)
SHAPE = TransformerConfig(2, 64, 4, 2, 16, 112, 1e-5)
MERGED = (b"re", b"red", b" b", b"us", b" bus", b"qu", b"wor")
"""Tokens of the tiny tokenizer beside the 256 bytes."""


def tokens(ids: dict[str, int] | None = None) -> Tokens:
    """The ids of the golden model, whose digits are where the published ones are."""
    ids = ids or GOLDEN.ids
    return Tokens(
        padding=ids["pad"],
        line_end=ids["eol"],
        begin=ids["bos"],
        image=ids["img"],
        image_start=ids["boi"],
        first_code=ids["code_0"],
    )


def tiny(**changes: Any) -> Emu3Variant:
    negative = tuple(GOLDEN.tensors["inputs.negative_text_ids"].tolist())
    variant = Emu3Variant(
        "emu3-tiny", "nobody/emu3-tiny", 96, (), SHAPE, 100, tokens(), VQ, negative=negative
    )
    return replace(variant, **changes)


class TinyEmu3(Emu3):
    """What the golden vectors were made with; loads like the published models."""

    variant = tiny()


def special_names() -> list[str]:
    return [*SPECIAL, "<|image token|>", "<|image start|>", "<|image end|>", *map(code_name, range(CODES))]


def write_ranks(folder: Path) -> int:
    """The tokenizer in the form of BAAI; gives the number of tokens."""
    ranks = [*(bytes([byte]) for byte in (*range(33, 256), *range(33))), *MERGED]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "emu3.tiktoken").write_text("\n".join(lines) + "\n")
    (folder / "emu3_vision_tokens.txt").write_text("\n".join(special_names()[len(SPECIAL) :]) + "\n")
    return len(ranks) + len(special_names())


def config_of(words: int, **changes: Any) -> dict[str, Any]:
    """A configuration as BAAI writes it."""
    return GOLDEN.facts["config"]["hf_config"] | {"vocab_size": words, "torch_dtype": "float32"} | changes


def write_emu3(folder: Path, **changes: Any) -> None:
    """A checkpoint in BAAI's layout with weights drawn at random, its picture decoder in a folder within."""
    words = write_ranks(folder)
    (folder / "config.json").write_text(json.dumps(config_of(words, **changes)))
    generator = torch.Generator().manual_seed(5)
    slots = Emu3(tiny(vocabulary=words), WIDE).weight_slots()
    drawn = {name: 0.2 * torch.randn(slot.wanted, generator=generator) for name, slot in slots.items()}
    save_file(drawn, folder / "model.safetensors")
    write_decoder(folder / "Emu3-VisionTokenizer")


def write_decoder(folder: Path, mean: float = 0.5) -> None:
    """The golden picture decoder as it is published, with what encoding takes."""
    folder.mkdir(exist_ok=True)
    weights = PIXELS.weights | {
        "encoder.conv_in.bias": torch.zeros(3),
        "quant_conv.conv.bias": torch.zeros(4),
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(PIXELS.facts["config"]["vq_config"]))
    colours = {"image_mean": [mean] * 3, "image_std": [0.5] * 3, "spatial_factor": 8}
    (folder / "preprocessor_config.json").write_text(json.dumps(colours))


def write_words(path: Path, ids: dict[str, int]) -> None:
    """A tokenizer in the form of transformers that has these tokens; text is `textN` and digits."""
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split

    spelled = {15 + digit: str(digit) for digit in range(10)} | {9: "*"}
    vocabulary = {spelled.get(number, name): number for name, number in ids.items()}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="text0"))
    tokenizer.pre_tokenizer = Split(Regex(r"\s+|\d|\*"), "isolated")
    tokenizer.add_special_tokens([AddedToken(name) for name in vocabulary if name.startswith("<")])
    tokenizer.save(str(path))
