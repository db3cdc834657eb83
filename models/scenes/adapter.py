"""The network behind `scenes`: words in, codes of a 24 x 24 raster out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from arkv.errors import CheckpointError
from arkv.grid import Grid
from arkv.machine.defaults import torchs_own
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.models.pretrained import Part, empty, load, slots_of
from arkv.models.rope import grid_rotation
from arkv.models.scenes.codebook import GRID, PATCH_VALUES, Codebook
from arkv.models.scenes.grammar import (
    GROUPS,
    MAX_PROMPT_TOKENS,
    PADDING_ID,
    VOCABULARY_SIZE,
    all_prompts,
    encode_prompt,
    is_held_out,
    parse_prompt,
)
from arkv.models.scenes.judge import judge
from arkv.models.transformer import Transformer, TransformerConfig
from arkv.weights.files import place, read_config
from arkv.weights.packing import Linear
from arkv.weights.quantization import WeightDtype

IMAGE_ID = VOCABULARY_SIZE
"""Id of the condition token that ends every prompt and is all that an unconditional row has."""

MOST_CODES = 2**20
"""Bound of a codebook, beyond all that there are: a file that asks for more is not built."""

CONTEXT_WORDS = 4
"""Words before each word that its own embedding tells of: enough for "left of a blue" square."""

ROPE_THETA = 100.0
"""Base of the rotary frequencies: wavelengths from 6 to 470 cells, for coordinates from -10 to 23."""

WEIGHTS = Path(__file__).parent / "weights" / "scenes.safetensors"
"""The checkpoint that the package carries; its model card lies beside it."""

HEAD_PROFILE = WEIGHTS.with_name("heads.json")
"""Shares of distant attention of the embedded checkpoint's heads, from `arkv profile`."""

DEFAULT_CONFIG = TransformerConfig(layers=6, width=256, heads=4, kv_heads=4, head_dim=64, hidden=704)


class Scenes(Model):
    """A text-to-image transformer over scenes of simple shapes (see `arkv.models.scenes`).

    The condition is one token a word and an image token; the unconditional row is the image token alone.
    Rotary angles turn with row and column: the picture has rows 0 to 23, the condition stands above it in
    row -1, its image token in column 0 and the words to the left, so padding moves nothing.

    Args:
        codebook: the picture tokenizer.
        config: shape of the transformer.
        guidance: the scale that `spec` recommends.
        head_profile: what was measured of the heads of these very weights; None where nothing was.
    """

    codes: Tensor
    rotation: Tensor

    def __init__(
        self,
        codebook: Codebook,
        config: TransformerConfig = DEFAULT_CONFIG,
        guidance: float = 1.35,
        head_profile: Path | None = None,
    ) -> None:
        super().__init__()
        vocabulary = len(codebook.vectors)
        self.spec = ModelSpec(
            name="scenes",
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=vocabulary,
            grid=Grid(GRID, GRID),
            max_condition=MAX_PROMPT_TOKENS + 1,
            guidance=guidance,
            width=config.width,
            hidden=config.hidden,
            head_profile=head_profile,
        )
        self.word_embedding = nn.Embedding(IMAGE_ID + 1, config.width)
        self.context_embedding = nn.Embedding(CONTEXT_WORDS * (IMAGE_ID + 1), config.width)
        self.code_embedding = nn.Embedding(vocabulary, config.width)
        self.transformer = Transformer(config)
        self.output = Linear(config.width, vocabulary, bias=False)
        self.row_embedding = nn.Embedding(GRID, config.width)
        self.column_embedding = nn.Embedding(GRID, config.width)
        self.register_buffer("codes", codebook.vectors)
        self.register_buffer("rotation", self._rotation(), persistent=False)

    @classmethod
    def from_pretrained(
        cls,
        source: Path | str = WEIGHTS,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        weights: WeightDtype | None = None,
        lora: Path | str | None = None,
    ) -> Scenes:
        """Load trained weights.

        Args:
            source: a safetensors file written by `arkv.models.scenes.train`, with its JSON file beside it;
                by default the one in the package.
            dtype: of the weights, and so of keys and values.
            device: where to put them. For the meta device the weights are not read.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or of another shape.
        """
        path, device = place(source), torch.device(device)
        facts = read_config(path.with_suffix(".json"))
        try:
            config, guidance = TransformerConfig(**facts["config"]), float(facts["guidance"])
            if not 0 <= guidance < float("inf") or not 0 < int(facts["codes"]) <= MOST_CODES:
                raise ValueError("guidance or the number of codes is out of range")
            with torch.device("meta"):
                codebook = Codebook(torch.zeros(int(facts["codes"]), PATCH_VALUES, dtype=torch.float32))
            # Other weights have other heads, and policies would take the profile for theirs.
            profile = HEAD_PROFILE if path == WEIGHTS and lora is None else None
            build = partial(cls, codebook, config, guidance, profile)
            empty(build, dtype, torch.device("meta"))
        except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            raise CheckpointError(
                f"{path.with_suffix('.json')} does not describe a scenes model: {error}"
            ) from None
        model = load(build, dtype, device, lambda model: [Part(slots_of(model), [path])], weights, lora)
        if device.type != "meta":
            with torchs_own(device):
                model.rotation = model._rotation().to(device)
        return model

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Colours and angles keep their precision, whatever dtype the weights are moved to.
        exact = {"codes": self.codes, "rotation": self.rotation}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in exact.items():
            moved = getattr(self, name)
            setattr(self, name, moved.to(value.dtype) if value.is_meta else value.to(moved.device))
        return self

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return self.transformer.blocks  # type: ignore[return-value]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Parse every prompt.

        Raises:
            PromptError: a prompt is outside the grammar.
        """
        for prompt in prompts:
            parse_prompt(prompt)

    def condition(self, prompts: Sequence[str], guided: bool) -> Condition:
        """One token a word, left-padded to the longest prompt there can be, and the image token.

        Raises:
            PromptError: a prompt is outside the grammar.
        """
        words = torch.tensor([word_ids(encode_prompt(prompt)) for prompt in prompts])
        if guided:
            words = torch.cat([words, torch.tensor([word_ids([])]).expand_as(words)])
        words = words.to(self.device)
        return Condition(self._embed_words(words), words != PADDING_ID, self.rotation)

    def _embed_words(self, words: Tensor) -> Tensor:
        # A vector for the word and one for each of those before it, by how far back it stands. Which colour
        # goes with which shape is then told outright; attention alone learns it slowly.
        before = F.pad(words, (CONTEXT_WORDS, 0), value=PADDING_ID).unfold(1, CONTEXT_WORDS, 1)[:, :-1]
        places = torch.arange(CONTEXT_WORDS, device=words.device) * (IMAGE_ID + 1)
        return self.word_embedding(words) + self.context_embedding(before + places).sum(-2)

    def _rotation(self) -> Tensor:
        """Rotary cosines and sines of all tokens, float32 `[1, max_condition + N, head_dim]`."""
        grid = self.spec.grid
        words = torch.arange(1 - self.spec.max_condition, 1)
        cells = torch.arange(grid.tokens)
        rows = torch.cat([torch.full_like(words, -1), grid.row(cells)])
        columns = torch.cat([words, grid.column(cells)])
        return grid_rotation(rows, columns, self.spec.head_dim, ROPE_THETA)[None]

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """One learned vector a code, and one each for the row and column of the cell that comes next."""
        return (self.code_embedding(tokens) + self._next_cell(position))[:, None]

    def _next_cell(self, position: Tensor) -> Tensor:
        # Rotations say how far apart two cells are; that a line is full is easier told outright.
        cell = (position + 1).clamp(max=self.spec.grid.tokens - 1)
        return self.row_embedding(self.spec.grid.row(cell)) + self.column_embedding(
            self.spec.grid.column(cell)
        )

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and one projection; every code may stand everywhere."""
        return self.output(self.transformer.norm(hidden))[:, 0].float()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Put the patches of the codes together: 48 x 48 px."""
        return torch.from_numpy(Codebook(self.codes.float()).decode(tokens))

    def example_prompts(self, count: int, seed: int) -> list[str]:
        """Prompts kept out of training, the five groups in turn; repeated only when a group is used up."""
        rng = numpy.random.default_rng(seed)
        texts = [[text for text in all_prompts(group) if is_held_out(text)] for group in GROUPS]
        turns = [itertools.cycle(rng.permutation(group).tolist()) for group in texts]
        return [next(turns[i % len(turns)]) for i in range(count)]

    def satisfies(self, prompt: str, picture: Tensor) -> bool:
        """The verdict of the exact judge."""
        return judge(picture.numpy(), prompt)

    def group(self, prompt: str) -> str:
        """The prompt's group in the grammar.

        Raises:
            PromptError: the prompt is outside the grammar.
        """
        return parse_prompt(prompt).group

    def forward(self, words: Tensor, tokens: Tensor) -> Tensor:
        """Final hidden state at every place that predicts a visual token, all at once: for training.

        Args:
            words: int64 `[rows, C]`, condition tokens, left-padded with `PADDING_ID`.
            tokens: int64 `[rows, N]`, the picture.

        Returns:
            `[rows, N, width]` after the final norm; `output` makes it logits.
        """
        places = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        codes = self.code_embedding(tokens[:, :-1]) + self._next_cell(places)
        hidden = torch.cat([self._embed_words(words), codes], dim=1)
        mask = torch.cat([words != PADDING_ID, torch.ones_like(tokens[:, :-1], dtype=torch.bool)], 1)
        hidden = self.transformer(hidden, self.rotation[:, : hidden.shape[1]], mask)
        return hidden[:, words.shape[1] - 1 :]


def word_ids(words: list[int]) -> list[int]:
    """Left-pad the words of a prompt to the longest one there can be and add the image token."""
    return [PADDING_ID] * (MAX_PROMPT_TOKENS - len(words)) + words + [IMAGE_ID]
