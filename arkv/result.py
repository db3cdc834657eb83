"""What a decoder gives back."""

from __future__ import annotations

import base64
import html
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from arkv.errors import ArkvError
from arkv.estimate import format_bytes
from arkv.pictures.files import png, write_whole
from arkv.pictures.sheet import Cell, contact_sheet, in_rows

SHOWN = 64
"""Pictures of a result that a notebook shows."""


@dataclass(frozen=True)
class Statistics:
    """What a call of `Decoder.generate` took.

    Attributes:
        pictures: pictures made.
        tokens: visual tokens sampled, all pictures together.
        steps: tokens of a picture, one after the other, all batches together.
        seconds: wall time of conditioning, prefill and decoding, and of compiling what had to be compiled;
            drawing the pixels at the end is not in it.
        kv_bytes: keys and values allocated for the largest batch.
        full_kv_bytes: what the full cache would have taken for it.
        passes: forward passes, all batches together: one a step, or fewer with a window.
    """

    pictures: int
    tokens: int
    steps: int
    seconds: float
    kv_bytes: int
    full_kv_bytes: int
    passes: int

    @property
    def tokens_per_second(self) -> float:
        """Visual tokens a second, guidance rows not counted twice."""
        return self.tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """Tokens of a picture that a forward pass brought on average; 1 without a window."""
        return self.steps / max(1, self.passes)

    def __str__(self) -> str:
        share = self.kv_bytes / max(1, self.full_kv_bytes)
        taken = f"{self.passes} passes ({self.tokens_per_pass:.1f} tokens each) and "
        taken = "" if self.passes == self.steps else taken
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        return (
            f"{pictures}, {self.steps} steps in {taken}{self.seconds:.2f} s, "
            f"{self.tokens_per_second:,.0f} tokens/s, KV {format_bytes(self.kv_bytes)} "
            f"({share:.0%} of the full cache's {format_bytes(self.full_kv_bytes)})"
        )


@dataclass(frozen=True)
class Result:
    """Pictures and how they came about.

    Attributes:
        images: one a prompt, in order; none if only tokens were asked for.
        tokens: int64 `[pictures, N]` on the CPU.
        stats: time and memory.
    """

    images: list[Image.Image]
    tokens: Tensor
    stats: Statistics

    def __repr__(self) -> str:
        size = f" of {self.images[0].width} x {self.images[0].height} pixels" if self.images else ""
        return f"<Result{size}: {self.stats}>"

    def _repr_html_(self) -> str | None:
        """A contact sheet for notebooks; None, so that they show the text, where there are no pictures."""
        if not self.images:
            return None
        sheet = contact_sheet(in_rows([Cell(image) for image in self.images[:SHOWN]]))
        data = base64.b64encode(png(sheet, {})).decode()
        more = "" if len(self.images) <= SHOWN else f"The first {SHOWN} are shown. "
        return (
            f'<img src="data:image/png;base64,{data}" alt="{len(self.images)} pictures" '
            f'style="max-width: 100%"><p>{more}{html.escape(str(self.stats))}</p>'
        )

    def save(self, folder: str | Path) -> list[Path]:
        """Write the pictures as `000000.png` and so on, all of them or none.

        Args:
            folder: is made if it is missing.

        Returns:
            The files, in the order of the pictures.

        Raises:
            ArkvError: there are no pictures, a file of one of these names is there, or one cannot be written.
        """
        if not self.images:
            raise ArkvError("there are tokens only and no pictures to save: generate them with pixels=True")
        paths = [Path(folder).expanduser() / f"{number:06d}.png" for number in range(len(self.images))]
        if there := next((path for path in paths if os.path.lexists(path)), None):
            raise ArkvError(f"{there} is there already: take another folder")
        write_whole({path: png(image, {}) for path, image in zip(paths, self.images, strict=True)})
        return paths


@dataclass(frozen=True)
class ForcedLogits:
    """Logits of every step under given tokens, float32 on the CPU.

    Attributes:
        raw: `[rows, N, vocabulary]`: every conditional row, then, with guidance, every unconditional one.
        guided: `[pictures, N, vocabulary]`; the conditional rows themselves without guidance.
    """

    raw: Tensor
    guided: Tensor
