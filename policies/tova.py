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
    attention of the line's last token (ours). Every head decides for itself (ours, as for the other
    baselines; the paper averages the attention over the heads of a layer, so that all keep the same tokens).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    source: ClassVar[str] = "TOVA, arXiv 2401.06104"

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Remember what this token looks at, and nothing before it."""
        store["score"].copy_(seen.mass)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The attention of the newest query."""
        return store["score"]
