"""H2O: heavy hitters and the newest tokens (arXiv 2306.14048, section 4).

```text
visual tokens of a head:   [ heavy hitters | recent tokens ]

every token     s_j += a_t[j]: every token sums up the attention that it has received since its birth
at an eviction  keep the `recent` newest and, of the others, the B - recent of greatest s
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.policy import Observation, RankedPolicy, resolve_budget
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class H2O(RankedPolicy):
    """Running sums of attention decide, each head and each guidance row for itself (stated).

    Attention is that of the visual tokens' queries; a sum goes when its token does (stated). The paper
    evicts at every token, which is `period=1`. Older tokens have had more queries to be looked at by, and
    the recent ones are kept because of it.

    Attributes:
        recent: newest tokens that are never given up (the paper's common setting is half of the budget).
            None: half of the budget, rounded down.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    source: ClassVar[str] = "H2O, arXiv 2306.14048"

    recent: int | None = None

    def __post_init__(self) -> None:
        if self.recent is not None and self.recent < 0:
            raise BudgetError(f"recent is {self.recent}: expected 0 or more visual tokens")

    def recent_tokens(self, grid: Grid) -> int:
        """Newest tokens that are kept on this grid."""
        if self.recent is not None:
            return min(self.recent, grid.tokens)
        return resolve_budget(self.budget, self.ratio, grid.tokens) // 2

    def least_budget(self, grid: Grid) -> int:
        """The recent tokens."""
        return self.recent_tokens(grid)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add what this token looks at."""
        store["score"].add_(seen.mass)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The recent tokens."""
        return store.position >= step - self.recent_tokens(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The attention that each token has received."""
        return store["score"]
