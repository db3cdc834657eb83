"""The runtime once more, slow and simple: every head a Python list of what it holds.

Nothing is batched over heads, slots or rows where it matters: a head's attention is a softmax in float64
over its list. The model's projections are shared with the runtime, because they are no part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkv.model import Condition, Model

Vector = NDArray[numpy.float64]
Place = tuple[int, int, int]
"""A layer, a row of the batch and a key head."""

WORD = -1
"""Position of a condition token; visual tokens count from 0."""


@dataclass
class Entry:
    """A token in the list of one head.

    Attributes:
        position: of a visual token, or `WORD`.
        key: `[head_dim]`.
        value: `[head_dim]`.
        score: the attention it got since this was last set to zero.
        column: index in the whole sequence, condition and padding counted.
    """

    position: int
    key: Vector
    value: Vector
    score: float = 0.0
    column: int = -1


Head = list[Entry]
Rule = Callable[[Head, int], Head]
"""The visual tokens of a head and the number of tokens decoded so far, to those that stay."""


def attend(query: Vector, head: Head) -> tuple[Vector, Vector]:
    """Plain softmax attention over a list: the attended value, and the weight of each entry."""
    weights = _softmax(dot_products(query, head))
    return weights @ numpy.array([entry.value for entry in head]), weights


def dot_products(query: Vector, head: Head) -> Vector:
    """The scaled dot product of a query with the key of each entry."""
    return numpy.array([entry.key for entry in head]) @ query / len(query) ** 0.5


class Oracle:
    """Decodes one batch token by token.

    Attributes:
        heads: by layer, row and key head, the tokens held; condition tokens first.
        mass: by layer, row and key head, the softmax weight that each column got from the last queries of
            the key head's group, summed over them; columns that were not attended to are absent.
        scores: as `mass`, the scaled dot products before the softmax.
        queries: float64 `[layers, rows, heads, head_dim]`, the last token's.
    """

    def __init__(self, model: Model, condition: Condition) -> None:
        spec = model.spec
        self.model, self.condition = model, condition
        self.rows, self.length = condition.mask.shape
        everywhere = numpy.ndindex(spec.layers, self.rows, spec.kv_heads)
        self.heads: dict[Place, Head] = {(layer, row, head): [] for layer, row, head in everywhere}
        self.mass: dict[Place, dict[int, float]] = {}
        self.scores: dict[Place, dict[int, float]] = {}
        self.queries = numpy.zeros((spec.layers, self.rows, spec.heads, spec.head_dim))

    def prefill(self) -> Tensor:
        """Logits of the first visual token, `[rows, vocabulary]`."""
        for column in range(self.length):
            present = self.condition.mask[:, column].tolist()
            hidden = self._pass(self.condition.embeddings[:, [column]], column, WORD, present, None)
        return self.model.head(hidden, torch.tensor(0))

    def advance(
        self, tokens: Tensor, position: int, attended: Mapping[Place, Collection[int]] | None = None
    ) -> Tensor:
        """Decode one token further.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order.
            attended: by layer, row and key head, the columns to look at; None for all that are held.

        Returns:
            Logits of the token at `position + 1`, `[rows, vocabulary]`.
        """
        hidden = self.model.embed(tokens, torch.tensor(position))
        hidden = self._pass(hidden, self.length + position, position, [True] * self.rows, attended)
        return self.model.head(hidden, torch.tensor(position + 1))

    def evict(self, rule: Rule, decoded: int) -> None:
        """Let a rule thin out the visual tokens of every head."""
        for place, head in self.heads.items():
            words = [entry for entry in head if entry.position == WORD]
            self.heads[place] = words + rule(head[len(words) :], decoded)

    def visual(self, *place: int) -> list[int]:
        """Positions of the visual tokens of a head, in order."""
        layer, row, head = place
        return sorted(entry.position for entry in self.heads[layer, row, head] if entry.position != WORD)

    def _pass(
        self,
        hidden: Tensor,
        column: int,
        position: int,
        present: list[bool],
        attended: Mapping[Place, Collection[int]] | None,
    ) -> Tensor:
        """One token of every row through all layers; rows in which it is padding store nothing."""
        spec = self.model.spec
        group = spec.heads // spec.kv_heads
        rotation = self.condition.rotation[:, column : column + 1]
        for layer, block in enumerate(self.model.blocks):
            query, key, value = (x[:, 0].double().numpy() for x in block.project(hidden, rotation))
            self.queries[layer] = query
            outputs = numpy.zeros((self.rows, spec.heads, spec.head_dim))
            for row in map(int, numpy.flatnonzero(present)):
                for shared in range(spec.kv_heads):
                    place = layer, row, shared
                    self.heads[place].append(
                        Entry(position, key[row, shared], value[row, shared], 0.0, column)
                    )
                    looked_at = self.heads[place]
                    if attended is not None:
                        looked_at = [entry for entry in looked_at if entry.column in attended[place]]
                    mass, scores = numpy.zeros(len(looked_at)), numpy.zeros(len(looked_at))
                    for h in range(shared * group, (shared + 1) * group):
                        outputs[row, h], weights = attend(query[row, h], looked_at)
                        mass += weights
                        scores += dot_products(query[row, h], looked_at)
                    columns = [entry.column for entry in looked_at]
                    self.mass[place] = dict(zip(columns, mass.tolist(), strict=True))
                    self.scores[place] = dict(zip(columns, scores.tolist(), strict=True))
                    if position != WORD:
                        for entry, weight in zip(looked_at, mass.tolist(), strict=True):
                            entry.score += weight
            hidden = block.merge(hidden, torch.from_numpy(outputs)[:, None].to(hidden.dtype))
        return hidden


def _softmax(scores: Vector) -> Vector:
    weights: Vector = numpy.exp(scores - scores.max())
    return weights / weights.sum()
