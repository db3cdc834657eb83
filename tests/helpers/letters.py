"""A tiny model that takes texts, for what is done with lists of prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import Prompt, Tiny

from arkv.errors import PromptError
from arkv.grid import Grid
from arkv.model import Condition


class Letters(Tiny):
    """Takes texts of letters; its pictures are square."""

    def __init__(self) -> None:
        super().__init__(Grid(6, 4))

    @classmethod
    def from_pretrained(cls, *, dtype: torch.dtype, device: torch.device) -> Letters:
        return cls().to(device, dtype)

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        super().check_prompts([words(prompt) for prompt in prompts])

    def condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        return super().condition([words(prompt) for prompt in prompts], guided)


def words(prompt: Any) -> Prompt:
    if str(prompt).isdecimal():
        return (int(prompt),)
    if not all(word.islower() and len(word) == 1 for word in prompt.split()):
        raise PromptError(f"the prompt is {prompt!r}: expected letters")
    return tuple(ord(word) % 8 for word in prompt.split())


def install(folder: Path) -> str:
    """Makes a distribution whose entry point is the model `letters`; gives the search path to find it."""
    metadata = folder / "letters-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: letters\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[arkv.models]\nletters = letters:Letters\n")
    return os.pathsep.join(map(str, (folder, Path(__file__).parent)))
