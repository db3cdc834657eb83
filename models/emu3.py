"""Emu3 8B (arXiv 2409.18869): text to pictures of about 720 x 720 or 512 x 512 pixels, of any ratio.

A Llama with grouped heads whose vocabulary has the codes of a film tokenizer in it. A picture begins with a
token that says so, then height and width in codes, written out in digits, then its lines of codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from typing_extensions import Self

from arkv.errors import CheckpointError, PromptError
from arkv.grid import Grid
from arkv.model import PicturesOnly
from arkv.models.emu3_checkpoint import (
    EMU3_GEN,
    EMU3_STAGE1,
    NEGATIVE_PROMPT,
    SMALL_FILES,
    SUFFIX,
    UNUSED,
    WEIGHT_FILES,
    Emu3Variant,
    Layout,
    check_told,
    find_decoder,
    image_area,
    layout_of,
    prefixes,
    read_decoder,
    read_variant,
    with_colours,
)
from arkv.models.emu3_tokens import Tokens, find_tokenizer
from arkv.models.one_vocabulary import MAX_TEXT, Form, OneVocabulary
from arkv.models.pretrained import Part, empty, load, pictures_only, place_of
from arkv.models.prompting import encode, shown, special_tokens, token_ids
from arkv.models.sizes import Size, check_size
from arkv.models.vq import UNUSED as VQ_UNUSED
from arkv.weights.files import place, weight_files
from arkv.weights.hub import fetch
from arkv.weights.quantization import WeightDtype

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GUIDANCE, TOP_K = 3.0, 2048


class Emu3(OneVocabulary):
    """Emu3: pictures of many shapes from a text.

    The authors' words for quality are put behind the prompt. The unconditional row is a negative prompt in
    the same frame, and so longer than the conditional row of most prompts. Height and width are given to the
    model as part of the condition. The line end is the only token allowed where a line ends, and allowed
    nowhere else; nothing is decoded after the last one.

    Defaults as in the authors' `image_generation.py`: guidance 3 on all visual tokens, the 2,048 likeliest
    codes, temperature 1.

    A prompt is a text; or a list of ids of text tokens, behind which nothing is put. Only the latter is
    possible without a tokenizer.

    Args:
        variant: which model.
        size: width and height of the pictures in pixels, one of `variant.sizes`; None for the square.
        tokenizer: of the published checkpoint.
        negative_prompt: what the unconditional row says, a text or ids of text tokens; None for what the
            authors have there.
        suffix: what is put behind every prompt; None for what the authors put there.

    Raises:
        ArkvError: the model was not trained for this size.
        PromptError: the negative prompt cannot be taken.
    """

    variant: ClassVar[Emu3Variant | None] = None
    """The one model that a subclass is; None where the checkpoint says which."""

    def __init__(
        self,
        variant: Emu3Variant,
        size: Size | None = None,
        tokenizer: Tokenizer | None = None,
        negative_prompt: str | Sequence[int] | None = None,
        suffix: str | None = None,
    ) -> None:
        self.size = check_size(size, variant.sizes, variant.square, variant.name)
        self.suffix = SUFFIX if suffix is None else suffix
        columns, rows = (side // variant.scale for side in self.size)
        codes, words = variant.vq.codes, variant.vocabulary
        tokens = variant.tokens if tokenizer is None else Tokens.of(tokenizer, codes, words)
        header = (tokens.image_start, *tokens.size(rows, columns), tokens.image)
        reserved = frozenset(range(tokens.padding, tokens.first_code))
        negative = _negative(negative_prompt, variant, tokenizer, reserved)
        super().__init__(
            variant,
            Form(
                tokens.begin,
                header,
                (tokens.begin, *negative, *header),
                tokens.line_end,
                tokens.first_code,
                reserved,
            ),
            Grid(rows, columns, newline=True),
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
        negative_prompt: str | Sequence[int] | None = None,
        suffix: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        weights: WeightDtype | None = None,
        lora: str | Path | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        Args:
            source: folder, or name of a repository on the hub, in the layout of BAAI or of transformers; None
                for the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32. Files in float32 are
                converted while they are read.
            device: where to put them. For the meta device no weight is read.
            size: width and height of the pictures in pixels; None for the square.
            decoder: folder or repository of `Emu3-VisionTokenizer`; None for a folder of this name in or
                beside the checkpoint's, else for the published one. The layout of transformers has it within.
            negative_prompt: what the unconditional row says; None for what the authors have there.
            suffix: what is put behind every prompt; None for what the authors put there.
            revision: of the repository.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
            MemoryLimitError: the device has not as much memory free as the weights take.
            ArkvError: the model was not trained for this size.
        """
        device, known = torch.device(device), cls.variant
        is_meta = device.type == "meta"
        build = partial(cls, size=size, negative_prompt=negative_prompt, suffix=suffix)
        if source is None and known is not None and is_meta:
            return empty(partial(build, known), dtype, device, weights)
        # What may be missing is looked for before the large files are downloaded.
        source, folder, variant, layout = cls._find(source, revision, token)
        if is_meta:
            return empty(partial(build, variant), dtype, device, weights)
        words = find_tokenizer(folder)
        variant, pictures = _pictures(variant, layout, decoder, folder, token)
        files = weight_files(fetch(source, WEIGHT_FILES, revision=revision, token=token))
        return load(
            partial(build, variant, tokenizer=words),
            dtype,
            device,
            lambda model: _parts(model, layout, files, pictures),
            weights,
            lora,
        )

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
        source, folder, variant, layout = cls._find(source, revision, token)
        variant, pictures = _pictures(variant, layout, decoder, folder, token)
        if layout == "transformers":  # it is in one file with everything else
            pictures = fetch(source, WEIGHT_FILES, revision=revision, token=token)
        files = weight_files(pictures)

        def part(model: Emu3) -> Part:
            vq = model.vq
            if layout == "baai":
                return Part(vq.weight_slots("emu3"), files, VQ_UNUSED)
            return Part(vq.weight_slots("emu3-transformers", prefixes(files)[2]), files, ["*"])

        return pictures_only(partial(cls, variant, size), device, part)

    @classmethod
    def _find(
        cls, source: str | Path | None, revision: str | None, token: str | None
    ) -> tuple[str | Path, Path, Emu3Variant, Layout]:
        """The place of a checkpoint, the folder with its small files, and which model is in it."""
        known = cls.variant
        source = place_of(source, known.repository if known else None, "a folder or BAAI/Emu3-Gen")
        folder = fetch(source, *SMALL_FILES, revision=revision, token=token)
        return source, folder, *read_variant(folder, known)

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this model in it, or a repository on the hub is its own.

        Raises:
            CheckpointError: it is of this family and cannot be loaded, or may be Emu3-Chat.
        """
        known = cls.variant
        if known is not None and source in (known.repository, *known.copies):
            return True
        folder = place(source)
        if layout_of(folder) is None:
            return False
        check_told(folder)
        # Where the file says no area, either model may be in it.
        variant, _ = read_variant(folder, known if image_area(folder) is None else None)
        return known is None or variant.name == known.name

    def sentence(self, prompt: str) -> str:
        """The prompt, and the words for quality."""
        return prompt + self.suffix


class Emu3Gen(Emu3):
    """Emu3-Gen: about 720 x 720 pixels from a text."""

    variant = EMU3_GEN


class Emu3Stage1(Emu3):
    """Emu3-Stage1: about 512 x 512 pixels from a text, before Emu3-Gen's further training."""

    variant = EMU3_STAGE1


def _parts(model: Emu3, layout: Layout, files: Sequence[Path], pictures: Path) -> Iterator[Part]:
    if layout == "baai":
        yield Part(model.weight_slots(), files, UNUSED)
        yield Part(model.vq.weight_slots("emu3"), weight_files(pictures), VQ_UNUSED)
    else:
        layers, head, decoder = prefixes(files)
        slots = model.weight_slots(layers, head) | model.vq.weight_slots("emu3-transformers", decoder)
        yield Part(slots, files, [f"{decoder}{pattern}" for pattern in VQ_UNUSED])


def _pictures(
    variant: Emu3Variant, layout: Layout, decoder: Path | str | None, folder: Path, token: str | None
) -> tuple[Emu3Variant, Path]:
    """A variant with its picture decoder's shape, and the folder of that."""
    if layout == "baai":
        pictures = find_decoder(decoder, folder, token)
        return read_decoder(variant, pictures), pictures
    if decoder is not None:
        raise CheckpointError(f"{folder} has a picture decoder in its weights: leave out decoder")
    return with_colours(variant, folder), folder


def _negative(
    prompt: str | Sequence[int] | None,
    variant: Emu3Variant,
    tokenizer: Tokenizer | None,
    reserved: frozenset[int],
) -> Sequence[int]:
    """Tokens of the negative prompt."""
    words = variant.vocabulary
    if prompt is None:
        if tokenizer is None:
            return variant.negative
        prompt = NEGATIVE_PROMPT
    if not isinstance(prompt, str):
        ids = token_ids(prompt, words)
    elif tokenizer is None:
        raise PromptError(
            f"{variant.name} has no tokenizer: load it from a checkpoint that has one, or give the negative "
            "prompt as a list of token ids"
        )
    else:
        ids = encode(tokenizer, prompt, prompt, special_tokens(tokenizer), words)
    if ids is None or len(ids) > MAX_TEXT or not all(number < min(reserved) for number in ids):
        raise PromptError(
            f"the negative prompt {shown(prompt)} is none: expected a text, or a list of ids of text tokens, "
            f"{MAX_TEXT} at most"
        )
    return ids
