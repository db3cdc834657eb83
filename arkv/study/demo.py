"""The demo: the same prompts and seeds with a full cache and with three small ones.

The model that the package carries draws eight prompts that are shown and more that are only judged, once
under each policy. Every prompt is one that training never saw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from PIL import Image

from arkv.attention.quantization import KvDtype
from arkv.decoder import Decoder, Statistics
from arkv.decoding.compiling import Compile
from arkv.estimate import format_bytes
from arkv.model import Model
from arkv.pictures.sheet import Cell, Row, contact_sheet
from arkv.registry import load_policy

MODEL = "scenes"

PROMPTS = (
    "a yellow triangle",
    "two green triangles",
    "three red circles",
    "four cyan squares on black",
    "a square and a triangle",
    "a green square and a blue circle",
    "a blue triangle left of a red square",
    "a blue circle above a red circle on gray",
)
"""What the sheet shows: all five groups of the model's prompts, none of them used in training."""

JUDGED = 24
"""Further prompts that are judged and not shown: eight pictures are too few to tell policies apart."""


WINDOW = 16
"""Tokens a pass of the picture that is drawn with a window."""


@dataclass(frozen=True)
class Contender:
    """A policy of the demo.

    Attributes:
        title: as it stands on the sheet and in the table.
        policy: as `arkv.registry.load_policy` takes it.
        kv_dtype: how keys and values are stored; None for the model's own dtype.
    """

    title: str
    policy: str
    kv_dtype: KvDtype | None = None


CONTENDERS = (
    Contender("full cache", "full"),
    Contender("LineAR 1/6", "linear:ratio=1/6"),
    Contender("front 1/6, four bits", "front:ratio=1/6", "int4"),
    Contender("StreamingLLM 1/6", "streaming:ratio=1/6"),
)


@dataclass(frozen=True)
class Trial:
    """What a policy made of the prompts.

    Attributes:
        contender: which policy.
        images: one a prompt.
        verdicts: whether each picture shows what its prompt asks for; None where nobody can say.
        stats: time and memory of all pictures, which were one batch.
    """

    contender: Contender
    images: list[Image.Image]
    verdicts: list[bool | None]
    stats: Statistics

    @property
    def kv_bytes(self) -> float:
        """Bytes of keys and values held for one picture."""
        return self.stats.kv_bytes / self.stats.pictures

    @property
    def share(self) -> float:
        """`kv_bytes` by what the full cache takes."""
        return self.stats.kv_bytes / self.stats.full_kv_bytes

    def score(self, pictures: int | None = None) -> str:
        """How many pictures are right, such as "7 of 8": of the first so many, or of all."""
        verdicts = self.verdicts[:pictures]
        return f"{sum(v is True for v in verdicts)} of {len(verdicts)}"


def demo_prompts(model: Model, judged: int = JUDGED) -> list[Any]:
    """The prompts to be shown, then so many others that are judged only."""
    # Enough of them that leaving out the shown ones, even if some come again, leaves so many.
    drawn = model.example_prompts(2 * judged + len(PROMPTS), seed=0)
    return [*PROMPTS, *[prompt for prompt in drawn if prompt not in PROMPTS][:judged]]


def run_trial(
    model: Model,
    contender: Contender,
    prompts: Sequence[Any],
    *,
    seed: int = 0,
    guidance: float | None = None,
    compile: Compile = "none",
    progress: bool = False,
) -> Trial:
    """Draw and judge every prompt under one policy, as one batch.

    Args:
        model: what draws.
        contender: whose policy decides what stays in the cache.
        prompts: for instance those of `demo_prompts`.
        seed: of the first picture; the others count up from it, so every policy meets the same chance.
        guidance: scale of classifier-free guidance; None for the model's own.
        compile: "none" or "inductor".
        progress: show a bar.

    Raises:
        ArkvError: as `Decoder.generate`.
    """
    decoder = Decoder(model, load_policy(contender.policy), compile, kv_dtype=contender.kv_dtype)
    seeds = range(seed, seed + len(prompts))
    result = decoder.generate(prompts, seeds=seeds, guidance=guidance, progress=progress)
    verdicts = [
        model.satisfies(prompt, torch.from_numpy(numpy.array(image)))
        for prompt, image in zip(prompts, result.images, strict=True)
    ]
    return Trial(contender, result.images, verdicts, result.stats)


@dataclass(frozen=True)
class Windowed:
    """One picture, drawn one token a pass and again several.

    Attributes:
        alone: of the first.
        several: of the second.
        same: whether all tokens are.
    """

    alone: Statistics
    several: Statistics
    same: bool


def run_windowed(model: Model, *, seed: int = 0, guidance: float | None = None) -> Windowed:
    """Draw the first prompt with the full cache, eagerly, with and without a window of `WINDOW` tokens.

    Args:
        model: what draws.
        seed: of the picture.
        guidance: scale of classifier-free guidance; None for the model's own.

    Raises:
        ArkvError: as `Decoder.generate`.
    """
    decoder = Decoder(model, load_policy("full"))
    alone, several = (
        decoder.generate(PROMPTS[:1], seed=seed, guidance=guidance, window=window, pixels=False)
        for window in (1, WINDOW)
    )
    return Windowed(alone.stats, several.stats, torch.equal(alone.tokens, several.tokens))


def draw_sheet(trials: Sequence[Trial], prompts: Sequence[str] = PROMPTS) -> Image.Image:
    """The first pictures of every trial as a contact sheet: a row a policy, a column a prompt.

    Speed is not on it: the same command gives the same sheet, however busy the machine is.

    Args:
        trials: at least one; all of the same prompts.
        prompts: those to show, the first of the trials' prompts.
    """
    rows = []
    for index, trial in enumerate(trials):
        cells = [
            Cell(image, prompt if index == 0 else "", verdict)
            for prompt, image, verdict in zip(prompts, trial.images, trial.verdicts, strict=False)
        ]
        notes = (
            f"KV: {format_bytes(trial.kv_bytes)} a picture,",
            f"{trial.share:.0%} of the full cache",
            f"{trial.score()} prompts right",
        )
        rows.append(Row(cells, trial.contender.title, notes))
    judged = len(trials[0].verdicts)
    return contact_sheet(
        rows,
        heading="One model, the same prompts and seeds, four KV caches",
        note="A tick: the picture shows exactly what its prompt asks for; an exact judge decides. "
        f"Scores are over all {judged} prompts of the demo, none of them used in training.",
    )
