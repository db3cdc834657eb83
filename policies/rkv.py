"""R-KV: tokens that are looked at and not said twice (arXiv 2505.24133, section 3).

```text
visual tokens of a head:   [ chosen | observation window ]

importance I   attention of the last w queries over the older tokens, mean over the queries,
               greatest of 7 neighbours
redundancy R   cosine similarity of every two keys i != j, but 0 for the newest j that is more similar
               to i than 0.5; mean over i, softmax over j
at an eviction keep the w newest tokens and the B - w of greatest lambda I - (1 - lambda) R
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d, normalize

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.policies.snapkv import check_window, window_within
from arkv.policy import Observation, RankedPolicy, rank_in_head
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class RKV(RankedPolicy):
    """Importance against redundancy, each head and each guidance row for itself.

    Ages are those of birth, and a key that resembles no other keeps all its similarities (the paper's
    words). The published code does otherwise in two points: what an eviction keeps lies in the order of its
    scores from then on, so that from the second eviction on neighbours and "the newest repeat" go by score;
    and a key that resembles no other has its similarity to the first key of the cache set to zero. Papers
    that compare with R-KV may have run that code: `as_published` does the same.

    Both are shares among the visual tokens of a head (inferred: the paper's are among all tokens, but there
    the prompt competes too, while here condition tokens stay anyway). Query heads that share a key head count
    by their mean (the published code takes the greatest). Neighbours share the greatest mean over the
    queries, as in the published code (the paper pools every query's attention before the mean). Every row has
    the similarities of its own keys (the published code applies those of the first row to all).

    Every head has to have as many slots as the next. Similarities are computed for so many rows at a time
    that they take less than the keys of a layer.

    Attributes:
        lambda_: weight of importance against redundancy (0.1 in the paper's experiments, 0.07 in the
            published code).
        window: newest queries that importance is judged by; their tokens are never given up. Attention is
            collected from one eviction to the next, so it is at most `period`. None: the paper's 8, or the
            period if that is shorter.
        kernel: tokens that share the greatest importance among them, in the order of their birth, an odd
            number (stated).
        threshold: cosine similarity above which one key repeats another (stated).
        as_published: whether to order kept tokens, and to treat keys that resemble no other, as the published
            code does; the cache's first key is that of its first visual token here (ours: there it is the
            prompt's).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False  # its similarities want heads of one size
    source: ClassVar[str] = "R-KV, arXiv 2505.24133"

    lambda_: float = 0.1
    window: int | None = None
    kernel: int = 7
    threshold: float = 0.5
    as_published: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ <= 1:
            raise BudgetError(f"lambda_ is {self.lambda_}: expected a weight from 0 to 1")
        check_window(self.window, self.kernel)
        if not -1 <= self.threshold <= 1:
            raise BudgetError(f"threshold is {self.threshold}: expected a cosine, from -1 to 1")

    @property
    def fields(self) -> Mapping[str, torch.dtype]:  # type: ignore[override]
        """Importance; as published, also the rank that each kept token lies by, from -slots to -1."""
        rank = {"rank": torch.int32} if self.as_published else {}
        return {"importance": torch.float32, **rank}

    def window_tokens(self, grid: Grid) -> int:
        """Queries that importance is judged by on this grid."""
        return window_within(self.eviction_period(grid), self.window, usual=8)

    def least_budget(self, grid: Grid) -> int:
        """The window."""
        return self.window_tokens(grid)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add this query's attention over the tokens before the window, if it is in the window itself."""
        period, window = store.plan.period, self.window_tokens(store.grid)
        start = step - step % period + period - window
        older = (store.position >= 0) & (store.position < start) & (step >= start)
        mass = torch.where(older, seen.mass, 0)
        whole = store.of_slots(store.sum_by_head(mass)).clamp(min=torch.finfo(torch.float32).tiny)
        store["importance"].add_(mass / whole / window)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The window."""
        return store.position >= step - self.window_tokens(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """Importance less redundancy."""
        order = store.by_head(self.order(store))
        importance = pooled_by_age(store.by_head(store["importance"]), order, self.kernel)
        # A part at a time: all similarities of a layer would be far more than its keys.
        of_parts = []
        for layer, held in enumerate(order):
            keys = store.key_numbers(layer).unflatten(1, (store.kv_heads, -1))
            parts = parts_of(keys)
            of_parts += [
                similarities(some, places, self.threshold, self.as_published)
                for some, places in zip(keys.chunk(parts), held.chunk(parts), strict=True)
            ]
        repeats = torch.cat(of_parts).view_as(order)
        return (self.lambda_ * importance - (1 - self.lambda_) * shares(repeats, order)).flatten(2)

    def order(self, store: Store) -> Tensor:
        """Where each visual token stands in its head's order, int32 as positions are; negative elsewhere."""
        if not self.as_published:
            return store.position
        place = torch.where(store["rank"] < 0, store["rank"], store.position) + store.slots
        return torch.where(store.position < 0, store.position, place)

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots, forget the attention and, as published, put what stays in order of its score."""
        if self.as_published:
            self._reorder(store, slots)
        super().evict(store, slots)
        store["importance"].zero_()

    def _reorder(self, store: Store, slots: Tensor) -> None:
        step = store.position.amax() + 1
        ranked = (store.position >= 0) & ~self.protected(store, step)
        score = self.of_picture(store, self.score(store, step))
        worst_first = rank_in_head(store, torch.where(ranked, score, torch.inf))
        # The best of all gets -slots. What is given up gets a rank, too, and loses it with its slot.
        rank = torch.where(ranked, -1 - worst_first, 0).to(torch.int32)
        # Nothing is put in order before there is more than the budget.
        given_up = store.position.gather(-1, slots.flatten(2)).view(slots.shape) >= 0
        some = store.of_slots(given_up.any(-1).to(torch.int32)) > 0
        store["rank"].copy_(torch.where(some, rank, store["rank"]))


def pooled_by_age(x: Tensor, order: Tensor, kernel: int) -> Tensor:
    """The greatest value among each token and its neighbours in an order.

    Args:
        x: float32 `[..., slots]`, zero where there is no visual token.
        order: int32, as `x`: the token's place, such as its position.
        kernel: odd number of neighbours, the token itself counted.
    """
    kernel = min(kernel, 2 * x.shape[-1] - 1)  # wider than this, it holds all of them anyway
    by_age = order.argsort(dim=-1, stable=True)
    ordered = x.gather(-1, by_age).flatten(0, -2)
    greatest = max_pool1d(ordered[:, None], kernel, stride=1, padding=kernel // 2).view(x.shape)
    return torch.zeros_like(x).scatter(-1, by_age, greatest)


def redundancy(keys: Tensor, order: Tensor, threshold: float, as_published: bool = False) -> Tensor:
    """How much the other keys of a head repeat each one.

    Args:
        keys: as for `similarities`, whose arguments these are.
        order: likewise.
        threshold: likewise.
        as_published: likewise.

    Returns:
        float32 `[rows, kv_heads, slots]`, over the visual tokens of a head 1 in sum; zero elsewhere.
    """
    return shares(similarities(keys, order, threshold, as_published), order)


def similarities(keys: Tensor, order: Tensor, threshold: float, as_published: bool) -> Tensor:
    """Sums of the similarities of each key to the others of its head.

    Keys of which it is the newest repeat are not counted, so that of many that are alike one stays.

    Args:
        keys: `[..., slots, head_dim]`.
        order: int32 `[..., slots]`, the place of each visual token in the order of age; negative
            where there is none.
        threshold: cosine similarity above which one key repeats another.
        as_published: whether a key that nothing repeats is not counted for the first key.

    Returns:
        float32 `[..., slots]`.
    """
    held = order >= 0
    unit = normalize(keys.float(), dim=-1)
    others = ~torch.eye(held.shape[-1], dtype=torch.bool, device=keys.device)
    pair = held[..., None] & held[..., None, :] & others
    similar = torch.where(pair, unit @ unit.mT, 0)
    born = torch.where(pair & (similar > threshold), order[..., None, :], -1)
    newest = born.amax(-1, keepdim=True)
    left_out = (born >= 0) & (born == newest)
    if as_published:
        first = torch.where(held, order, torch.iinfo(order.dtype).max).amin(-1, keepdim=True)
        left_out |= (newest < 0) & (order == first)[..., None, :]
    return torch.where(left_out, 0, similar).sum(-2)


def shares(repeats: Tensor, order: Tensor) -> Tensor:
    """The mean of the similarities, and of these the softmax over the visual tokens of a head.

    Args:
        repeats: float32 `[..., slots]`, from `similarities`.
        order: int32, as `repeats`.
    """
    held = order >= 0
    mean = repeats / held.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(held, mean.masked_fill(~held, -torch.inf).softmax(-1), 0)


def parts_of(keys: Tensor) -> int:
    """Into how many parts of one size rows are cut, so that a part's similarities are less than all keys.

    Args:
        keys: `[rows, kv_heads, slots, head_dim]`.
    """
    rows, _, slots, head_dim = keys.shape
    parts = min(torch.float32.itemsize * max(slots, head_dim) // (head_dim * keys.element_size()) + 1, rows)
    while rows % parts:
        parts += 1
    return parts
