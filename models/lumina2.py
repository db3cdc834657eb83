"""Lumina-mGPT 2.0 (arXiv 2507.17801): text to pictures of about 768 x 768 pixels, of many shapes.

The architecture and the sentences of Lumina-mGPT, trained from scratch on Qwen's vocabulary. A cell of 32 x
32 pixels, the unit of sizes, has four lines of four codes in place of two.
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
from arkv.models.lumina import PROMPT
from arkv.models.lumina2_checkpoint import (
    CODES_PER_CELL,
    LUMINA_2,
    OMNI,
    SMALL_FILES,
    WEIGHT_FILES,
    Lumina2Variant,
    find_decoder,
    find_tokenizer,
    read_variant,
)
from arkv.models.lumina_checkpoint import CELL, UNUSED, chameleon_version, norm_rows
from arkv.models.one_vocabulary import Form, OneVocabulary
from arkv.models.pretrained import Part, empty, load, pictures_only, place_of
from arkv.models.sizes import Size, check_size
from arkv.weights.files import place, weight_files
from arkv.weights.hub import fetch
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GUIDANCE, TOP_K = 4.0, 4096


class LuminaMGPT2(OneVocabulary):
    """Lumina-mGPT 2.0: pictures of about 768 x 768 pixels from a text.

    The prompt is put into the sentence that the model was trained on, which names the size. What the model
    would then write itself, the tokens that begin a picture and say its size, is given to it as part of the
    condition. The unconditional row is these three tokens alone. The line end is the only token allowed where
    a line ends, and allowed nowhere else; nothing is decoded after the last one.

    Defaults as in the authors' README: guidance 4 on all visual tokens, the 4,096 likeliest codes,
    temperature 1. Their program lets a higher guidance fall to 4 within the first lines, and lifts a lower
    one to 4; here it stays what it is.

    A prompt is a text; or a list of ids of text tokens, which is taken as the whole text instead of the
    sentence. Only the latter is possible without a tokenizer.

    Args:
        variant: which model.
        size: width and height of the pictures in pixels, one of `variant.sizes`; None for the square.
        tokenizer: of the published checkpoint.
        begin: name of the token that begins every row; with a tokenizer only.

    Raises:
        ArkvError: the model was not trained for this size.
    """

    variant: ClassVar[Lumina2Variant] = LUMINA_2

    rounding = "even"

    def __init__(
        self,
        variant: Lumina2Variant = LUMINA_2,
        size: Size | None = None,
        tokenizer: Tokenizer | None = None,
        begin: str = "",
    ) -> None:
        self.size = check_size(size, variant.sizes, (variant.target,) * 2, variant.name)
        width, height = (side // CELL for side in self.size)
        tokens = variant.tokens if tokenizer is None else variant.tokens.of(tokenizer, begin)
        picture = (tokens.image_start, tokens.sizes[height], tokens.sizes[width])
        form = Form(
            tokens.begin,
            (tokens.separator, *picture),
            picture,
            tokens.line_end,
            tokens.first_code,
            frozenset((tokens.begin, tokens.image_start, tokens.separator, tokens.line_end, *tokens.sizes)),
        )
        super().__init__(
            variant,
            form,
            Grid(CODES_PER_CELL * height, CODES_PER_CELL * width, newline=True),
            guidance=GUIDANCE,
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
        """Load the published checkpoint, or a finetuned one in the same layout.

        Args:
            source: folder with `config.json`, `tokenizer.json` and the safetensors, or name of a repository
                on the hub; None for the published one.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no weight is read.
            size: width and height of the pictures in pixels; None for the square.
            decoder: `movqgan_270M.ckpt`, or a folder or repository with it; None for the one in the folder,
                else for the published one.
            revision: of the repository.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            MemoryLimitError: the device has not as much memory free as the weights take.
            ArkvError: the model was not trained for this size.
        """
        device, is_meta = torch.device(device), torch.device(device).type == "meta"
        if source is None and is_meta:
            return empty(partial(cls, cls.variant, size), dtype, device, weights)
        source = place_of(source, cls.variant.repository, "a folder")
        _check_repository(source)
        # What may be missing is looked for before the large files are downloaded.
        folder = fetch(source, SMALL_FILES, revision=revision, token=token)
        variant = read_variant(folder, cls.variant)
        if is_meta:
            return empty(partial(cls, variant, size), dtype, device, weights)
        words, begin = find_tokenizer(folder)
        pictures = find_decoder(decoder, folder, token)
        files = weight_files(fetch(source, WEIGHT_FILES, revision=revision, token=token))

        def parts(model: LuminaMGPT2) -> Iterator[Part]:
            rows = norm_rows(files, model.spec.heads)
            yield Part(model.weight_slots(norm_rows=rows), files, UNUSED)
            yield model.picture_weights(pictures)

        return load(partial(cls, variant, size, words, begin), dtype, device, parts, weights, lora)

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
        source = place_of(source, cls.variant.repository, "a folder")
        _check_repository(source)
        folder = fetch(source, SMALL_FILES, revision=revision, token=token)
        variant, file = read_variant(folder, cls.variant), find_decoder(decoder, folder, token)
        return pictures_only(
            partial(cls, variant, size),
            device,
            lambda model: model.picture_weights(file),
        )

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this family in it, or a repository on the hub is its own.

        Raises:
            CheckpointError: it is of this family and cannot be loaded, or is a relative.
        """
        if source == cls.variant.repository:
            return True
        _check_repository(source)
        folder = place(source)
        if chameleon_version(folder) != 2:
            return False
        read_variant(folder, cls.variant)
        return True

    def sentence(self, prompt: str) -> str:
        """The sentence of the training, which names the size."""
        return PROMPT.format(width=self.size[0], height=self.size[1], prompt=prompt)


def _check_repository(source: str | Path) -> None:
    if source == OMNI:
        raise CheckpointError(
            f"{source} is made for more than pictures from text, in sentences that are not here: take "
            f"{LUMINA_2.repository}"
        )
