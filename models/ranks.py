"""A tokenizer from a file of ranks, as tiktoken has them, for models that come without a `tokenizer.json`.

Such a file has a line for every token: its bytes in base64, and its rank, which is its number. To merge by
ranks is byte-pair encoding, so the library that reads all other tokenizers can run it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arkv.errors import CheckpointError
from arkv.weights.files import check_content

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_LINES = 2**20
"""Bound of a file, beyond all that there are."""


def tokenizer_of_ranks(path: Path, pattern: str, special: Sequence[str]) -> Tokenizer:
    """Build the tokenizer.

    Args:
        path: the file of ranks.
        pattern: regular expression of what is encoded apart.
        special: names of further tokens, numbered on after the ranks.

    Raises:
        CheckpointError: the file is damaged, or has something else in it.
    """
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.decoders import ByteLevel as ByteDecoder
    from tokenizers.models import BPE
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import ByteLevel, Split
    from tokenizers.pre_tokenizers import Sequence as Steps

    ranks = read_ranks(path)
    letters = dict(zip(range(256), _alphabet(), strict=True))

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merges = [(spelled(first), spelled(second)) for first, second in _merges(ranks)]
    tokenizer = Tokenizer(BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = Steps(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteDecoder()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    return tokenizer


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are the numbers from 0 on.

    Raises:
        CheckpointError: as `tokenizer_of_ranks`.
    """
    ranks: dict[bytes, int] = {}
    for line, text in enumerate(read_lines(path)):
        token, _, rank = text.partition(" ")
        try:
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise CheckpointError(
                f"{path} is no file of ranks: line {line + 1} is {text[:60]!r}, expected base64 and a number"
            ) from None
    is_whole = all(bytes([one]) in ranks for one in range(256))
    if not is_whole or sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(
            f"{path} is damaged: its ranks are not the numbers from 0 on, or a byte has none"
        )
    return ranks


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    check_content(path)
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line]
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: it is no text in UTF-8 ({type(error).__name__})") from None
    if len(lines) > MOST_LINES:
        raise CheckpointError(f"{path} has {len(lines)} lines: expected {MOST_LINES} at most")
    return lines


def _merges(ranks: dict[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """For every token of more than a byte, in order: the two tokens that it is made of in the end."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) > 1:
            parts = _parts(token, rank, ranks)
            if len(parts) == 2:  # else no merge leads to it; it is found as a whole or not at all
                yield parts[0], parts[1]


def _parts(token: bytes, below: int, ranks: dict[bytes, int]) -> list[bytes]:
    """What is left of a token's bytes after all merges into tokens of lower ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        found = [
            (rank, i)
            for i in range(len(parts) - 1)
            if (rank := ranks.get(parts[i] + parts[i + 1], below)) < below
        ]
        if not found:
            break
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _alphabet() -> Iterator[str]:
    """The letters that stand for the 256 bytes in a byte-level vocabulary, since GPT-2."""
    plain = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    free = iter(range(256, 512))
    for byte in range(256):
        yield chr(byte if byte in plain else next(free))
