"""What callers of a decoder bring, as it is used inside; what cannot be is refused in one line."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any, TypeGuard

import numpy
import torch
from torch import Tensor

from arkv.errors import ArkvError
from arkv.pictures.prompts import single_spaced
from arkv.scalars import MOST, brief, plain


def prompt_list(prompts: Any) -> list[Any]:
    """Prompts as a list, whatever gives them one by one, in the form that lists in files have.

    Raises:
        ArkvError: they are one text, none, or no collection at all.
    """
    if isinstance(prompts, (str, bytes)):
        raise ArkvError("prompts is one text: expected a list of them, such as ['a red circle']")
    if isinstance(prompts, dict) or not is_list(prompts):
        raise ArkvError(f"prompts is {brief(prompts)}: expected a list of them")
    given = [plain(prompt) for prompt in prompts]
    given = [single_spaced(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    if not given:
        raise ArkvError("the list of prompts is empty: give at least one")
    return given


def is_list(value: object) -> TypeGuard[Iterable[Any]]:
    """Whether something gives items one by one, and is not a text or a number of numpy or torch."""
    is_one = isinstance(value, (str, bytes)) or getattr(value, "ndim", 1) == 0
    return isinstance(value, Iterable) and not is_one


def seed_list(seeds: Any, seed: Any, count: int) -> list[int]:
    """One seed a prompt.

    Args:
        seeds: one a prompt, from any collection of whole numbers, or None.
        seed: of the first prompt, if there are no `seeds`; the others get those after it. None for 0.
        count: prompts.

    Raises:
        ArkvError: there are too few or too many, both are given, or one is no seed.
    """
    if seeds is None:
        first = 0 if seed is None else one_seed(plain(seed))
        return [one_seed(first + number) for number in range(count)]
    if seed is not None:
        raise ArkvError("both seed and seeds are given: seeds has one a prompt, seed is the first prompt's")
    if not is_list(seeds):
        raise ArkvError(
            f"seeds is {brief(seeds)}: expected a list, one seed a prompt; or take seed={brief(seeds)}"
        )
    given = [plain(one) for one in seeds]
    if len(given) != count:
        raise ArkvError(f"{len(given)} seeds for {count} prompts: give one seed a prompt")
    return [one_seed(one) for one in given]


def one_seed(seed: Any) -> int:
    """A seed as a number of Python, or an `ArkvError`."""
    whole = hasattr(seed, "__index__") and not isinstance(seed, (bool, Tensor, numpy.ndarray))
    if not whole or not 0 <= index(seed) < 2**64:
        raise ArkvError(f"seed {brief(seed)}: expected a whole number from 0 to 2^64 - 1")
    return index(seed)


def check_batch_size(size: Any) -> Any:
    """A number of pictures, "auto" or None; else an `ArkvError`."""
    size = plain(size)
    whole = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= MOST
    if not (whole or size is None or (isinstance(size, str) and size == "auto")):
        raise ArkvError(f"batch_size is {brief(size)}: expected a whole number, at least 1, or 'auto'")
    return size


def check_window(window: Any) -> Any:
    """A number of tokens or "auto"; else an `ArkvError`."""
    window = plain(window)
    whole = isinstance(window, int) and not isinstance(window, bool) and 1 <= window <= MOST
    if not whole and not (isinstance(window, str) and window == "auto"):
        raise ArkvError(
            f"window is {brief(window)}: expected a whole number of tokens, at least 1, or 'auto'"
        )
    return window


def forced_tokens(tokens: Any, pictures: int, total: int, vocabulary: int) -> Tensor:
    """Tokens to decode, as a tensor of whole numbers `[pictures, N]`.

    Raises:
        ArkvError: they have another shape or are outside the vocabulary.
    """
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ArkvError(f"tokens is {brief(tokens)}: expected whole numbers {[pictures, total]}") from None
    if tuple(tokens.shape) != (pictures, total):
        raise ArkvError(
            f"tokens have shape {list(tokens.shape)}: expected {[pictures, total]}, a picture a prompt"
        )
    fractions = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if fractions or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ArkvError(f"tokens must be whole numbers from 0 to {vocabulary - 1}")
    return tokens
