"""The smallest adapter that has every part of a real one: random weights, pictures of gray squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

import arkv
from arkv.errors import PromptError
from arkv.models.rope import grid_rotation
from arkv.models.transformer import Block, Transformer, TransformerConfig

LONGEST = 16  # bytes of a prompt
START, PADDING = 256, 257  # condition tokens beside the bytes
SIDE = 8  # pixels of a square


class Squares(arkv.Model):
    """Gray squares from random weights."""

    def __init__(self) -> None:
        super().__init__()
        config = TransformerConfig(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=64)
        self.spec = arkv.ModelSpec(
            name="squares",
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=16,
            grid=arkv.Grid(rows=6, columns=6),
            max_condition=LONGEST + 1,
            guidance=2.0,
            width=config.width,
            hidden=config.hidden,
        )
        self.letters = nn.Embedding(PADDING + 1, config.width)
        self.grays = nn.Embedding(self.spec.vocabulary, config.width)
        self.transformer = Transformer(config)
        self.output = nn.Linear(config.width, self.spec.vocabulary, bias=False)

    @classmethod
    def from_pretrained(cls, *, dtype: torch.dtype, device: torch.device) -> Squares:
        """Random weights, always the same ones; none at all on the meta device."""
        if device.type == "meta":
            with device:
                return cls().to(dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return cls().to(device, dtype)

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse texts that are too long."""
        for prompt in prompts:
            if len(prompt.encode()) > LONGEST:
                raise PromptError(f"the prompt {prompt!r} has more than {LONGEST} bytes: shorten it")

    def condition(self, prompts: Sequence[str], guided: bool) -> arkv.Condition:
        """One token a byte, left-padded, and a start token, which is all that an unconditional row has."""
        self.check_prompts(prompts)
        texts = [[*prompt.encode(), START] for prompt in prompts] + [[START]] * (len(prompts) * guided)
        padded = [[PADDING] * (LONGEST + 1 - len(text)) + text for text in texts]
        ids = torch.tensor(padded, device=self.device)
        # The prompt stands in a line above the picture.
        cells = torch.arange(-LONGEST - 1, self.spec.grid.tokens)
        above = cells < 0
        rows = torch.where(above, -1, self.spec.grid.row(cells))
        columns = torch.where(above, cells + 1, self.spec.grid.column(cells))
        rotation = grid_rotation(rows, columns, self.spec.head_dim, theta=100.0)[None].to(self.device)
        return arkv.Condition(self.letters(ids), ids != PADDING, rotation)

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """One vector a gray."""
        return self.grays(tokens)[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits; every gray may stand everywhere."""
        return self.output(self.transformer.norm(hidden))[:, 0].float()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Squares of `SIDE` pixels, from black to white."""
        grid = self.spec.grid
        gray = (tokens.cpu().float() * 255 / (self.spec.vocabulary - 1)).to(torch.uint8)
        image = gray.view(-1, grid.rows, grid.columns).repeat_interleave(SIDE, 1).repeat_interleave(SIDE, 2)
        return image[..., None].expand(-1, -1, -1, 3).contiguous()

    def example_prompts(self, count: int, seed: int) -> list[str]:
        """Numbers, written out."""
        return [str(seed + i) for i in range(count)]
