"""Text and picture as one sequence from one vocabulary: what Lumina-mGPT, Emu3 and their successors share.

A row is text, then tokens that begin a picture and say its size, then the picture line by line; every line
ends in a token of its own. Of all of these only the codes are free. So what comes before the first code is
part of the condition, the line end is the only token allowed where a line ends and allowed nowhere else, and
nothing is decoded after the last one: what a model would write there changes no pixel.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn

from arkv.errors import PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.models.padding import left_padded
from arkv.models.pretrained import Part
from arkv.models.prompting import encode, shown, special_tokens, token_ids
from arkv.models.transformer import Transformer, TransformerConfig
from arkv.models.vq import UNUSED, Rounding, VQConfig, VQDecoder
from arkv.weights.checkpoint import WeightSlot
from arkv.weights.packing import Linear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TEXT = 512
"""Tokens of the longest text that is taken, what a family puts around the prompt counted."""

THINGS = ("a red bus", "a brown bear", "a blue bird", "an old clock", "a glass vase", "a wooden bench")
"""What example prompts are made of."""


@dataclass(frozen=True)
class Form:
    """The tokens that give the rows of a model their form.

    Attributes:
        begin: begins every conditional row.
        header: what stands between text and picture.
        unconditional: the whole unconditional row, up to the picture.
        line_end: ends a line of codes.
        first_code: the code 0; the others follow in order.
        reserved: further tokens that no text has.
    """

    begin: int
    header: tuple[int, ...]
    unconditional: tuple[int, ...]
    line_end: int
    first_code: int
    reserved: frozenset[int] = frozenset()

    def row(self, text: Sequence[int]) -> list[int]:
        """A conditional row, up to the picture."""
        return [self.begin, *text, *self.header]


class Variant(Protocol):
    """What all of these families say of a model."""

    @property
    def name(self) -> str:
        """What the registry calls it."""

    @property
    def transformer(self) -> TransformerConfig:
        """Shape of the transformer."""

    @property
    def vocabulary(self) -> int:
        """Tokens of text and picture together."""

    @property
    def vq(self) -> VQConfig:
        """Shape of the picture decoder."""

    @property
    def rope_theta(self) -> float:
        """Base of the rotary frequencies."""


class OneVocabulary(Model):
    """Base of the families whose text and pictures share a vocabulary.

    A prompt is a text; or a list of ids of text tokens, which is taken instead of the prompt with all that
    the family puts around it. Only the latter is possible without a tokenizer.

    Args:
        variant: which model.
        form: of the rows.
        grid: raster of the picture, with line ends.
        guidance: scale that the pictures are best with.
        top_k: how many of the likeliest codes are drawn from.
        tokenizer: of the checkpoint.
    """

    rounding: Rounding = "down"
    """How colours become whole numbers."""

    def __init__(
        self,
        variant: Variant,
        form: Form,
        grid: Grid,
        *,
        guidance: float,
        top_k: int,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__()
        config, vq = variant.transformer, variant.vq
        self.form, self.codes, self.rope_theta, self.tokenizer = form, vq.codes, variant.rope_theta, tokenizer
        self.special = frozenset() if tokenizer is None else special_tokens(tokenizer)
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=vq.codes + 1,
            grid=grid,
            max_condition=max(len(form.row([0] * MAX_TEXT)), len(form.unconditional)),
            guidance=guidance,
            width=config.width,
            hidden=config.hidden,
            top_k=min(top_k, vq.codes),
        )
        self.embedding = nn.Embedding(variant.vocabulary, config.width)
        self.transformer = Transformer(config)
        # Of the published head, only the rows that a picture can use.
        self.output = Linear(config.width, vq.codes + 1, bias=False)
        self.vq = VQDecoder(vq)

    def sentence(self, prompt: str) -> str:
        """The text that a prompt is put into; here, the prompt itself."""
        return prompt

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Tokenise every prompt.

        Raises:
            PromptError: a prompt is too long, has tokens of a picture in it, or is a text where there is no
                tokenizer.
        """
        for prompt in prompts:
            self._text(prompt)

    def condition(self, prompts: Sequence[str | Sequence[int]], guided: bool) -> Condition:
        """Text and header, left-padded; positions count from each row's first token.

        Raises:
            PromptError: as `check_prompts`.
        """
        rows: list[Sequence[int]] = [self.form.row(self._text(prompt)) for prompt in prompts]
        if guided:
            rows += [self.form.unconditional] * len(prompts)
        spec = self.spec
        return left_padded(
            rows, self.form.begin, self.embedding, spec.grid.tokens, spec.head_dim, self.rope_theta
        )

    def _text(self, prompt: str | Sequence[int]) -> list[int]:
        """Ids of the text tokens of a prompt."""
        words = self.embedding.num_embeddings
        if not isinstance(prompt, str):
            given = token_ids(prompt, words)
            if given is None:
                raise PromptError(
                    f"the prompt {shown(prompt)} is neither a text nor a list of token ids from 0 to "
                    f"{words - 1}"
                )
            ids = given
        elif self.tokenizer is None:
            raise PromptError(
                f"{self.spec.name} has no tokenizer: load it from a checkpoint that has one, or give prompts "
                "as lists of token ids"
            )
        else:
            ids = encode(self.tokenizer, self.sentence(prompt), prompt, self.special, words)
        if len(ids) > MAX_TEXT:
            raise PromptError(
                f"the prompt {shown(prompt)} has {len(ids)} tokens: expected at most {MAX_TEXT}"
            )
        if bad := [i for i in ids if self._is_reserved(i)]:
            raise PromptError(
                f"the prompt {shown(prompt)} has a token (id {bad[0]}) that is not text: leave it out"
            )
        return ids

    def _is_reserved(self, token: int) -> bool:
        """Whether a token gives a sequence its form, or is part of a picture."""
        form = self.form
        return token in form.reserved or form.first_code <= token < form.first_code + self.codes

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The vectors that codes and line end have in the common vocabulary."""
        ids = torch.where(tokens == self.codes, self.form.line_end, tokens + self.form.first_code)
        return self.embedding(ids)[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and one projection; the line end where a line ends, codes elsewhere."""
        logits = self.output(self.transformer.norm(hidden))[:, 0].float()
        grid = self.spec.grid
        is_end = torch.arange(self.codes + 1, device=logits.device) == self.codes
        return logits.masked_fill(is_end != (grid.column(position) == grid.columns), -torch.inf)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes, line ends left out."""
        grid = self.spec.grid
        codes = rearrange(tokens, "n (rows line) -> n rows line", rows=grid.rows)[:, :, : grid.columns]
        return self.vq.pixels(codes, self.rounding)

    @property
    def picture_part(self) -> nn.Module:
        """The picture decoder."""
        return self.vq

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Short sentences; without a tokenizer, as many ids of text tokens as such sentences have."""
        rng = numpy.random.default_rng(seed)
        if self.tokenizer is not None:
            sentences = [f"a photo of {a} and {b}" for a, b in itertools.permutations(THINGS, 2)]
            return [sentences[i] for i in rng.integers(len(sentences), size=count)]
        text = [i for i in range(self.embedding.num_embeddings) if not self._is_reserved(i)]
        return [[text[i] for i in rng.integers(len(text), size=24)] for _ in range(count)]

    def weight_slots(
        self, prefix: str = "model.", head: str = "lm_head.weight", norm_rows: int = 1
    ) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go, all but those of the picture decoder.

        Args:
            prefix: what stands before the names of embedding and layers.
            head: the name of the output head, of which the rows of codes and line end are taken.
            norm_rows: rows of the norms of queries and keys that are a head's own.
        """
        first, codes, end = self.form.first_code, self.codes, self.form.line_end
        rows = WeightSlot(
            self.output.weight,
            lambda rows: torch.cat([rows[first : first + codes], rows[end : end + 1]]),
            tuple(self.embedding.weight.shape),
        )
        return {
            f"{prefix}embed_tokens.weight": WeightSlot(self.embedding.weight),
            head: rows,
            **self.transformer.weight_slots(prefix, norm_rows),
        }

    def picture_weights(self, file: Path) -> Part:
        """The picture decoder's weights, in a file with the names of taming-transformers."""
        return Part(self.vq.weight_slots("taming"), [file], UNUSED)
