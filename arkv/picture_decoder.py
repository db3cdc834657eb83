"""The part of a model that makes pictures of tokens, alone: for processes that do nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from arkv.machine.defaults import torchs_own
from arkv.machine.memory import allocated
from arkv.model import PictureDecoder, PicturesOnly
from arkv.registry import class_and_options, reading, usable_device, with_random_weights
from arkv.weights.checkpoint import draw_weights_
from arkv.weights.quantization import WeightDtype


def load_picture_decoder(
    name: str | Path,
    *,
    device: torch.device | str = "cpu",
    random_weights: bool = False,
    weights: WeightDtype | None = None,
    lora: str | Path | None = None,
    **options: Any,
) -> PictureDecoder:
    """Load what makes pictures of a model's tokens, without the rest where they can be told apart.

    Args:
        name: of a model, as for `load_model`.
        device: where to put the weights.
        random_weights: draw the weights, the same as `load_model` draws.
        weights: of the blocks, of which there are none here.
        lora: for the blocks likewise.
        options: as for `load_model`.

    Raises:
        ArkvError: as `load_model`.
    """
    device = usable_device(device)
    model_class, options = class_and_options(name, options)
    with torchs_own(device), reading(options.get("source") or name):
        if not random_weights:
            return model_class.load_picture_decoder(device=device, **options)
        meta = torch.device("meta")
        model = model_class.from_pretrained(dtype=torch.float32, device=meta, **options)
    if (part := model.picture_part) is None:
        return with_random_weights(model, device, 0)
    prefix = next(name for name, module in model.named_modules() if module is part)
    draw_weights_(allocated(part, device), 0, prefix)
    return PicturesOnly(model)
