"""What a cache holds while a picture is drawn: the tokens that are resident when a line is complete.

Figures of it are drawn in `arkv.study.inspection_figure`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from arkv.decoder import Decoder
from arkv.errors import ArkvError
from arkv.grid import Grid
from arkv.model import Model
from arkv.policy import CachePolicy
from arkv.study.shadow import Watched, by_token


@dataclass(frozen=True)
class Recording:
    """What the cache held while one picture was drawn, at the end of every line.

    That is after the line's last token was decoded and before the eviction that follows: budget and period
    together. The very last token of a picture is drawn and never cached, because nothing comes after it.

    Attributes:
        grid: raster of the visual tokens.
        images: the lines finished so far, after each line.
        residents: bool `[lines, layers, kv_heads, N]`, on the CPU: the visual tokens held.
        attended: as `residents`: those of them that the policy lets the line's last token look at.
    """

    grid: Grid
    images: tuple[Image.Image, ...]
    residents: Tensor
    attended: Tensor

    def ages(self, line: int) -> Tensor:
        """How many tokens of each age a head holds when a line is complete.

        Args:
            line: from 0.

        Returns:
            int64 `[layers, kv_heads, line + 1]`, by age in lines: those of the newest line first.
        """
        by_line = self.residents[line].unflatten(-1, (self.grid.rows, self.grid.line)).sum(-1)
        return by_line[..., : line + 1].flip(-1)


def record(
    model: Model,
    policy: CachePolicy,
    prompt: Any,
    *,
    seed: int = 0,
    guidance: float | None = None,
    unconditional: bool = False,
    progress: bool = False,
) -> Recording:
    """Draw a picture, without compiling, and note after every line what is resident.

    Args:
        model: what draws.
        policy: what stays in the cache.
        prompt: as for `Decoder.generate`.
        seed: of the picture.
        guidance: scale of classifier-free guidance; None takes the model's own.
        unconditional: look at the unconditional row of the picture instead of the conditional one.
        progress: show a bar.

    Raises:
        ArkvError: there is no unconditional row without guidance, or as `Decoder.generate`.
    """
    guidance = model.spec.guidance if guidance is None else guidance
    if unconditional and guidance == 1:
        raise ArkvError("there is no unconditional row at a guidance of 1: give another or leave it out")
    grid = model.spec.grid
    watched = Watched(policy=policy)
    decoder = Decoder(model, watched)
    row = int(unconditional)
    images: list[Image.Image] = []
    residents: list[Tensor] = []
    attended: list[Tensor] = []

    def note(batch: range, line: int, done: Sequence[Image.Image]) -> None:
        store = decoder.store
        assert store is not None
        images.append(done[0])
        for held, slots in ((residents, store.resident), (attended, watched.saw["visible"])):
            held.append(by_token(store, slots)[:, row, :, store.condition :].cpu())

    decoder.generate([prompt], seeds=[seed], guidance=guidance, window=1, progress=progress, on_line=note)
    return Recording(grid, tuple(images), torch.stack(residents), torch.stack(attended))


def choose(what: str, wanted: Sequence[int] | None, count: int, usual: Sequence[int]) -> list[int]:
    """Indices to show, none of them twice.

    Args:
        what: "line", "layer" or "key head", for the message.
        wanted: None for the usual ones.
        count: how many there are.
        usual: what to show if nobody says.

    Raises:
        ArkvError: one that is wanted does not exist.
    """
    chosen = usual if wanted is None else wanted
    if absent := [index for index in chosen if not 0 <= index < count]:
        raise ArkvError(f"there is no {what} {absent[0]}: expected 0 to {count - 1}")
    return list(dict.fromkeys(chosen))
