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
from arkv.policy import Observation, RankedPolicy
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class RKV(RankedPolicy):
    """Importance against redundancy, each head and each guidance row for itself.

    Both are shares among the visual tokens of a head (inferred: the paper's are among all tokens, but there
    the prompt competes too, while here condition tokens stay anyway). Query heads that share a key head count
    by their mean (the published code takes the greatest). Every row has the similarities of its own keys
    (the published code applies those of the first row to all).

    Every head has to have as many slots as the next. The similarities of one layer at a time take
    `rows * kv_heads * capacity^2` numbers while an eviction lasts.

    Attributes:
        lambda_: weight of importance against redundancy (stated).
        window: newest queries that importance is judged by; their tokens are never given up. Attention is
            collected from one eviction to the next, so it is at most `period`. None: the paper's 8, or the
            period if that is shorter.
        kernel: tokens that share the greatest importance among them, in the order of their birth, an odd
            number (stated).
        threshold: cosine similarity above which one key repeats another (stated).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"importance": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False  # its similarities want heads of one size
    source: ClassVar[str] = "R-KV, arXiv 2505.24133"

    lambda_: float = 0.07
    window: int | None = None
    kernel: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ <= 1:
            raise BudgetError(f"lambda_ is {self.lambda_}: expected a weight from 0 to 1")
        check_window(self.window, self.kernel)
        if not -1 <= self.threshold <= 1:
            raise BudgetError(f"threshold is {self.threshold}: expected a cosine, from -1 to 1")

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
        position = store.by_head(store.position)
        importance = pooled_by_age(store.by_head(store["importance"]), position, self.kernel)
        # By layer, because keys are: all similarities at once would be far more than the cache.
        repeated = [
            redundancy(keys.unflatten(1, (store.kv_heads, -1)), held, self.threshold)
            for keys, held in zip(store.keys, position, strict=True)
        ]
        return (self.lambda_ * importance - (1 - self.lambda_) * torch.stack(repeated)).flatten(2)

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots and forget the attention."""
        super().evict(store, slots)
        store["importance"].zero_()


def pooled_by_age(x: Tensor, position: Tensor, kernel: int) -> Tensor:
    """The greatest value among each token and its neighbours in the order of birth.

    Args:
        x: float32 `[..., slots]`, zero where there is no visual token.
        position: int32, as `x`.
        kernel: odd number of neighbours, the token itself counted.
    """
    kernel = min(kernel, 2 * x.shape[-1] - 1)  # wider than this, it holds all of them anyway
    order = position.argsort(dim=-1, stable=True)
    ordered = x.gather(-1, order).flatten(0, -2)
    greatest = max_pool1d(ordered[:, None], kernel, stride=1, padding=kernel // 2).view(x.shape)
    return torch.zeros_like(x).scatter(-1, order, greatest)


def redundancy(keys: Tensor, position: Tensor, threshold: float) -> Tensor:
    """How much the other keys of a head repeat each one.

    Keys of which it is the newest repeat are not counted, so that of many that are alike one stays.

    Args:
        keys: `[rows, kv_heads, slots, head_dim]`.
        position: int32 `[rows, kv_heads, slots]`, negative where there is no visual token.
        threshold: cosine similarity above which one key repeats another.

    Returns:
        float32 `[rows, kv_heads, slots]`, over the visual tokens of a head 1 in sum; zero elsewhere.
    """
    held = position >= 0
    unit = normalize(keys.float(), dim=-1)
    others = ~torch.eye(held.shape[-1], dtype=torch.bool, device=keys.device)
    pair = held[..., None] & held[..., None, :] & others
    similar = torch.where(pair, unit @ unit.mT, 0)
    born = torch.where(pair & (similar > threshold), position[..., None, :], -1)
    newest = (born >= 0) & (born == born.amax(-1, keepdim=True))
    mean = torch.where(newest, 0, similar).sum(-2) / held.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(held, mean.masked_fill(~held, -torch.inf).softmax(-1), 0)
