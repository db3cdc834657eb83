"""The runtime once more, slow and simple: every head a Python list of what it holds.

Written from the papers, not from the runtime. Nothing is batched over heads, slots or rows where it
matters: a head's attention is a softmax in float64 over its list. The model's projections are shared with
the runtime, because they are no part of the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from arkv import CachePolicy
from arkv.loop import Loop
from arkv.model import Condition, Model

Vector = NDArray[numpy.float64]
Held = tuple[dict[int, dict], dict[int, dict]]

WORD = -1
"""Position of a condition token; visual tokens count from 0."""


@dataclass
class Entry:
    """A resident token of one head, and the attention it got since the last eviction."""

    position: int
    key: Vector
    value: Vector
    score: float = 0.0


Head = list[Entry]
Rule = Callable[[Head, int], Head]
"""The visual tokens of a head and the number of tokens decoded so far, to those that stay."""


def keep_all(tokens: Head, decoded: int) -> Head:
    """The full cache."""
    return list(tokens)


def window(budget: int, sinks: int) -> Rule:
    """StreamingLLM: the first tokens, and the newest as far as the budget reaches."""

    def rule(tokens: Head, decoded: int) -> Head:
        if len(tokens) <= budget:
            return list(tokens)
        ordered = sorted(tokens, key=lambda token: token.position)
        first = [token for token in ordered if token.position < sinks]
        others = ordered[len(first) :]
        return first + others[len(others) - (budget - len(first)) :]

    return rule


@dataclass
class Linear:
    """LineAR: anchors and the newest stay, the middle is ranked by what the last line looked at.

    `margin` is the smallest distance between a score that was kept and one that was not: where it is
    within rounding, another answer would be as good.
    """

    budget: int
    anchors: int
    recent: int
    margin: float = field(default=numpy.inf, init=False)

    def __call__(self, tokens: Head, decoded: int) -> Head:
        """The tokens that stay, their scores back at zero."""
        kept = list(tokens)
        if len(tokens) > self.budget:
            safe = [t for t in tokens if t.position < self.anchors or t.position >= decoded - self.recent]
            middle = [t for t in tokens if t not in safe]
            middle.sort(key=lambda token: (token.score, token.position), reverse=True)
            room = self.budget - len(safe)
            if 0 < room < len(middle):
                self.margin = min(self.margin, middle[room - 1].score - middle[room].score)
            kept = safe + middle[:room]
        for token in kept:
            token.score = 0.0
        return kept


def attend(query: Vector, head: Head) -> tuple[Vector, Vector]:
    """Plain softmax attention over a list: the attended value, and the weight of each entry."""
    scores = numpy.array([query @ entry.key for entry in head]) / len(query) ** 0.5
    weights = numpy.exp(scores - scores.max())
    weights /= weights.sum()
    return sum(w * entry.value for w, entry in zip(weights, head, strict=True)), weights


class Oracle:
    """Decodes one batch token by token.

    Attributes:
        heads: by layer, row and key head, the tokens held; condition tokens first.
        weights: by layer, row and key head, what each entry got from the last query, summed over the
            query heads of its group.
    """

    def __init__(self, model: Model, condition: Condition) -> None:
        spec = model.spec
        self.model, self.condition = model, condition
        self.rows, self.length = condition.mask.shape
        everywhere = numpy.ndindex(spec.layers, self.rows, spec.kv_heads)
        self.heads: dict[tuple[int, ...], Head] = {place: [] for place in everywhere}
        self.weights: dict[tuple[int, ...], Vector] = {}

    def prefill(self) -> Tensor:
        """Logits of the first visual token, `[rows, vocabulary]`."""
        for column in range(self.length):
            present = self.condition.mask[:, column].tolist()
            hidden = self._pass(self.condition.embeddings[:, [column]], column, WORD, present)
        return self.model.head(hidden, torch.tensor(0))

    def advance(self, tokens: Tensor, position: int) -> Tensor:
        """Logits of the visual token after the given ones, `[rows, vocabulary]`."""
        hidden = self.model.embed(tokens, torch.tensor(position))
        hidden = self._pass(hidden, self.length + position, position, [True] * self.rows)
        return self.model.head(hidden, torch.tensor(position + 1))

    def evict(self, rule: Rule, decoded: int) -> None:
        """Let a rule thin out the visual tokens of every head."""
        for place, head in self.heads.items():
            words = [entry for entry in head if entry.position == WORD]
            self.heads[place] = words + rule(head[len(words) :], decoded)

    def visual(self, *place: int) -> list[int]:
        """Positions of the visual tokens of a head, in order."""
        return sorted(entry.position for entry in self.heads[place] if entry.position != WORD)

    def _pass(self, hidden: Tensor, column: int, position: int, present: list[bool]) -> Tensor:
        """One token of every row through all layers; rows in which it is padding store nothing."""
        spec = self.model.spec
        group = spec.heads // spec.kv_heads
        rotation = self.condition.rotation[:, column : column + 1]
        for layer, block in enumerate(self.model.blocks):
            query, key, value = (x[:, 0].double().numpy() for x in block.project(hidden, rotation))
            attended = numpy.zeros((self.rows, spec.heads, spec.head_dim))
            for row in numpy.flatnonzero(present):
                for shared in range(spec.kv_heads):
                    head = self.heads[layer, row, shared]
                    head.append(Entry(position, key[row, shared], value[row, shared]))
                    total = numpy.zeros(len(head))
                    for h in range(shared * group, (shared + 1) * group):
                        attended[row, h], weights = attend(query[row, h], head)
                        total += weights
                    self.weights[layer, row, shared] = total
                    if position != WORD:
                        for entry, weight in zip(head, total, strict=True):
                            entry.score += weight
            hidden = block.merge(hidden, torch.from_numpy(attended)[:, None].to(hidden.dtype))
        return hidden


def guided(raw: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance on rows of which the second half is unconditional."""
    half = len(raw) // 2
    result = torch.empty_like(raw[:half])
    for index in numpy.ndindex(*result.shape):
        seen, blind = raw[index].item(), raw[(index[0] + half, *index[1:])].item()
        forbidden = -numpy.inf in (seen, blind)
        result[index] = -numpy.inf if forbidden else blind + scale * (seen - blind)
    return result


def force(model: Model, prompts: list, tokens: Tensor, scale: float, rule: Rule) -> Tensor:
    """Logits of every step under given tokens, raw rows, `[rows, N, vocabulary]`; evicts at line ends."""
    grid = model.spec.grid
    rows = tokens if scale == 1 else tokens.repeat(2, 1)
    oracle = Oracle(model, model.condition(prompts, scale != 1))
    logits = [oracle.prefill()]
    for position in range(grid.tokens - 1):
        if position % grid.line == 0:
            oracle.evict(rule, position)
        logits.append(oracle.advance(rows[:, position], position))
    return torch.stack(logits, dim=1)


def watch(model: Model, policy: CachePolicy, prompts: list, tokens: Tensor, scale: float, rule: Rule) -> Held:
    """What the runtime and the oracle hold after each token, under given tokens.

    Returns:
        Both as position decoded -> (layer, row, head) -> visual tokens held.
    """
    grid = model.spec.grid
    rows = tokens if scale == 1 else tokens.repeat(2, 1)
    condition = model.condition(prompts, scale != 1)
    oracle, loop = Oracle(model, condition), Loop(model, policy, *condition.mask.shape, "none")
    oracle.prefill()
    loop.prefill_(condition)
    got: dict[int, dict] = {}
    expected: dict[int, dict] = {}
    for position in range(grid.tokens - 1):
        if position % grid.line == 0:
            oracle.evict(rule, position)
        oracle.advance(rows[:, position], position)
        loop.advance_(rows[:, position], position)
        expected[position] = {place: oracle.visual(*place) for place in oracle.heads}
        held = loop.store.position
        got[position] = {place: sorted(p for p in held[place].tolist() if p >= 0) for place in oracle.heads}
    return got, expected
