"""Runs a policy over a store with made-up attention, beside a naive rule over Python lists.

No model is needed: what the queries see is a random number for every (token that looks, layer, row, head,
token that is looked at), the same for the store and for the lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy
import torch
from torch import Tensor

from arkv import CachePolicy, Observation, Store
from arkv.decoding.checks import check_selection
from arkv.decoding.step import recycle_
from arkv.model import ModelSpec

Place = tuple[int, int, int]


@dataclass
class Head:
    """What a naive rule knows of one head.

    Attributes:
        held: positions of its visual tokens, the oldest first.
        mass: attention by the token that looked, then by the token looked at, -1 for all condition tokens.
        scores: scaled dot products, likewise.
    """

    held: list[int] = field(default_factory=list)
    mass: dict[int, dict[int, float]] = field(default_factory=dict)
    scores: dict[int, dict[int, float]] = field(default_factory=dict)

    def sums(self, kind: str, since: int = 0) -> dict[int, float]:
        """Sum of "mass" or "scores" by token held, over the tokens that looked from `since` on."""
        seen = getattr(self, kind)
        return {p: sum(seen[t].get(p, 0.0) for t in seen if t >= since) for p in self.held}


Heads = dict[Place, Head]
Rule = Callable[[Heads, int], None]
"""Thins out `held` of every head in place, given the number of tokens decoded."""


def drive(
    policy: CachePolicy,
    spec: ModelSpec,
    rule: Rule,
    rows: int = 2,
    condition: int = 3,
    guided: bool = False,
    seed: int = 0,
) -> Iterator[tuple[int, dict[Place, list[int]], dict[Place, list[int]], Store, Heads]]:
    """After each eviction: tokens decoded, what the store holds, what the rule holds, and both of them."""
    rng = numpy.random.default_rng(seed)
    store = Store(
        spec,
        policy.plan(spec.grid, spec),
        rows,
        condition,
        policy.fields,
        torch.float32,
        head_fields=policy.head_fields,
        guided=guided,
    )
    store.reset_(torch.ones(rows, condition, dtype=torch.bool))
    policy.begin(store)
    heads: Heads = {place: Head() for place in numpy.ndindex(spec.layers, rows, spec.kv_heads)}
    tokens = spec.grid.tokens
    for step in range(tokens - 1):
        now = torch.tensor(step)
        if step % store.plan.period == 0:
            check_selection(policy, store, policy.select(store, now))
            slots = recycle_(policy, store, now)
            rule(heads, step)
            yield step, held(store), {place: list(head.held) for place, head in heads.items()}, store, heads
        store.claim_(slots[..., step % store.plan.period], now)
        for head in heads.values():
            head.held.append(step)
        if policy.needs:
            mass = rng.random((spec.layers, rows, spec.kv_heads, tokens + 1)) ** 4
            scores = rng.normal(size=mass.shape)
            for place, head in heads.items():
                looked = [*head.held, tokens]
                mass[place] /= mass[place][looked].sum() + mass[place][-1] * (condition - 1)
                head.mass[step] = {p: mass[place][p] for p in head.held} | {-1: mass[place][-1] * condition}
                head.scores[step] = {p: scores[place][p] for p in head.held}
            policy.observe(store, _seen(store, mass, scores), now)


def held(store: Store) -> dict[Place, list[int]]:
    """Positions of the visual tokens in each head of a store, the oldest first."""
    owner = store.head.expand(store.position.shape)
    return {
        place: sorted(
            p
            for p, h in zip(store.position[place[:2]].tolist(), owner[place[:2]].tolist(), strict=True)
            if h == place[2] and p >= 0
        )
        for place in numpy.ndindex(store.layers, store.rows, store.kv_heads)
    }


def _seen(store: Store, mass: numpy.ndarray, scores: numpy.ndarray) -> Observation:
    """What the tables say of the tokens in the slots; condition tokens stand last in them."""
    index = torch.where(store.position >= 0, store.position, store.grid.tokens).long()
    owner = store.head.expand(index.shape).clamp(max=store.kv_heads - 1)

    def of_slots(table: numpy.ndarray) -> Tensor:
        flat = torch.from_numpy(table).float().flatten(2)
        return flat.gather(-1, owner * table.shape[-1] + index) * store.resident

    return Observation(of_slots(mass), of_slots(scores))


def lowest(tokens: list[int], score: dict[int, float], count: int) -> list[int]:
    """The `count` tokens of least score, of equal ones the oldest."""
    return sorted(tokens, key=lambda p: (numpy.float32(score[p]), p))[: max(0, count)]
