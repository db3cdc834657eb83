"""Diagonal attention: distances that never matter are skipped (arXiv 2609.19702).

A head looks at N_att of the N_r newest tokens. Which ones is a set of distances from the newest token, so
that what it skips moves along with it, on diagonals of the attention matrix.

    t < N_att - 1          attend to all
    N_att - 1 <= t < N_r   attend to all but the skipped; if fewer than N_r - N_att are, skip from now on
                           the distance of the token that had least of this query's attention
    t >= N_r               drop the oldest, attend to all but the skipped
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policies.window import SlidingWindow
from arkv.policy import Observation, resolve_budget
from arkv.store import CachePlan, HeadFields, Store


@dataclass(frozen=True, kw_only=True)
class Diagonal(SlidingWindow):
    """A sliding window of which each head and each guidance row attends to a part that it finds for itself.

    The budget is the paper's N_r, half of the picture in its experiments. Condition tokens are attended to
    always (stated). The period only says how long dropped tokens stay in memory: nobody looks at them.

    Attributes:
        attended: visual tokens that a query attends to, its own counted, the paper's N_att (stated as a share
            of the picture: 20% to 4%). None: half of the budget (ours), or all of it where it holds the
            picture.
        sinks: first visual tokens that are kept and attended to always; 4 in the paper's variant "+sink4".
            They count in the budget and in `attended` (inferred).
    """

    head_fields: ClassVar[HeadFields] = {"skip": (torch.bool, "tokens")}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False  # what a head looks at goes by the one budget of all
    source: ClassVar[str] = "DiagonalAttn, arXiv 2609.19702"

    attended: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attended is not None and self.attended <= self.sinks:
            raise BudgetError(
                f"attended is {self.attended}: expected at least {self.sinks + 1}, one more than sinks"
            )

    def resident_tokens(self, grid: Grid) -> int:
        """The paper's N_r on this grid."""
        return resolve_budget(self.budget, self.ratio, grid.tokens)

    def attended_tokens(self, grid: Grid) -> int:
        """The paper's N_att on this grid."""
        resident = self.resident_tokens(grid)
        if self.attended is not None:
            return self.attended
        return resident if resident == grid.tokens else max(resident // 2, self.sink_tokens(grid) + 1)

    def least_budget(self, grid: Grid) -> int:
        """The sinks and one more."""
        return self.sink_tokens(grid) + 1

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """The resident window."""
        plan = super().plan(grid, spec)
        if self.attended is not None and self.attended > self.resident_tokens(grid):
            raise BudgetError(
                f"{type(self).__name__}: attended is {self.attended}, but only {plan.budget} of "
                f"{grid.tokens} visual tokens are resident; attend to at most so many"
            )
        return plan

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Skip one more distance while there are too few skipped."""
        resident, attended = self.resident_tokens(store.grid), self.attended_tokens(store.grid)
        skip = store["skip"]
        mass = torch.where(self.protected(store, step), torch.inf, self.of_picture(store, seen.mass))
        by_distance = mass.new_full((*skip.shape[:2], skip[0, 0].numel() + 1), torch.inf)
        by_distance = by_distance.scatter(-1, self._place(store, step), mass)[..., :-1].view_as(skip)
        by_distance = by_distance.masked_fill(skip, torch.inf)
        # Of equal ones the oldest, which is farthest away.
        least = store.grid.tokens - 1 - by_distance.flip(-1).argmin(-1, keepdim=True)
        few = skip.sum(-1, keepdim=True) < resident - attended
        more = (step >= attended - 1) & (step < resident) & few
        skip.logical_or_(more & (least == torch.arange(store.grid.tokens, device=skip.device)))

    def visible(self, store: Store, step: Tensor) -> Tensor:
        """Condition tokens, sinks, and the tokens of the window at distances that are not skipped."""
        # What lies outside of the window goes by one more entry, which is skipped.
        skip = pad(store["skip"].flatten(2), (0, 1), value=True)
        return self.protected(store, step) | ~skip.gather(-1, self._place(store, step))

    def _place(self, store: Store, step: Tensor) -> Tensor:
        """Where in `skip` each slot's head has its token's distance; past the end outside of the window."""
        tokens = store.grid.tokens
        distance = step - store.position
        window = self.resident_tokens(store.grid) - self.sink_tokens(store.grid)
        inside = (store.position >= 0) & (distance < window)
        return torch.where(inside, store.head * tokens + distance, store.kv_heads * tokens)
