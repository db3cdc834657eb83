"""Lumina-mGPT 7B (arXiv 2408.02657): text to pictures of many shapes, on the architecture of Chameleon.

One sequence of text and picture tokens from one vocabulary. A picture begins with a token that says so, then
the height and the width in cells of 32 x 32 pixels, then its codes, two lines of them a cell; every line ends
in a token of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec, PicturesOnly
from arkv.models.lumina_checkpoint import (
    CELL,
    LUMINA_7B_512,
    LUMINA_7B_768,
    LUMINA_7B_1024,
    TOKENIZER_REPOSITORY,
    UNUSED,
    VARIANTS,
    VQGAN_FILE,
    WEIGHT_FILES,
    LuminaVariant,
    find_vqgan,
    is_chameleon,
    norm_rows,
    read_variant,
    tokenizer_for,
)
from arkv.models.padding import left_padded
from arkv.models.pretrained import CONFIG_FILE, TOKENIZER_FILE, Part, empty, load, pictures_only
from arkv.models.prompting import encode, shown, special_tokens, token_ids
from arkv.models.transformer import Transformer
from arkv.models.vq import UNUSED as VQ_UNUSED
from arkv.models.vq import VQDecoder
from arkv.scalars import whole
from arkv.weights.checkpoint import WeightSlot
from arkv.weights.files import is_file, place, weight_files
from arkv.weights.hub import fetch, is_hub_id
from arkv.weights.packing import Linear
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MAX_TEXT = 512
"""Tokens of the longest text that is taken, the sentence around the prompt counted."""

GUIDANCE, TOP_K = 4.0, 2000

PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"

THINGS = ("a red bus", "a brown bear", "a blue bird", "an old clock", "a glass vase", "a wooden bench")
"""What example prompts are made of."""


class LuminaMGPT(Model):
    """Lumina-mGPT: pictures of any published size from a text.

    The prompt is put into the sentence that the model was trained on, which names the size. What the model
    would then write itself, the tokens that begin a picture and say its size, is given to it as part of the
    condition, so that no sample can get it wrong. The unconditional row is these three tokens alone. The line
    end is the only token allowed where a line ends, and allowed nowhere else; nothing is decoded after the
    last one.

    Defaults as in the README of Lumina-mGPT's code: guidance 4.0 on all visual tokens, the 2,000 likeliest
    codes, temperature 1.

    A prompt is a text; or a list of ids of text tokens, which is taken as the whole text instead of the
    sentence. Only the latter is possible without a tokenizer.

    Args:
        variant: which model.
        size: width and height of the pictures in pixels, one of `variant.sizes`; None for the square.
        tokenizer: of the published checkpoint.

    Raises:
        ArkvError: the model was not trained for this size.
    """

    variant: ClassVar[LuminaVariant | None] = None
    """The one model that a subclass is; None where the repository or the size say which."""

    def __init__(
        self, variant: LuminaVariant, size: tuple[int, int] | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        super().__init__()
        config, codes = variant.transformer, variant.vq.codes
        self.size = _check_size(variant, size)
        width, height = (side // CELL for side in self.size)
        self.tokens, self.codes, self.tokenizer = variant.tokens, codes, tokenizer
        self.special = frozenset() if tokenizer is None else special_tokens(tokenizer)
        self.rope_theta = variant.rope_theta
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=codes + 1,
            grid=Grid(2 * height, 2 * width, newline=True),
            max_condition=MAX_TEXT + 5,
            guidance=GUIDANCE,
            width=config.width,
            hidden=config.hidden,
            top_k=min(TOP_K, codes),
        )
        self.image = [self.tokens.image_start, *(self.tokens.first_size + side for side in (height, width))]
        self.embedding = nn.Embedding(variant.vocabulary, config.width)
        self.transformer = Transformer(config)
        # Of the published head, only the rows that a picture can use.
        self.output = Linear(config.width, codes + 1, bias=False)
        self.vq = VQDecoder(variant.vq)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        size: tuple[int, int] | None = None,
        vqgan: Path | str | None = None,
        tokenizer: Path | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        weights: WeightDtype | None = None,
        lora: str | Path | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        The three models differ in nothing but their weights, so which one it is follows from the class, from
        the published name of a repository, or from `size`; no file and no name of a folder says it.

        Args:
            source: folder with `config.json` and the safetensors, or name of a repository on the hub; None
                for the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no file is read.
            size: width and height of the pictures in pixels; None for the square.
            vqgan: `vqgan.ckpt` of Meta's Chameleon; None for the one in the folder, or in `tokenizer` there.
            tokenizer: `tokenizer.json` or a folder with it, or a hub id; None for the folder of the weights,
                or for the published one if they come from the hub.
            revision: of the repository.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            MemoryLimitError: the device has not as much memory free as the weights take.
            ArkvError: the model was not trained for this size.
        """
        device = torch.device(device)
        variant = cls.variant or _variant_of(source, size)
        if device.type == "meta":
            return empty(partial(cls, variant, size), dtype, device, weights)
        source = variant.repository if source is None else source
        # What may be missing is looked for before the large files are downloaded.
        folder = fetch(source, (CONFIG_FILE, TOKENIZER_FILE, VQGAN_FILE), revision=revision, token=token)
        variant = read_variant(folder, variant)
        if tokenizer is None:
            is_bare = is_hub_id(source) and not is_file(folder / TOKENIZER_FILE)
            tokenizer = TOKENIZER_REPOSITORY if is_bare else folder
        words = tokenizer_for(fetch(tokenizer, (TOKENIZER_FILE,), token=token), variant.tokens)
        decoder = find_vqgan(folder if vqgan is None else vqgan)
        files = weight_files(fetch(source, WEIGHT_FILES, revision=revision, token=token))

        def parts(model: LuminaMGPT) -> Iterator[Part]:
            yield Part(model.weight_slots(norm_rows(files, model.spec.heads)), files, UNUSED)
            yield Part(model.vq.weight_slots("taming"), [decoder], VQ_UNUSED)

        return load(partial(cls, variant, size, words), dtype, device, parts, weights, lora)

    @classmethod
    def load_picture_decoder(
        cls,
        source: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        size: tuple[int, int] | None = None,
        vqgan: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        **others: Any,
    ) -> PicturesOnly:
        """Load the picture decoder and nothing else; arguments and errors as for `from_pretrained`."""
        variant = cls.variant or _variant_of(source, size)
        source = variant.repository if source is None else source
        folder = fetch(source, (CONFIG_FILE, VQGAN_FILE), revision=revision, token=token)
        variant, decoder = read_variant(folder, variant), find_vqgan(folder if vqgan is None else vqgan)
        return pictures_only(
            partial(cls, variant, size),
            device,
            lambda model: Part(cast(Self, model).vq.weight_slots("taming"), [decoder], VQ_UNUSED),
        )

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this family in it, or a repository on the hub is this model's.

        Nothing in a folder tells the models apart, so any of them may be in it.

        Raises:
            CheckpointError: it is of this family and cannot be loaded, or is Chameleon itself.
        """
        if cls.variant is not None and source == cls.variant.repository:
            return True
        folder = place(source)
        if not is_chameleon(folder):
            return False
        read_variant(folder, cls.variant or VARIANTS[0])
        return True

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
        """Text, separator and picture header, left-padded; positions count from each row's first token.

        Raises:
            PromptError: as `check_prompts`.
        """
        rows = [
            [self.tokens.begin, *self._text(prompt), self.tokens.separator, *self.image] for prompt in prompts
        ]
        if guided:
            rows += [self.image] * len(prompts)
        spec = self.spec
        return left_padded(
            rows, self.tokens.begin, self.embedding, spec.grid.tokens, spec.head_dim, self.rope_theta
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
            text = PROMPT.format(width=self.size[0], height=self.size[1], prompt=prompt)
            ids = encode(self.tokenizer, text, prompt, self.special, words)
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
        t = self.tokens
        return token in (t.begin, t.image_start, t.separator, t.line_end) or (
            t.first_code <= token < t.first_code + self.codes
        )

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The vectors that codes and line end have in the common vocabulary."""
        ids = torch.where(tokens == self.codes, self.tokens.line_end, tokens + self.tokens.first_code)
        return self.embedding(ids)[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and one projection; the line end where a line ends, codes elsewhere."""
        logits = self.output(self.transformer.norm(hidden))[:, 0].float()
        grid = self.spec.grid
        is_end = torch.arange(self.codes + 1, device=logits.device) == self.codes
        return logits.masked_fill(is_end != (grid.column(position) == grid.columns), -torch.inf)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes with Chameleon's decoder; colours are rounded down as in its code."""
        grid = self.spec.grid
        codes = rearrange(tokens, "n (rows line) -> n rows line", rows=grid.rows)[:, :, : grid.columns]
        return self.vq.pixels(codes, "down")

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

    def weight_slots(self, norm_rows: int = 1) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go, all but those of the picture decoder.

        Args:
            norm_rows: rows of its query and key norms.
        """
        first, codes, end = self.tokens.first_code, self.codes, self.tokens.line_end
        head = WeightSlot(
            self.output.weight,
            lambda rows: torch.cat([rows[first : first + codes], rows[end : end + 1]]),
            tuple(self.embedding.weight.shape),
        )
        return {
            "model.embed_tokens.weight": WeightSlot(self.embedding.weight),
            "lm_head.weight": head,
            **self.transformer.weight_slots("model.", norm_rows),
        }


class LuminaMGPT512(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 512 x 512 pixels."""

    variant = LUMINA_7B_512


class LuminaMGPT768(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 768 x 768 pixels."""

    variant = LUMINA_7B_768


class LuminaMGPT1024(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 1024 x 1024 pixels."""

    variant = LUMINA_7B_1024


def _sides(size: Any) -> tuple[int, int] | None:
    """Width and height, as whole numbers; None for what is no such pair."""
    sides = [whole(side) for side in size] if isinstance(size, Iterable) and not isinstance(size, str) else []
    width, height = sides if len(sides) == 2 else (None, None)
    return None if width is None or height is None else (width, height)


def _check_size(variant: LuminaVariant, size: tuple[int, int] | None) -> tuple[int, int]:
    legal = variant.sizes
    if size is None:
        return variant.target, variant.target
    sides = _sides(size)
    if sides is None:
        raise ArkvError(f"the size is {size!r:.60}: expected width and height in pixels, such as {legal[0]}")
    size = sides
    if size not in legal:
        near = sorted(legal, key=lambda s: abs(s[0] - size[0]) + abs(s[1] - size[1]))
        raise ArkvError(
            f"the size is {size}: {variant.name} was trained for sizes (width, height) such as "
            f"{', '.join(map(str, near[:3]))}"
        )
    return size


def _variant_of(source: str | Path | None, size: tuple[int, int] | None) -> LuminaVariant:
    """The model that a published repository or a size tells of."""
    told = (variant for variant in VARIANTS if source == variant.repository)
    sized = (variant for variant in VARIANTS if _sides(size) in variant.sizes)
    variant = next(told, None) or next(sized, None)
    if variant is None:
        raise CheckpointError(
            "nothing says which of the Lumina-mGPT models this is, and their files are alike: load it by its "
            f"name or class, or give a size that it was trained for, such as size={(VARIANTS[0].target,) * 2}"
        )
    return variant
