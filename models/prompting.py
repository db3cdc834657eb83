"""What the families have in common when a prompt becomes tokens.

One rule for all: a prompt is text. No part of it is read as a special token; a text that has the name of one
in it is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from arkv.errors import PromptError
from arkv.scalars import brief, whole

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def shown(prompt: object) -> str:
    """A prompt as a message quotes it: short, and printable whatever is in it."""
    if isinstance(prompt, str):
        text = repr(prompt) if prompt.isprintable() else ascii(prompt)
    else:
        text = brief(prompt)
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def check_text(prompt: str) -> None:
    """Refuse a text with half a character.

    Raises:
        PromptError: it has a lone surrogate, as a byte that is not UTF-8 becomes on a command line.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the prompt {shown(prompt)} has at place {error.start} what is no character: give it as UTF-8"
        ) from None


UNKNOWN = ("<unk>", "[UNK]")
"""Names of the token that stands for whatever a tokenizer does not know: it comes of ordinary text, too."""


def special_tokens(tokenizer: Tokenizer, names: Sequence[str] = ()) -> frozenset[int]:
    """Ids of the tokens that are no text: those marked as special, and those with names in angle brackets.

    Args:
        tokenizer: of the model.
        names: of tokens that give a prompt its form, marked or not.
    """
    forms = {number for name in names if (number := tokenizer.token_to_id(name)) is not None}
    return frozenset(forms).union(
        number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if (token.special or (token.content.startswith("<") and token.content.endswith(">")))
        and token.content not in UNKNOWN
    )


def encode(tokenizer: Tokenizer, text: str, prompt: str, special: Collection[int], words: int) -> list[int]:
    """Ids of a text, without the tokens that a tokenizer puts around it.

    Args:
        tokenizer: of the model.
        text: the prompt itself, or with what stands around it.
        prompt: the prompt, for what it has in it and for messages.
        special: ids that are no text.
        words: rows of the model's embedding.

    Raises:
        PromptError: the prompt has a special token in it, or the text a token that the model has not.
    """
    check_text(prompt)
    try:
        ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False).ids
        found = [tokenizer.id_to_token(number) for number in ids if number in special]
        found += [name for name in UNKNOWN if name in prompt and tokenizer.token_to_id(name) is not None]
        if found:
            raise PromptError(
                f"the prompt {shown(prompt)} has a token in it that is not text, {found[0]}: leave it out"
            )
        if text != prompt:
            ids = tokenizer.encode(text, add_special_tokens=False).ids
    except PromptError:
        raise
    except Exception as error:  # the library raises bare ones
        told = " ".join(str(error).split())
        raise PromptError(f"the prompt {shown(prompt)} cannot be made tokens: {told}") from None
    if beyond := [number for number in ids if number >= words]:
        raise PromptError(
            f"the prompt {shown(prompt)} has a token of the number {beyond[0]}, and the model has {words} of "
            "them: its tokenizer is another model's"
        )
    return ids


def token_ids(prompt: Any, words: int) -> list[int] | None:
    """A prompt that is a list of token ids, also an array or a tensor; None where it is none.

    Args:
        prompt: whatever was given for one.
        words: rows of the model's embedding.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if not isinstance(prompt, Sequence) or isinstance(prompt, (str, bytes)):
        return None
    ids = [number for one in prompt if not isinstance(one, float) and (number := whole(one)) is not None]
    return ids if len(ids) == len(prompt) and all(0 <= number < words for number in ids) else None
