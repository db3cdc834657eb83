"""StreamingLLM: the first tokens and the newest ones (arXiv 2309.17453, section 3)."""

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
    """Condition tokens, the first `sinks` visual tokens and a window of the newest.

    Keys keep the positions they were born with, while the paper re-indexes them inside the window: a
    picture's positions are cells of its grid, not distances. The paper evicts at every token, which is
    `period=1`; by default the window grows by a line before it is cut back to the budget.

    Attributes:
        sinks: first visual tokens that are never given up. The paper keeps four tokens at the start of
            the text; for pictures 2609.19702 counts the four from the first visual token, and so do we.
    """

    source: ClassVar[str] = "StreamingLLM, arXiv 2309.17453"

    sinks: int = 4

    def __post_init__(self) -> None:
        if self.sinks < 0:
            raise BudgetError(f"sinks is {self.sinks}: expected 0 or more visual tokens")

    def least_budget(self, grid: Grid) -> int:
        """The sinks."""
        return self.sinks

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The first tokens."""
        return store.position < self.sinks

    def score(self, store: Store, step: Tensor) -> Tensor:
        """The newer, the better."""
        return store.position.float()
