"""Emu3.5 34B (arXiv 2510.26583): text to pictures of about 1024 x 1024 pixels.

Emu3 grown: queries and keys are normalised, a code is 16 x 16 pixels, and what the user says stands in a turn
of a conversation. Lines are joined by their ends, so the last has none: what stands there ends the picture.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import Self

from arkv.errors import CheckpointError
from arkv.grid import Grid
from arkv.model import PicturesOnly
from arkv.models.emu3_checkpoint import find_decoder
from arkv.models.emu3_tokens import AnswerTokens, find_tokenizer
from arkv.models.emu35_checkpoint import (
    DECODER_FILES,
    DECODER_REPOSITORY,
    EMU35,
    EMU35_IMAGE,
    SMALL_FILES,
    UNUSED,
    WEIGHT_FILES,
    Emu35Variant,
    decoder_weights,
    is_emu35,
    read_decoder,
    read_variant,
)
from arkv.models.one_vocabulary import Form, OneVocabulary
from arkv.models.pretrained import Part, empty, load, pictures_only, place_of
from arkv.models.sizes import Size, check_size
from arkv.weights.files import place, weight_files
from arkv.weights.hub import fetch
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOP_K = 5120

PROMPT = "You are a helpful assistant for t2i task. USER: {prompt} ASSISTANT: "
UNCONDITIONAL = "You are a helpful assistant. USER:  ASSISTANT: "


class Emu35(OneVocabulary):
    """Emu3.5: pictures of eight shapes from a text.

    The prompt is put into the sentence that the model was trained on. The unconditional row is a sentence
    without the words for the task and without a prompt. The tokens that begin a picture and say its size are
    given to the model; its authors' program lets it write text before them. The line end is the only token
    allowed where a line ends, and allowed nowhere else; nothing is decoded after the last one.

    Defaults as in the authors' examples: guidance 5, or 2 for the base model, on all visual tokens, the 5,120
    likeliest codes, temperature 1.

    A prompt is a text; or a list of ids of text tokens, which is taken as the whole text instead of the
    sentence. Only the latter is possible without a tokenizer.

    Args:
        variant: which model.
        size: width and height of the pictures in pixels, one of `variant.sizes`; None for the square.
        tokenizer: of the published checkpoint.

    Raises:
        ArkvError: the model was not trained for this size.
    """

    variant: ClassVar[Emu35Variant | None] = None
    """The one model that a subclass is; None where nothing but the repository says which."""

    def __init__(
        self, variant: Emu35Variant, size: Size | None = None, tokenizer: Tokenizer | None = None
    ) -> None:
        self.size = check_size(size, variant.sizes, variant.sizes[0], variant.name)
        columns, rows = (side // variant.vq.scale for side in self.size)
        codes, words = variant.vq.codes, variant.vocabulary
        tokens, unconditional = variant.tokens, list(variant.unconditional)
        if tokenizer is not None:
            tokens = AnswerTokens.of(tokenizer, codes, words)
            unconditional = tokenizer.encode(UNCONDITIONAL, add_special_tokens=False).ids
        header = (tokens.answer, tokens.image_start, *tokens.size(rows, columns), tokens.image)
        super().__init__(
            variant,
            Form(
                tokens.begin,
                header,
                (tokens.begin, *unconditional, *header),
                tokens.line_end,
                tokens.first_code,
                frozenset(range(tokens.padding, tokens.first_code)),
            ),
            Grid(rows, columns, newline=True),
            guidance=variant.guidance,
            top_k=TOP_K,
            tokenizer=tokenizer,
        )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        size: Size | None = None,
        decoder: Path | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        weights: WeightDtype | None = None,
        lora: str | Path | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        The two models differ in nothing but their weights, so which one it is follows from the class.

        Args:
            source: folder, or name of a repository on the hub; None for the repository of this class's
                variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no weight is read.
            size: width and height of the pictures in pixels; None for the square.
            decoder: folder or repository of `Emu3.5-VisionTokenizer`; None for a folder of this name in or
                beside the checkpoint's, else for the published one.
            revision: of the repository.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            MemoryLimitError: the device has not as much memory free as the weights take.
            ArkvError: the model was not trained for this size.
        """
        device, known = torch.device(device), cls._known()
        if source is None and device.type == "meta":
            return empty(partial(cls, known, size), dtype, device, weights)
        source = place_of(source, known.repository, "a folder")
        # What may be missing is looked for before the large files are downloaded.
        folder = fetch(source, SMALL_FILES, revision=revision, token=token)
        variant = read_variant(folder, known)
        if device.type == "meta":
            return empty(partial(cls, variant, size), dtype, device, weights)
        words = find_tokenizer(folder)
        pictures = find_decoder(decoder, folder, token, DECODER_REPOSITORY, DECODER_FILES)
        variant = read_decoder(variant, pictures)
        files = weight_files(fetch(source, WEIGHT_FILES, revision=revision, token=token))

        def parts(model: Emu35) -> Iterator[Part]:
            yield Part(model.weight_slots(), files, UNUSED)
            yield model.picture_weights(decoder_weights(pictures))

        return load(partial(cls, variant, size, words), dtype, device, parts, weights, lora)

    @classmethod
    def load_picture_decoder(
        cls,
        source: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        size: Size | None = None,
        decoder: Path | str | None = None,
        revision: str | None = None,
        token: str | None = None,
        **others: Any,
    ) -> PicturesOnly:
        """Load the picture decoder and nothing else; arguments and errors as for `from_pretrained`."""
        known = cls._known()
        folder = fetch(
            place_of(source, known.repository, "a folder"), SMALL_FILES, revision=revision, token=token
        )
        pictures = find_decoder(decoder, folder, token, DECODER_REPOSITORY, DECODER_FILES)
        variant, file = read_decoder(read_variant(folder, known), pictures), decoder_weights(pictures)
        return pictures_only(
            partial(cls, variant, size),
            device,
            lambda model: model.picture_weights(file),
        )

    @classmethod
    def _known(cls) -> Emu35Variant:
        if cls.variant is None:
            raise CheckpointError(
                f"nothing says which of {EMU35_IMAGE.name} and {EMU35.name} this is, and their files are "
                "alike: load it by its name or class"
            )
        return cls.variant

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this family in it, or a repository on the hub is this model's.

        Nothing in a folder tells the models apart, so either may be in it.

        Raises:
            CheckpointError: it is of this family and cannot be loaded.
        """
        if cls.variant is not None and source == cls.variant.repository:
            return True
        folder = place(source)
        if not is_emu35(folder):
            return False
        read_variant(folder, cls.variant or EMU35_IMAGE)
        return True

    def sentence(self, prompt: str) -> str:
        """The sentence of the training."""
        return PROMPT.format(prompt=prompt)


class Emu35Image(Emu35):
    """Emu3.5-Image: about 1024 x 1024 pixels from a text."""

    variant = EMU35_IMAGE


class Emu35Base(Emu35):
    """Emu3.5, the base model: about 1024 x 1024 pixels from a text."""

    variant = EMU35
