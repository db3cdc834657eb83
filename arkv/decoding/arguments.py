"""What callers of a decoder bring, as it is used inside; what cannot be is refused in one line."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any

import numpy
import torch
from torch import Tensor

from arkv.errors import ArkvError
from arkv.pictures.prompts import single_spaced
from arkv.scalars import plain


def prompt_list(prompts: Any) -> list[Any]:
    """Prompts as a list, whatever gives them one by one, in the form that lists in files have.

    Raises:
        ArkvError: they are one text, none, or no collection at all.
    """
    if isinstance(prompts, (str, bytes)):
        raise ArkvError("prompts is one text: expected a list of them, such as ['a red circle']")
    if isinstance(prompts, dict) or not isinstance(prompts, Iterable) or getattr(prompts, "ndim", 1) == 0:
        raise ArkvError(f"prompts is {prompts!r}: expected a list of them")
    given = [plain(prompt) for prompt in prompts]
    given = [single_spaced(prompt) if isinstance(prompt, str) else prompt for prompt in given]
    if not given:
        raise ArkvError("the list of prompts is empty: give at least one")
    return given


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
    if isinstance(seeds, (str, bytes)) or not isinstance(seeds, Iterable) or getattr(seeds, "ndim", 1) == 0:
        raise ArkvError(f"seeds is {seeds!r}: expected a list, one seed a prompt; or take seed={seeds!r}")
    given = [plain(one) for one in seeds]
    if len(given) != count:
        raise ArkvError(f"{len(given)} seeds for {count} prompts: give one seed a prompt")
    return [one_seed(one) for one in given]


def one_seed(seed: Any) -> int:
    """A seed as a number of Python, or an `ArkvError`."""
    whole = hasattr(seed, "__index__") and not isinstance(seed, (bool, Tensor, numpy.ndarray))
    if not whole or not 0 <= index(seed) < 2**64:
        raise ArkvError(f"seed {seed!r}: expected a whole number from 0 to 2^64 - 1")
    return index(seed)


def check_batch_size(size: Any) -> Any:
    """A number of pictures, "auto" or None; else an `ArkvError`."""
    size = plain(size)
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if not whole and size not in ("auto", None):
        raise ArkvError(f"batch_size is {size!r}: expected a whole number, at least 1, or 'auto'")
    return size


def check_window(window: Any) -> int:
    """A number of tokens, or an `ArkvError`."""
    window = plain(window)
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ArkvError(f"window is {window!r}: expected a whole number of tokens, at least 1")
    return window


def forced_tokens(tokens: Any, pictures: int, total: int, vocabulary: int) -> Tensor:
    """Tokens to decode, as a tensor of whole numbers `[pictures, N]`.

    Raises:
        ArkvError: they have another shape or are outside the vocabulary.
    """
    tokens = torch.as_tensor(tokens)
    if tuple(tokens.shape) != (pictures, total):
        raise ArkvError(
            f"tokens have shape {list(tokens.shape)}: expected {[pictures, total]}, a picture a prompt"
        )
    fractions = tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool
    if fractions or int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise ArkvError(f"tokens must be whole numbers from 0 to {vocabulary - 1}")
    return tokens
