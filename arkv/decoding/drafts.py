"""Drafts: which of them were right, and what is guessed of tokens that have never been drawn."""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.grid import Grid


def accept_(tokens: Tensor, at: Tensor, places: Tensor, drawn: Tensor, stop: Tensor, grid: Grid) -> Tensor:
    """Put draws where they belong, and move every picture on to its last accepted token.

    Args:
        tokens: int64 `[pictures, N]`; up to `at` accepted, behind it drafts. Written in place.
        at: int64 `[pictures]`; written in place.
        places: int64 `[pictures, K]`, of the tokens that were fed.
        drawn: int64 `[pictures, K]`, the tokens drawn after them.
        stop: int64 `[pictures]`, the last place that may be drawn; a picture that is there stays as it is.
        grid: of the pictures.

    Returns:
        Bool `[pictures, K]`: which draws were accepted.
    """
    goes_on = at < stop
    ahead = torch.arange(places.shape[1], device=places.device)
    # Where a window repeats its last token, the draw after the first of them counts.
    drawn = drawn.gather(1, (places - at[:, None]).clamp(min=0))
    drafts = tokens.gather(1, places + 1)
    right = (drawn == drafts) & (places + 1 < stop[:, None])
    accepted = torch.where(goes_on, right[:, :-1].long().cumprod(1).sum(1) + 1, 0)
    tokens.scatter_(1, places + 1, torch.where(goes_on[:, None], drawn, drafts))
    tokens.copy_(guessed(tokens, places[:, -1:] + 1, grid))
    at.add_(accepted)
    return ahead < accepted[:, None]


def guessed(tokens: Tensor, last: Tensor, grid: Grid) -> Tensor:
    """The tokens, with guesses behind the last that has been drawn.

    A line goes on as the one above it if the two agree at the last token, and else as its left neighbour. The
    lines after it, and what a grammar puts at the ends of lines, are as above.

    Args:
        tokens: int64 `[pictures, N]`.
        last: int64 `[pictures, 1]`, the place of the last that has been drawn.
        grid: of the pictures.
    """
    place = torch.arange(tokens.shape[1], device=tokens.device)
    left, above = tokens.gather(1, last), tokens.roll(grid.line, 1)
    agrees = (above.gather(1, last) == left) | (place // grid.line > last // grid.line)
    if grid.newline:
        agrees |= place % grid.line == grid.line - 1
    guesses = torch.where(agrees & (place >= grid.line), above, left)
    return torch.where(place > last, guesses, tokens)
