"""A model whose queries and keys are made up, and plain lists beside it: policies against their papers.

What attention looks like in picture models is in the queries and keys: sinks that everybody looks at, bands
(the token one line up, or a few back), tokens that look alike, and noise. The runtime draws a whole picture
with them; a transcription of a paper gets the same numbers as lists of floats and keeps its own book.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor

from arkv import CachePolicy, Grid
from arkv.decoding.loop import Loop
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.study.shadow import Watched, by_token
from arkv.testing.oracle import Place
from arkv.testing.stores import positions

WORDS = 3
"""Condition tokens of every row."""
WIDTH = 16
"""Of a head."""


class Structured(Model):
    """Says what each token asks and answers, by layer, row, head and place; weights it has none.

    Attributes:
        queries: float64 `[layers, rows, heads, words + N, WIDTH]`.
        keys: as `queries`.
    """

    def __init__(self, grid: Grid, rows: int = 2, layers: int = 2, heads: int = 2, seed: int = 0) -> None:
        super().__init__()
        self.spec = ModelSpec(
            name="structured",
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_dim=WIDTH,
            vocabulary=2,
            grid=grid,
            max_condition=WORDS,
            guidance=1.0,
            width=1,
            hidden=1,
        )
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # has the dtype and the device
        self.queries, self.keys = made_up(grid, (layers, rows, heads), numpy.random.default_rng(seed))

    @property
    def blocks(self) -> Sequence[Block]:
        return [Layer(q, k) for q, k in zip(self.queries, self.keys, strict=True)]

    @classmethod
    def from_pretrained(cls, *, dtype: torch.dtype, device: torch.device) -> Structured:
        raise NotImplementedError

    def condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        rows, tokens = self.keys.shape[1], self.spec.grid.tokens
        places = torch.arange(WORDS, dtype=torch.float32).expand(rows, -1)[..., None]
        return Condition(
            places, torch.ones(rows, WORDS, dtype=torch.bool), torch.zeros(1, WORDS + tokens, WIDTH)
        )

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        return (WORDS + position).float().expand(len(tokens))[:, None, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        return torch.zeros(len(hidden), self.spec.vocabulary)

    def pixels(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        raise NotImplementedError


class Layer:
    """Looks up what the tokens ask and answer; a hidden state is the token's place."""

    def __init__(self, queries: numpy.ndarray, keys: numpy.ndarray) -> None:
        self.queries, self.keys = (torch.from_numpy(x).float().transpose(1, 2) for x in (queries, keys))

    def project(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = hidden[0, :, 0].long()
        return self.queries[:, places], self.keys[:, places], self.keys[:, places]

    def merge(self, hidden: Tensor, attended: Tensor) -> Tensor:
        return hidden


def made_up(
    grid: Grid, shape: tuple[int, ...], rng: numpy.random.Generator
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Queries and keys of every head: sinks, bands, tokens that look alike, noise, in a mix of its own."""
    total = WORDS + grid.tokens
    queries, keys = numpy.zeros((2, *shape, total, WIDTH))
    place = numpy.arange(total)
    for head in numpy.ndindex(*shape):
        noise, kinds = rng.normal(size=(2, total, 4)), rng.normal(size=(4, 4))
        # 0-3: one of four kinds of token, and what it is taken for; few of them are looked for.
        kind = rng.integers(4, size=total)
        keys[head][:, :4] = kinds[kind] + 0.05 * noise[0]
        queries[head][:, :4] = rng.uniform(0.2, 1.0) * (kinds[rng.integers(4)] + noise[1])
        # 4: a few sinks, at the beginning and anywhere.
        sinks = [0, WORDS, WORDS + 1, *rng.integers(total, size=2)]
        keys[head][sinks, 4] = rng.uniform(1, 3, size=len(sinks))
        queries[head][:, 4] = rng.uniform(0, 3)
        # 5-10: a band: three frequencies that agree at one distance and at few others.
        lag = rng.choice([1, grid.line, max(1, grid.line - 3), 2 * grid.line])
        for wave, period in enumerate((5.0, 13.0, 37.0)):
            for offset, wing in enumerate((numpy.cos, numpy.sin)):
                keys[head][:, 5 + 2 * wave + offset] = wing(2 * math.pi * place / period)
                queries[head][:, 5 + 2 * wave + offset] = wing(2 * math.pi * (place - lag) / period)
        queries[head][:, 5:11] *= rng.choice([1.0, 4.0, 16.0])
        # The rest is noise, so that nothing is ever quite the same.
        keys[head][:, 11:] = rng.normal(size=(total, WIDTH - 11)) * 0.3
        queries[head][:, 11:] = rng.normal(size=(total, WIDTH - 11))
    # What the runtime is given in float32 the lists have, too.
    return queries.astype(numpy.float32).astype(float), keys.astype(numpy.float32).astype(float)


@dataclass
class Head:
    """One head as a paper's box sees it.

    Attributes:
        words: keys of the condition tokens.
        query: by visual token.
        key: by visual token.
        held: visual tokens in the cache, in the order that the box keeps them in.
        local: for a box that tells kinds of heads apart.
    """

    words: list[list[float]]
    query: list[list[float]]
    key: list[list[float]]
    held: list[int] = field(default_factory=list)
    local: bool = False

    def scores(self, t: int, tokens: Sequence[int]) -> dict[int, float]:
        """Scaled dot products of token t's query; the condition tokens' under -1, -2, ..."""
        keys = {-1 - i: word for i, word in enumerate(self.words)} | {j: self.key[j] for j in tokens}
        return {
            j: sum(a * b for a, b in zip(self.query[t], key, strict=True)) / math.sqrt(WIDTH)
            for j, key in keys.items()
        }

    def attention(self, t: int, tokens: Sequence[int]) -> dict[int, float]:
        """Softmax attention of token t's query to the condition and to these tokens."""
        weights = {j: math.exp(s) for j, s in self.scores(t, tokens).items()}
        whole = sum(weights.values())
        return {j: weight / whole for j, weight in weights.items()}


class Box:
    """A paper's algorithm over the heads of a picture, in plain lists; subclasses say what goes.

    Attributes:
        heads: by layer, row and head.
        grid: of the picture.
    """

    period = 1

    def __init__(self, heads: dict[Place, Head], grid: Grid) -> None:
        self.heads, self.grid = heads, grid

    def evict(self, t: int) -> None:
        """Thin out what is held before token t comes, t a multiple of the period."""

    def attended(self, place: Place) -> list[int]:
        """What the newest token of a head may look at."""
        return self.heads[place].held

    def look(self, t: int) -> None:
        """Token t is held in every head, and its query looks."""


@torch.inference_mode()
def compare(model: Structured, policy: CachePolicy, box: type[Box]) -> int:
    """Draw a picture with the runtime and with a box: every token has to be held and seen in both.

    Returns:
        The number of sets of tokens that were compared.
    """
    condition, spec = model.condition([], False), model.spec
    rows = len(condition.mask)
    watched = Watched(policy=policy)
    loop = Loop(model, watched, rows, WORDS, "none")
    loop.prefill_(condition)
    book = box(lists_of(model), spec.grid)
    compared = 0
    for t in range(spec.grid.tokens - 1):
        loop.advance_(torch.zeros(rows, dtype=torch.long), t)
        if t % book.period == 0:
            book.evict(t)
        for head in book.heads.values():
            head.held.append(t)
        got = positions(loop.store)
        expected = {place: sorted(head.held) for place, head in book.heads.items()}
        assert got == expected, f"at token {t}"
        visible = by_token(loop.store, watched.saw["visible"])[..., WORDS:]
        for place in book.heads:
            assert visible[place].nonzero()[:, 0].tolist() == sorted(book.attended(place)), f"at token {t}"
        book.look(t)
        compared += len(expected)
    return compared


def lists_of(model: Structured) -> dict[Place, Head]:
    """Every head of a model that has drawn nothing yet."""
    return {
        place: Head(
            model.keys[place][:WORDS].tolist(),
            model.queries[place][WORDS:].tolist(),
            model.keys[place][WORDS:].tolist(),
        )
        for place in numpy.ndindex(*model.keys.shape[:3])
    }
