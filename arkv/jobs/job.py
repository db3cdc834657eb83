"""What is to be drawn from a list of prompts: numbered pictures, their seeds, their files, and the batches.

A picture's number decides on its seed, so neither the order nor the batches nor the number of workers
changes what is drawn, beyond rounding. Batches lie where they would in a run from the beginning wherever a
run was taken up again, so that in the end the pictures are those of a run that nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from arkv.errors import ArkvError
from arkv.pictures.layouts import LAYOUTS, Layout, PictureFile
from arkv.pictures.prompts import Prompt


def picture_seed(seed: int, number: int) -> int:
    """The seed of a picture, of 48 bits: from the job's and the picture's number, and nothing else.

    Jobs with neighbouring seeds have no picture in common, as they would if numbers were added up.
    """
    # 48 bits, because readers of JSON that know only floating point lose whole numbers from 2^53 on.
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Job:
    """What is to be drawn.

    Attributes:
        prompts: in the order of their list.
        layout: one of `arkv.pictures.layouts.LAYOUTS`.
        samples: pictures of a prompt.
        seed: of the job.
        npz_side: pixels that the pictures of an archive are resized to; None for as they are. The pictures
            themselves do not depend on it.

    Raises:
        ArkvError: a number is out of range, or the prompts do not go with the layout.
    """

    prompts: Sequence[Prompt]
    layout: str
    samples: int
    seed: int = 0
    npz_side: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ArkvError(f"{name} is {getattr(self, name)}: expected at least {least}")
        if self.npz_side is not None and self.layout != "npz":
            raise ArkvError(f"npz_side is for the layout npz, and the layout is {self.layout}")
        self.placing.check(self.prompts, self.samples)

    @property
    def placing(self) -> Layout:
        """How pictures are laid out in files."""
        return LAYOUTS[self.layout]

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self.prompts) * self.samples

    def prompt(self, number: int) -> Prompt:
        """What a picture shows."""
        return self.prompts[self.placing.prompt_of(number, len(self.prompts), self.samples)]

    def picture_seed(self, number: int) -> int:
        """What a picture is drawn from."""
        return picture_seed(self.seed, number)

    @cached_property
    def order(self) -> list[int]:
        """The numbers of all pictures as they are drawn, those with the longest texts first.

        A batch is padded to its longest prompt, so that prompts of a length belong together; and what takes
        the most memory shows in the first batch that it does not fit.
        """
        lengths = [0 if str(each.prompt).isdecimal() else len(each.prompt) for each in self.prompts]
        placing, count = self.placing, len(self.prompts)
        return sorted(
            range(self.pictures),
            key=lambda number: (-lengths[placing.prompt_of(number, count, self.samples)], number),
        )

    @cached_property
    def files(self) -> list[PictureFile]:
        """All files with pictures, as they are drawn."""
        return self.placing.files(self.prompts, self.samples, self.order)

    def units(self, batch_size: int) -> list[list[PictureFile]]:
        """The work in parts that do not depend on each other: whole files, a batch wherever that is possible.

        Args:
            batch_size: pictures decoded at a time.
        """
        together = max(1, batch_size // len(self.files[0].pictures))
        return [self.files[start : start + together] for start in range(0, len(self.files), together)]

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must have in common to work on the same folder, ready for JSON."""
        listed = json.dumps([[each.prompt, each.name, each.record] for each in self.prompts])
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return {
            "prompts": f"{len(self.prompts)} with sha256 {digest[:16]}",
            "layout": self.layout,
            "samples": self.samples,
            "seed": self.seed,
        }
