"""Janus-Pro 1B and 7B (arXiv 2501.17811): text to pictures of 384 x 384 pixels.

A Llama reads the prompt. Pictures have a vocabulary of their own: a table of codes and an aligner lead into
the Llama, a head of two layers leads out, and LlamaGen's decoder draws. Understanding pictures, the model's
other half, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec, PicturesOnly
from arkv.models import vq
from arkv.models.janus_checkpoint import (
    BEGIN,
    IMAGE,
    JANUS_PRO_1B,
    JANUS_PRO_7B,
    PADDING,
    UNUSED,
    JanusVariant,
    Layout,
    Tokens,
    check_repository,
    check_told,
    layout_of,
    read_variant,
)
from arkv.models.padding import left_padded
from arkv.models.pretrained import CHOICES, Part, empty, load, pictures_only, place_of, read_tokenizer
from arkv.models.prompting import encode, shown, special_tokens, token_ids
from arkv.models.transformer import Transformer
from arkv.weights.checkpoint import WeightSlot
from arkv.weights.files import place, weight_files
from arkv.weights.hub import fetch
from arkv.weights.packing import Linear
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GUIDANCE = 5.0
PROMPT = "<|User|>: {prompt}\n\n<|Assistant|>:"

MAX_CONDITION = 512
"""Condition tokens at most. The model has 16,384 positions; far fewer do for any prompt."""


class JanusPro(Model):
    """Janus-Pro: square pictures from a text.

    The prompt is put into one turn of a conversation and ends in the token that begins a picture. The
    unconditional row is as long, and all between its first and its last token is padding, which is attended
    to, as in training. Defaults as in the authors' `generation_inference.py`: guidance 5, temperature 1, the
    whole vocabulary.

    A prompt is a text; or a list of token ids, the first and the last token included, which is the only
    possibility without a tokenizer.

    Args:
        variant: which model.
        tokenizer: of the published checkpoint.
    """

    variant: ClassVar[JanusVariant | None] = None
    """The one model that a subclass is; None where the checkpoint says which."""

    def __init__(self, variant: JanusVariant, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        config, codes = variant.transformer, variant.vq.codes
        self.tokenizer = tokenizer
        self.tokens = Tokens() if tokenizer is None else Tokens.of(tokenizer, variant.vocabulary)
        self.special = (
            frozenset() if tokenizer is None else special_tokens(tokenizer, (BEGIN, PADDING, IMAGE))
        )
        self.rope_theta = variant.rope_theta
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=codes,
            grid=Grid(variant.side, variant.side),
            max_condition=MAX_CONDITION,
            guidance=GUIDANCE,
            width=config.width,
            hidden=config.hidden,
        )
        self.words = nn.Embedding(variant.vocabulary, config.width)
        self.transformer = Transformer(config)
        self.codes = nn.Embedding(codes, variant.vq.code_dim)
        self.aligner = nn.Sequential(
            nn.Linear(variant.vq.code_dim, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.output = nn.Sequential(
            Linear(config.width, config.width), nn.GELU(), Linear(config.width, codes)
        )
        self.vq = vq.VQDecoder(variant.vq)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
        weights: WeightDtype | None = None,
        lora: str | Path | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        Args:
            source: folder, or name of a repository on the hub, in the layout of deepseek-ai or of
                transformers; None for the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no weight is read.
            revision: of the repository.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            MemoryLimitError: the device has not as much memory free as the weights take.
        """
        known = cls.variant
        if source is None and known is not None and torch.device(device).type == "meta":
            return empty(partial(cls, known), dtype, torch.device(device), weights)
        folder, variant, layout = cls._find(source, revision, token)
        return load(
            partial(cls, variant, read_tokenizer(folder)),
            dtype,
            device,
            lambda model: [Part(model.weight_slots(layout), weight_files(folder), UNUSED[layout])],
            weights,
            lora,
        )

    @classmethod
    def load_picture_decoder(
        cls,
        source: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
        **others: Any,
    ) -> PicturesOnly:
        """Load the picture decoder and nothing else; arguments and errors as for `from_pretrained`."""
        folder, variant, layout = cls._find(source, revision, token)
        return pictures_only(
            partial(cls, variant),
            device,
            lambda model: Part(model._picture_slots(layout), weight_files(folder), ["*"]),
        )

    @classmethod
    def _find(
        cls, source: str | Path | None, revision: str | None, token: str | None
    ) -> tuple[Path, JanusVariant, Layout]:
        """The folder of a checkpoint, and which model is in it."""
        known = cls.variant
        source = place_of(source, known.repository if known else None, "a folder or deepseek-ai/Janus-Pro-7B")
        check_repository(source)
        folder = fetch(source, *CHOICES, revision=revision, token=token)
        return folder, *read_variant(folder, known)

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this model in it, or a repository on the hub is its own.

        Raises:
            CheckpointError: it is of this family and cannot be loaded, or may be Janus 1.3B.
        """
        if cls.variant is not None and source == cls.variant.repository:
            return True
        check_repository(source)
        folder = place(source)
        if layout_of(folder) is None:
            return False
        variant, _ = read_variant(folder)
        check_told(folder, variant)
        return cls.variant is None or variant.is_like(cls.variant)

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Tokenise every prompt.

        Raises:
            PromptError: a prompt is too long, has ids that there are not, or is a text where there is no
                tokenizer.
        """
        for prompt in prompts:
            self._ids(prompt)

    def condition(self, prompts: Sequence[str | Sequence[int]], guided: bool) -> Condition:
        """The prompts, left-padded to the longest; positions count from each row's first token.

        Raises:
            PromptError: as `check_prompts`.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        if guided:
            rows += [[row[0], *[self.tokens.padding] * (len(row) - 2), row[-1]] for row in rows]
        spec = self.spec
        return left_padded(
            rows, self.tokens.padding, self.words, spec.grid.tokens, spec.head_dim, self.rope_theta
        )

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, the first and the last token included."""
        words = self.words.num_embeddings
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError(
                    f"{self.spec.name} has no tokenizer: give prompts as lists of token ids, or load the "
                    "model from a checkpoint"
                )
            prompt = prompt.strip()
            text = encode(self.tokenizer, PROMPT.format(prompt=prompt), prompt, self.special, words)
            ids = [self.tokens.begin, *text, self.tokens.image]
        else:
            given = token_ids(prompt, words)
            if given is None or len(given) < 2:
                raise PromptError(
                    f"the prompt {shown(prompt)} is neither a text nor a list of token ids from 0 to "
                    f"{words - 1}, the first and the last token included"
                )
            forms = {self.tokens.begin, self.tokens.padding, self.tokens.image}
            if inside := [number for number in given[1:-1] if number in forms]:
                raise PromptError(
                    f"the prompt {shown(prompt)} has a token (id {inside[0]}) that is not text: leave it out"
                )
            ids = given
        if len(ids) > MAX_CONDITION:
            raise PromptError(
                f"the prompt {shown(prompt)} has {len(ids)} tokens: expected at most {MAX_CONDITION}"
            )
        return ids

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The code's vector, led into the Llama; the place does not matter."""
        return cast(Tensor, self.aligner(self.codes(tokens)))[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and two layers; every code may stand everywhere."""
        return cast(Tensor, self.output(self.transformer.norm(hidden)))[:, 0].float()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes; colours are rounded down, as by the authors."""
        return self.vq.pixels(rearrange(tokens, "n (h w) -> n h w", h=self.spec.grid.rows), "down")

    @property
    def picture_part(self) -> nn.Module:
        """The picture decoder."""
        return self.vq

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Short descriptions; without a tokenizer, as many random ids as such descriptions have."""
        rng = numpy.random.default_rng(seed)
        if self.tokenizer is not None:
            return [EXAMPLES[i] for i in rng.integers(len(EXAMPLES), size=count)]
        tokens, words = self.tokens, self.words.num_embeddings
        lengths = rng.integers(12, 24, size=count)
        forms = {tokens.begin, tokens.padding, tokens.image}
        text = numpy.setdiff1d(numpy.arange(words), list(forms))
        return [[tokens.begin, *rng.choice(text, size=n).tolist(), tokens.image] for n in lengths]

    def weight_slots(self, layout: Layout) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go.

        Args:
            layout: how it names them.
        """
        if layout == "deepseek":
            llama = "language_model.model."
            modules: dict[str, nn.Module] = {
                "gen_embed": self.codes,
                "gen_aligner.layers.0": self.aligner[0],
                "gen_aligner.layers.2": self.aligner[2],
                "gen_head.output_mlp_projector": self.output[0],
                "gen_head.vision_head": self.output[2],
            }
        else:
            llama = "model.language_model."
            modules = {
                "model.generation_embeddings": self.codes,
                "model.generation_aligner.fc1": self.aligner[0],
                "model.generation_aligner.hidden_layers.0": self.aligner[2],
                "model.generation_head.proj_out": self.output[0],
                "model.generation_head.vision_head": self.output[2],
            }
        modules[f"{llama}embed_tokens"] = self.words
        slots = {
            f"{name}.{kind}": WeightSlot(weight)
            for name, module in modules.items()
            for kind, weight in module.named_parameters()
        }
        return slots | self.transformer.weight_slots(llama) | self._picture_slots(layout)

    def _picture_slots(self, layout: Layout) -> dict[str, WeightSlot]:
        if layout == "deepseek":
            return self.vq.weight_slots("llamagen", "gen_vision_model.")
        return self.vq.weight_slots("transformers", "model.vqmodel.")


class JanusPro1B(JanusPro):
    """Janus-Pro-1B: 384 x 384 pixels from a text."""

    variant = JANUS_PRO_1B


class JanusPro7B(JanusPro):
    """Janus-Pro-7B: 384 x 384 pixels from a text."""

    variant = JANUS_PRO_7B


EXAMPLES = (
    "a photo of a red bus next to a lake",
    "a corgi's head depicted as an explosion of a nebula",
    "three green apples on a wooden table",
    "a watercolour of a lighthouse in a storm",
    "an astronaut riding a horse in the desert",
    "a close-up of a bee on a yellow flower, with the garden out of focus behind it",
)
