"""The tokens of Emu3 and Emu3.5: what they mean, and the files that tell of them.

The text is Qwen's, byte by byte. Behind it come the tokens that give a sequence its form, and the codes of
pictures, of which Emu3.5 has more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Self

from arkv.errors import CheckpointError
from arkv.models.pretrained import TOKENIZER_FILE, read_tokenizer
from arkv.models.ranks import read_lines, tokenizer_of_ranks
from arkv.weights.files import is_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer

RANKS_FILE, VISION_FILE = "emu3.tiktoken", "emu3_vision_tokens.txt"

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
"""What the tokenizer encodes apart."""

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
"""Names of the tokens that follow the ranks; those of the file of vision tokens follow them."""


ANSWER = "<|extra_100|>"


def code_name(code: int) -> str:
    """The name of a picture code in the vocabulary."""
    return f"<|visual token {code:06d}|>"


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens that give a sequence its form; the defaults are the published ones.

    Attributes:
        padding: the first token that is no text; all others up to the codes are none either.
        line_end: ends a line of picture codes.
        begin: begins every sequence.
        image: ends the size; codes follow.
        image_start: begins a picture; its size follows.
        first_code: the picture code 0; the others follow in order.
        star: stands between height and width.
        digits: from 0 to 9.
    """

    padding: int = 151643
    line_end: int = 151846
    begin: int = 151849
    image: int = 151851
    image_start: int = 151852
    first_code: int = 151854
    star: int = 9
    digits: tuple[int, ...] = tuple(range(15, 25))

    @classmethod
    def of(cls, tokenizer: Tokenizer, codes: int, words: int) -> Self:
        """Look the tokens up by their names.

        Args:
            tokenizer: of the checkpoint.
            codes: how many picture codes there have to be.
            words: rows of the model's embedding.

        Raises:
            CheckpointError: a token is missing, codes are not in order or not as many, or the model has not
                so many tokens.
        """
        names = {
            "padding": SPECIAL[0],
            "line_end": "<|extra_200|>",
            "begin": "<|extra_203|>",
            "image": "<|image token|>",
            "image_start": "<|image start|>",
            "first_code": code_name(0),
            "star": "*",
        }
        wanted = [*names.values(), *"0123456789", *map(code_name, range(codes))]
        asked = {name: tokenizer.token_to_id(name) for name in wanted}
        found = {name: number for name, number in asked.items() if number is not None}
        if absent := [name for name in wanted if name not in found]:
            raise CheckpointError(f"the tokenizer has no token {absent[0]}: it is not Emu3's")
        if tokenizer.token_to_id(code_name(codes)) is not None:
            raise CheckpointError(
                f"the tokenizer has more picture codes than the {codes} of the model: it is another model's"
            )
        first = found[code_name(0)]
        if [found[code_name(code)] for code in range(codes)] != list(range(first, first + codes)):
            raise CheckpointError("the tokenizer has the picture codes in another order: it is not Emu3's")
        if (last := max(found.values())) >= words:
            raise CheckpointError(
                f"the tokenizer has a token of the number {last}, and the model has {words} of them: they "
                "belong to two models"
            )
        ids: dict[str, Any] = {field: found[name] for field, name in names.items()}
        return cls(**ids, digits=tuple(found[digit] for digit in "0123456789"))

    def size(self, rows: int, columns: int) -> list[int]:
        """The tokens of a size: height, star, width, in codes and decimal digits."""
        height, width = ([self.digits[int(digit)] for digit in str(side)] for side in (rows, columns))
        return [*height, self.star, *width]


@dataclass(frozen=True)
class AnswerTokens(Tokens):
    """Those of Emu3.5, which answers what a user says.

    Attributes:
        answer: begins the answer.
    """

    answer: int = 151746

    @classmethod
    def of(cls, tokenizer: Tokenizer, codes: int, words: int) -> Self:
        """As `Tokens.of`."""
        found, answer = super().of(tokenizer, codes, words), tokenizer.token_to_id(ANSWER)
        if answer is None:
            raise CheckpointError(f"the tokenizer has no token {ANSWER}: it is not Emu3.5's")
        return replace(found, answer=answer)


TOKENS = Tokens()
"""The published ones."""


def find_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a folder, in the form of either layout.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if is_file(folder / RANKS_FILE):
        if not is_file(folder / VISION_FILE):
            raise CheckpointError(
                f"{folder} has no {VISION_FILE}: copy it from the repository of the weights"
            )
        return tokenizer_of_ranks(folder / RANKS_FILE, SPLIT, (*SPECIAL, *read_lines(folder / VISION_FILE)))
    if not is_file(folder / TOKENIZER_FILE):
        raise CheckpointError(
            f"{folder} has no tokenizer: copy {RANKS_FILE} and {VISION_FILE}, or {TOKENIZER_FILE}, from the "
            "repository of the weights"
        )
    return read_tokenizer(folder)
