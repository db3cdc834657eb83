"""Eviction rules and guidance as the papers have them, for the oracle that keeps Python lists.

Written from the papers, not from the runtime.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from arkv import CachePolicy
from arkv.decoding.loop import Loop
from arkv.model import Model
from arkv.testing.oracle import WORD as WORD
from arkv.testing.oracle import Entry as Entry
from arkv.testing.oracle import Head, Oracle, Place, Rule
from arkv.testing.oracle import attend as attend
from arkv.testing.stores import positions

Held = tuple[dict[int, dict[Place, list[int]]], dict[int, dict[Place, list[int]]]]


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
    loop = Loop(model, policy, *condition.mask.shape, "none", scale != 1)
    oracle = Oracle(model, condition)
    oracle.prefill()
    loop.prefill_(condition)
    got: dict[int, dict[Place, list[int]]] = {}
    expected: dict[int, dict[Place, list[int]]] = {}
    for position in range(grid.tokens - 1):
        if position % grid.line == 0:
            oracle.evict(rule, position)
        oracle.advance(rows[:, position], position)
        loop.advance_(rows[:, position], position)
        expected[position] = {place: oracle.visual(*place) for place in oracle.heads}
        got[position] = positions(loop.store)
    return got, expected
