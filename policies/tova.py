"""TOVA: the newest query alone decides (arXiv 2401.06104, section 3).

```text
at an eviction   keep the B tokens to which the newest query pays most attention
```
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from arkv.policy import Observation, RankedPolicy
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class TOVA(RankedPolicy):
    """The least attended tokens go; neither age nor place protects any (stated), not even the newest.

    The paper evicts one token at every step, which is `period=1`; by default a line goes at its end, by the
    attention of the line's last token (ours).

    Attributes:
        mean_heads: whether the heads of a layer keep the same tokens, by the mean of their attention (stated,
            and what the published cache does); else every head decides for itself (ours, as for the other
            baselines).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    source: ClassVar[str] = "TOVA, arXiv 2401.06104"

    mean_heads: bool = False

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Remember what this token looks at, and nothing before it."""
        store["score"].copy_(seen.mass)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The attention of the newest query."""
        return sum_over_heads(store, store["score"]) if self.mean_heads else store["score"]


def sum_over_heads(store: Store, x: Tensor) -> Tensor:
    """What the heads of a layer say of a token together, in every slot that holds it.

    Args:
        store: positions and heads.
        x: float32 `[layers, rows, slots]`.

    Returns:
        float32 `[layers, rows, slots]`; where there is no visual token, nothing that means anything.
    """
    heads, tokens = store.kv_heads, store.grid.tokens
    # One place for every token of every head, not a sum into shared ones: the same result on every device.
    place = torch.where(store.position >= 0, store.head * tokens + store.position, heads * tokens)
    by_head = x.new_zeros(*x.shape[:2], heads * tokens + 1).scatter(-1, place, x)[..., :-1]
    together = by_head.unflatten(-1, (heads, tokens)).sum(2)
    return together.gather(-1, store.position.clamp(min=0).long())
