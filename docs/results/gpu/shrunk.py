"""Every published model made tiny, so that a CPU runs in seconds what is written for a GPU.

Grids stay: lines, budgets and periods are those of the real models.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from arkv.models.emu3 import Emu3
from arkv.models.emu35 import Emu35
from arkv.models.janus import JanusPro
from arkv.models.llamagen import LlamaGen
from arkv.models.lumina import LuminaMGPT
from arkv.models.lumina2 import LuminaMGPT2

LAYERS, WIDTH, HEADS, HEAD_DIM, HIDDEN = 2, 32, 4, 8, 32
CODES, CHANNELS = 64, 32


def shrink() -> None:
    """Shrink them, for the whole process."""
    for family in (JanusPro, LlamaGen, LuminaMGPT, Emu3, Emu35):
        for model in family.__subclasses__():
            model.variant = _tiny(model.variant)  # type: ignore[attr-defined]
    LuminaMGPT2.variant = _tiny(LuminaMGPT2.variant)


def _tiny(variant: Any) -> Any:
    transformer = replace(
        variant.transformer,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        hidden=HIDDEN,
    )
    decoder = replace(variant.vq, codes=CODES, channels=CHANNELS, blocks=1)
    changed: dict[str, Any] = {"transformer": transformer, "vq": decoder}
    if hasattr(variant, "top_k"):
        changed["top_k"] = min(variant.top_k, CODES)
    return replace(variant, **changed)
