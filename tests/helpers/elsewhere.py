"""What other processes do that a test starts; they find it here by its name."""

from __future__ import annotations

from typing import Any

import torch

from arkv import Decoder


def draw_in_a_process(
    made: Decoder, prompts: list[Any], settings: dict[str, Any], barrier: Any, told: Any
) -> None:
    """As a worker of somebody's pool, at the same time as the others."""
    torch.set_num_threads(1)
    barrier.wait(60)
    told.put([made.generate(prompts, **settings, pixels=False).tokens.tolist() for _ in range(2)])
