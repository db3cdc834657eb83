"""How checkpoints name the tensors of the picture decoder, and how they shape them.

All descend from taming-transformers. What differs is the order in which levels are counted, the names of a
few parts, and that Emu3's decoder has layers over time, of which one tap is kept (see `arkv.models.movq`).
"""

from __future__ import annotations

import re
from typing import Literal

from torch import Tensor

from arkv.weights.checkpoint import WeightSlot

Layout = Literal["llamagen", "transformers", "taming", "emu3", "emu3-transformers"]
"""LlamaGen and the original Janus; Janus in transformers; Chameleon, MoVQGAN and Emu3.5; Emu3; Emu3 in
transformers."""

SHARED = {
    r"^codebook": "quantize.embedding",
    r"^post_quant": "post_quant_conv",
    r"\.shortcut": ".nin_shortcut",
    r"\.attention": ".attn",
    r"\.projection": ".proj_out",
    r"\.upsample": ".upsample.conv",
}
LLAMAGEN = {r"\.middle": ".mid", r"\.levels": ".conv_blocks", r"\.blocks": ".res"}
TAMING = {
    r"\.middle\.0": ".mid.block_1",
    r"\.middle\.1": ".mid.attn_1",
    r"\.middle\.2": ".mid.block_2",
    r"\.levels": ".up",
    r"\.blocks": ".block",
}
SPATIAL = {
    r"(norm\w*)\.norm\.": r"\1.norm_layer.",
    r"\.scale\.": ".conv_y.",
    r"\.shift\.": ".conv_b.",
}
TIME = {
    r"^post_quant_conv": "post_quant_conv.conv",
    r"^first_frame\.blocks": "decoder.time_res_stack",
    r"(time_res_stack\.\d+\.conv\d)": r"\1.conv",
    r"(time_res_stack.*)\.mean": r"\1.running_mean",
    r"(time_res_stack.*)\.variance": r"\1.running_var",
    r"^first_frame\.doublings\.(\d+)": r"decoder.time_conv.\1.conv.conv",
}
HUGGING_FACE = {
    r"\.mid\.attn_1\.norm\.": ".mid.attn_norm.",
    r"\.attn\.(\d+)\.norm\.": r".attn_norms.\1.",
    r"(attn\w*(?:\.\d+)?)\.([qkv])\.": r"\1.\2_proj.",
    r"\.proj_out": ".out_proj",
    r"\.mid\.": ".middle_block.",
    r"\.up\.": ".up_block.up.",
}
"""Of Emu3 in transformers, after the names of Emu3."""

RENAMES: dict[Layout, tuple[dict[str, str], ...]] = {
    "llamagen": (SHARED, LLAMAGEN),
    "transformers": (SHARED, TAMING),
    "taming": (SPATIAL, SHARED, TAMING),
    "emu3": (SPATIAL, SHARED, TIME, TAMING),
    "emu3-transformers": (SPATIAL, SHARED, TIME, TAMING, HUGGING_FACE),
}
DOWNWARDS: tuple[Layout, ...] = ("taming", "emu3", "emu3-transformers")
"""Layouts that count levels from the highest resolution, and run through them backwards."""


def file_name(name: str, layout: Layout, levels: int) -> str:
    """The name of a parameter of `VQDecoder` in a checkpoint that decodes in so many levels."""
    if layout in DOWNWARDS:
        name = re.sub(r"(?<=\.levels\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
    for renames in RENAMES[layout]:
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
    return name


def slot_of(name: str, weight: Tensor, layout: Layout) -> WeightSlot:
    """Where the tensor goes that a checkpoint has for a parameter of `VQDecoder`."""
    if layout in ("emu3", "emu3-transformers") and weight.ndim == 4:
        if name.startswith("post_quant"):
            return WeightSlot(weight, _last_tap, (*weight.shape[:2], 3, 1, 1))
        if name.startswith("first_frame"):
            return WeightSlot(weight, _last_tap, (*weight.shape[:2], 3, *weight.shape[2:]))
        if layout == "emu3-transformers" and re.search(r"\.([qkv]|projection)\.weight$", name):
            return WeightSlot(weight, lambda matrix: matrix[:, :, None, None], tuple(weight.shape[:2]))
    return WeightSlot(weight)


def _last_tap(kernel: Tensor) -> Tensor:
    """What a causal kernel over time does to the first frame."""
    return kernel[:, :, -1]
