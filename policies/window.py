"""A sliding window, and StreamingLLM's: the first tokens and the newest ones (arXiv 2309.17453, section 3).

```text
visual tokens of a head:   [ sinks | newest tokens ]
```
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.policy import RankedPolicy
from arkv.store import Store


@dataclass(frozen=True, kw_only=True)
class SlidingWindow(RankedPolicy):
    """Condition tokens and a window of the newest visual tokens.

    The window grows by `period` tokens before it is cut back to the budget.

    Attributes:
        sinks: first visual tokens that are never given up; they count in the budget.
    """

    source: ClassVar[str] = "baseline"

    sinks: int = 0

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise BudgetError(f"sinks is {self.sinks}: expected 0 or more visual tokens")

    def sink_tokens(self, grid: Grid) -> int:
        """Sinks on this grid."""
        return min(self.sinks, grid.tokens)

    def least_budget(self, grid: Grid) -> int:
        """The sinks."""
        return self.sink_tokens(grid)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The first tokens."""
        return store.position < self.sink_tokens(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The newer, the better."""
        return store.position.float()


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(SlidingWindow):
    """The window under its paper's name: four attention sinks and the newest tokens.

    Keys keep the positions they were born with, while the paper re-indexes them inside the window: a
    picture's positions are cells of its grid, not distances. The paper evicts at every token, which is
    `period=1`.

    Attributes:
        sinks: the paper keeps four tokens at the start of the text (stated). For pictures 2609.19702 counts
            the four from the first visual token, because all condition tokens stay anyway, and so do we.
    """

    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    sinks: int = 4
