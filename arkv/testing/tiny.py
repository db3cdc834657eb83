"""A tiny model with random weights and attention sinks, in which every part of the runtime has work to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from arkv.errors import PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.models.rope import grid_rotation
from arkv.models.transformer import Transformer, TransformerConfig

WORDS = 8
"""Words of the model's vocabulary."""
LONGEST = 4
"""The most words of a prompt."""
GRID = Grid(4, 5)

Prompt = tuple[int, ...]


class Tiny(Model):
    """A transformer over prompts that are tuples of numbers below `WORDS`.

    A batch is padded to its longest prompt. Visual rows are numbered on from the words of the prompt, so
    rows of a batch differ in their rotations as well as in their padding.

    Codes 0 and 1 and the last condition token are sinks: their keys point where every query looks, in one
    head more than in the next. With a newline, the last code is it, and stands at line ends only.

    Args:
        grid: raster of the pictures.
        layers: transformer blocks.
        heads: query heads.
        kv_heads: key heads; divides `heads`.
        vocabulary: visual codes.
        seed: of the weights.
    """

    def __init__(
        self,
        grid: Grid = GRID,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        vocabulary: int = 17,
        seed: int = 0,
    ) -> None:
        super().__init__()
        width, hidden, head_dim = 24, 32, 8
        self.spec = ModelSpec(
            name="tiny",
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=vocabulary,
            grid=grid,
            max_condition=LONGEST + 1,
            guidance=1.5,
            width=width,
            hidden=hidden,
        )
        self.transformer = Transformer(TransformerConfig(layers, width, heads, kv_heads, head_dim, hidden))
        self.words = nn.Embedding(WORDS + 1, width)
        self.codes = nn.Embedding(vocabulary, width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.parameters():
                if weight.ndim == 2:
                    weight.normal_(std=0.35, generator=generator)
            self._add_sinks()
        self.eval()

    def _add_sinks(self) -> None:
        """Channel 0 is on in every token and asks; channel 1 is on in sinks and answers."""
        spec = self.spec
        self.codes.weight.mul_(3)
        self.words.weight[:, 0] = self.codes.weight[:, 0] = 2.0
        self.output.weight.mul_(2)[:, 0] = 0  # what every token has in common decides no code
        self.words.weight[WORDS, 1] = 2.0
        self.codes.weight[:2, 1] = 3.0
        slow = 1  # a rotary pair that hardly turns within the grid
        for block in self.transformer.blocks:
            weight = cast(nn.Linear, block.qkv).weight
            for head in range(spec.heads):
                weight[head * spec.head_dim + slow, 0] = 1.5
            for head in range(spec.kv_heads):
                weight[(spec.heads + head) * spec.head_dim + slow, 1] = 2.0 / (head + 1)

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    @classmethod
    def from_pretrained(cls, *, dtype: torch.dtype, device: torch.device) -> Tiny:
        """The model of seed 0; there are no trained weights."""
        return cls().to(device, dtype)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Refuse words that there are not.

        Raises:
            PromptError: a word is not a number from 0 to `WORDS` - 1.
        """
        if any(word not in range(WORDS) for prompt in prompts for word in prompt):
            raise PromptError(f"a word is outside the vocabulary: expected numbers from 0 to {WORDS - 1}")

    def condition(self, prompts: Sequence[Prompt], guided: bool) -> Condition:
        """Every prompt and one more token that ends it; unconditional rows have that token alone."""
        texts = [(*prompt, WORDS) for prompt in prompts]
        if guided:
            texts += [(WORDS,)] * len(prompts)
        length = max(map(len, texts))
        ids = torch.tensor([[0] * (length - len(text)) + list(text) for text in texts])
        lengths = torch.tensor([len(text) for text in texts])
        mask = torch.arange(length) >= length - lengths[:, None]
        rotation = self._rotation(length, lengths)
        device = self.device
        return Condition(self.words(ids.to(device)), mask.to(device), rotation.to(device))

    def _rotation(self, length: int, lengths: Tensor) -> Tensor:
        grid, cells = self.spec.grid, torch.arange(self.spec.grid.tokens)
        words = torch.arange(length) - length + lengths[:, None]
        rows = torch.cat([words, lengths[:, None] + grid.row(cells)], dim=1)
        columns = torch.cat([torch.zeros_like(words), grid.column(cells).expand(len(lengths), -1)], dim=1)
        turned = grid_rotation(rows.flatten(), columns.flatten(), self.spec.head_dim, 100.0)
        return turned.unflatten(0, rows.shape)

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Embeddings, whatever the position."""
        return cast(Tensor, self.codes(tokens))[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Logits; at line ends of a grid with newlines for the newline alone, elsewhere for the others."""
        logits = cast(Tensor, self.output(self.transformer.norm(hidden)))[:, 0].float()
        grid, codes = self.spec.grid, torch.arange(self.spec.vocabulary, device=hidden.device)
        if not grid.newline:
            return logits
        at_end = grid.column(position) == grid.columns
        return logits.masked_fill((codes == self.spec.vocabulary - 1) != at_end, -torch.inf)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Cells of two rows and three columns, as gray as their code is high."""
        grid = self.spec.grid
        cells = tokens.unflatten(1, (grid.rows, grid.line))[:, :, : grid.columns]
        gray = (cells * (255 // self.spec.vocabulary)).to(torch.uint8)
        return gray.repeat_interleave(2, 1).repeat_interleave(3, 2)[..., None].repeat(1, 1, 1, 3)

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Prompts of every length."""
        generator = torch.Generator().manual_seed(seed)
        return [
            tuple(torch.randint(WORDS, (1 + i % LONGEST,), generator=generator).tolist())
            for i in range(count)
        ]

    def causal_logits(self, condition: Condition, tokens: Tensor) -> Tensor:
        """Logits of every visual token at once, without any cache: `[rows, N, vocabulary]`."""
        length, total = condition.mask.shape[1], self.spec.grid.tokens
        hidden = torch.cat([condition.embeddings, self.codes(tokens[:, :-1])], dim=1)
        mask = torch.cat([condition.mask, torch.ones_like(tokens[:, :-1], dtype=torch.bool)], dim=1)
        hidden = self.transformer(hidden, condition.rotation[:, : length + total - 1], mask)[:, length - 1 :]
        return torch.stack([self.head(hidden[:, [i]], torch.tensor(i)) for i in range(total)], dim=1)


def random_tokens(model: Model, pictures: int, seed: int = 0) -> Tensor:
    """Pictures that the model's grid allows, int64 `[pictures, N]`; the last code is the newline, if any."""
    spec, generator = model.spec, torch.Generator().manual_seed(seed)
    tokens = torch.randint(spec.vocabulary - 1, (pictures, spec.grid.tokens), generator=generator)
    if spec.grid.newline:
        tokens[:, spec.grid.line - 1 :: spec.grid.line] = spec.vocabulary - 1
    return tokens
