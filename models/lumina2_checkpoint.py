"""Lumina-mGPT 2.0's checkpoints: which model there is, its tokens, and the files that they come in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from arkv.errors import CheckpointError
from arkv.models.lumina_checkpoint import (
    SEPARATOR,
    ChameleonVariant,
    chameleon_shape,
    chameleon_version,
    size_name,
)
from arkv.models.pretrained import CONFIG_FILE, TOKENIZER_FILE, read_tokenizer
from arkv.models.vq import MOVQ, VQConfig
from arkv.weights.files import is_file, read_config
from arkv.weights.hub import fetch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SMALL_FILES = (CONFIG_FILE, TOKENIZER_FILE, TOKENIZER_CONFIG_FILE)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

DECODER_REPOSITORY, DECODER_FILE = "ai-forever/MoVQGAN", "movqgan_270M.ckpt"

OMNI = "Alpha-VLLM/Lumina-mGPT-2.0-Omni"
"""A relative of the same shape, for more than pictures from text."""

END = "<|endoftext|>"
"""What begins every row where the files do not say: the tokenizer has no token for it, and its end of text is
put there."""

CODES_PER_CELL = 4
"""Codes along each side of a cell of 32 x 32 pixels."""


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens that give a sequence its form.

    The authors' code has the first code, the beginning of a picture and the line end as numbers. It looks the
    others up by their names, so the defaults of these are stand-ins, for models without a tokenizer; they are
    read from the tokenizer of a checkpoint.

    Attributes:
        first_code: the picture code 0; the others follow in order.
        image_start: begins a picture.
        line_end: ends a line of picture codes.
        begin: begins every sequence.
        separator: ends what the user says.
        sizes: a side of so many cells, from 0 on.
    """

    first_code: int = 155_000
    image_start: int = 151_665
    line_end: int = 151_670
    begin: int = 151_643
    separator: int = 154_999
    sizes: tuple[int, ...] = tuple(range(151_671, 151_671 + 2 * 24 + 1))

    def of(self, tokenizer: Tokenizer, begin: str) -> Tokens:
        """The same, with those looked up that have no fixed number.

        Args:
            tokenizer: of the checkpoint.
            begin: name of the token that begins every sequence.

        Raises:
            CheckpointError: a token is missing, or has another number than it has to have.
        """
        fixed = {"<racm3:break>": self.image_start, "<reserved08799>": self.line_end}
        sizes = [size_name(cells) for cells in range(len(self.sizes))]
        asked = {name: tokenizer.token_to_id(name) for name in (begin, SEPARATOR, *fixed, *sizes)}
        found = {name: number for name, number in asked.items() if number is not None}
        for name in asked:
            if name not in found:
                raise CheckpointError(f"the tokenizer has no token {name}: it is not Lumina-mGPT 2.0's")
            if name in fixed and found[name] != fixed[name]:
                raise CheckpointError(
                    f"the tokenizer gives {name} the number {found[name]}: expected {fixed[name]}; it is "
                    "another model's"
                )
        return replace(
            self,
            begin=found[begin],
            separator=found[SEPARATOR],
            sizes=tuple(found[name] for name in sizes),
        )


TOKENS = Tokens()


@dataclass(frozen=True)
class Lumina2Variant(ChameleonVariant):
    """One of the models of the family.

    Attributes:
        tokens: the ids that matter.
    """

    vocabulary: int = 171_385
    vq: VQConfig = MOVQ
    tokens: Tokens = TOKENS


LUMINA_2 = Lumina2Variant("lumina-mgpt-2", 768, "Alpha-VLLM/Lumina-mGPT-2.0")


def read_variant(folder: Path, variant: Lumina2Variant) -> Lumina2Variant:
    """A variant with the vocabulary that the configuration in a folder tells of.

    Raises:
        CheckpointError: it is the configuration of another model.
    """
    words, theta, _ = chameleon_shape(folder, variant.transformer, variant.vocabulary)
    tokens = variant.tokens
    last = max(tokens.first_code + variant.vq.codes - 1, tokens.image_start, tokens.line_end)
    if last >= words:
        told = "it is of Lumina-mGPT 1" if chameleon_version(folder) == 1 else "it is another model's"
        raise CheckpointError(
            f"{folder} has a vocabulary of {words} tokens, and the last code the number {last}: {told}"
        )
    return replace(variant, vocabulary=words, rope_theta=theta)


def find_tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer in a folder, and the name of its token for the end of a text.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path, name = folder / TOKENIZER_CONFIG_FILE, END
    if is_file(path):
        token = read_config(path).get("eos_token", END)
        name = str(token.get("content") if isinstance(token, dict) else token)
    return read_tokenizer(folder), name


def find_decoder(source: str | Path | None, folder: Path, token: str | None) -> Path:
    """The file of the picture decoder's weights.

    Args:
        source: file, folder or repository; None for the published name in the checkpoint's folder, else for
            the published repository.
        folder: of the checkpoint.
        token: for the hub.

    Raises:
        CheckpointError: there is none.
    """
    if source is None:
        source = folder if is_file(folder / DECODER_FILE) else DECODER_REPOSITORY
    path = fetch(source, (DECODER_FILE,), token=token)
    file = path if is_file(path) else path / DECODER_FILE
    if not is_file(file):
        raise CheckpointError(
            f"there is no {DECODER_FILE} in {path}: take it from {DECODER_REPOSITORY}, and say where it is "
            "with decoder=..."
        )
    return file
