"""Lumina-mGPT 7B (arXiv 2408.02657): text to pictures of many shapes, on the architecture of Chameleon.

One sequence of text and picture tokens from one vocabulary. A picture begins with a token that says so, then
the height and the width in cells of 32 x 32 pixels, then its codes, two lines of them a cell; every line ends
in a token of its own.
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
    chameleon_version,
    find_vqgan,
    norm_rows,
    read_variant,
    tokenizer_for,
)
from arkv.models.one_vocabulary import Form, OneVocabulary
from arkv.models.pretrained import CONFIG_FILE, TOKENIZER_FILE, Part, empty, load, pictures_only
from arkv.models.sizes import check_size, sides
from arkv.weights.files import is_file, place, weight_files
from arkv.weights.hub import fetch, is_hub_id
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GUIDANCE, TOP_K = 4.0, 2000

PROMPT = "Generate an image of {width}x{height} according to the following prompt:\n{prompt}"


class LuminaMGPT(OneVocabulary):
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
        self.size = check_size(size, variant.sizes, (variant.target,) * 2, variant.name)
        width, height = (side // CELL for side in self.size)
        tokens = variant.tokens
        picture = (tokens.image_start, tokens.first_size + height, tokens.first_size + width)
        form = Form(
            tokens.begin,
            (tokens.separator, *picture),
            picture,
            tokens.line_end,
            tokens.first_code,
            frozenset((tokens.begin, tokens.image_start, tokens.separator, tokens.line_end)),
        )
        super().__init__(
            variant,
            form,
            Grid(2 * height, 2 * width, newline=True),
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
            rows = norm_rows(files, model.spec.heads)
            yield Part(model.weight_slots(norm_rows=rows), files, UNUSED)
            yield model.picture_weights(decoder)

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
            lambda model: model.picture_weights(decoder),
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
        if chameleon_version(folder) != 1:
            return False
        read_variant(folder, cls.variant or VARIANTS[0])
        return True

    def sentence(self, prompt: str) -> str:
        """The sentence of the training, which names the size."""
        return PROMPT.format(width=self.size[0], height=self.size[1], prompt=prompt)


class LuminaMGPT512(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 512 x 512 pixels."""

    variant = LUMINA_7B_512


class LuminaMGPT768(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 768 x 768 pixels."""

    variant = LUMINA_7B_768


class LuminaMGPT1024(LuminaMGPT):
    """Lumina-mGPT 7B for pictures of about 1024 x 1024 pixels."""

    variant = LUMINA_7B_1024


def _variant_of(source: str | Path | None, size: tuple[int, int] | None) -> LuminaVariant:
    """The model that a published repository or a size tells of."""
    told = (variant for variant in VARIANTS if source == variant.repository)
    sized = (variant for variant in VARIANTS if sides(size) in variant.sizes)
    variant = next(told, None) or next(sized, None)
    if variant is None:
        raise CheckpointError(
            "nothing says which of the Lumina-mGPT models this is, and their files are alike: load it by its "
            f"name or class, or give a size that it was trained for, such as size={(VARIANTS[0].target,) * 2}"
        )
    return variant
