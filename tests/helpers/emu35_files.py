"""A tiny checkpoint of Emu3.5 as the published ones are written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from emu3_files import tokens as emu3_tokens
from emu3_files import write_ranks
from golden_rows import Golden
from safetensors.torch import save_file

from arkv.models.emu3_tokens import AnswerTokens
from arkv.models.emu35 import Emu35
from arkv.models.emu35_checkpoint import Emu35Variant
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig

GOLDEN, PIXELS = Golden("emu35"), Golden("emu35_ibq")
TALL = (8, 12)
VQ = VQConfig(48, 8, 8, 32, (1, 1, 2), 2, normalised=False)
SHAPE = TransformerConfig(2, 64, 4, 2, 24, 112, 1e-6, qk_norm="rms")


def tokens() -> AnswerTokens:
    return AnswerTokens(**vars(emu3_tokens(GOLDEN.ids)), answer=GOLDEN.ids["bss"])


def tiny(**changes: Any) -> Emu35Variant:
    text = tuple(GOLDEN.tensors["inputs.uncond_template_ids"].tolist()[1:-1])
    variant = Emu35Variant(
        "emu35-tiny", "nobody/emu35", 5.0, SHAPE, 105, tokens(), VQ, sizes=(TALL,), unconditional=text
    )
    return replace(variant, **changes)


class OfRanks(Emu35):
    """The tiny model with the vocabulary of the tiny file of ranks; loads like the published ones."""

    variant = tiny(vocabulary=256 + 7 + 208 + 3 + 48)


def write_emu35(folder: Path) -> None:
    """Weights drawn at random, the golden picture decoder in a folder within."""
    words = write_ranks(folder)
    config = GOLDEN.facts["config"]["hf_config"] | {"vocab_size": words, "image_area": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    slots = Emu35(tiny(vocabulary=words)).weight_slots()
    drawn = {name: 0.2 * torch.randn(slot.wanted, generator=generator) for name, slot in slots.items()}
    save_file(drawn, folder / "model.safetensors")
    decoder = folder / "Emu3.5-VisionTokenizer"
    decoder.mkdir()
    left = {"encoder.conv_in.bias": torch.zeros(3), "quant_conv.bias": torch.zeros(4)}
    torch.save({"state_dict": PIXELS.weights | left}, decoder / "model.ckpt")
    (decoder / "config.yaml").write_text(yaml.safe_dump(PIXELS.facts["config"]))
