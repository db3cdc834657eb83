"""front: a window for every head that needs no more, the last line's looks for the others (ours).

    before                  W_h = the least window that leaves out no more than tau of head h's attention
                            slots are shared out as water fills vessels: the head of the smallest W_h first,
                            as long as W_h is at most three times the equal share M of the rest
    at the end of a line    heads with a window   keep the last W_h tokens
                            the others            keep M tokens: the R newest and, of the rest, those that
                                                  this line looked at most

The guide to policies has the derivation. Slots in eight or four bits are the decoder's `kv_dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.head_profile import HeadProfile, profile_files
from arkv.model import ModelSpec
from arkv.policy import Observation, RankedPolicy, resolve_budget
from arkv.store import CachePlan, Store

MOST_SHARES = 3
"""Equal shares that a window may take: a head whose window is cut loses more than its slots bring."""

Windows = dict[tuple[int, int], int]
"""Tokens by layer and key head."""


@dataclass(frozen=True, kw_only=True)
class Front(RankedPolicy):
    """Windows for heads that need no more; what the last line looked at, for the others.

    `budget` (or `ratio`) is the mean over all heads of all layers, of visual tokens. A model without a
    profile has no windows: its heads are all ranked, with B tokens each. `arkv profile` measures one.

    Attributes:
        profile: file that `arkv profile` wrote; None for the one that comes with the model, if one does.
        tau: share of a head's attention that a window may leave out, in whole percents.
        recent: newest tokens that ranked heads never give up, R. None: a line and one, which reaches the
            neighbours above the next token.
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    head_fields: ClassVar[Mapping[str, torch.dtype]] = {"windowed": torch.bool}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False
    source: ClassVar[str] = "ours"

    profile: str | None = None
    tau: float = 0.02
    recent: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise BudgetError(f"tau is {self.tau}: expected a share from 0 to 1")
        if self.recent is not None and self.recent < 0:
            raise BudgetError(f"recent is {self.recent}: expected 0 or more visual tokens")

    def recent_tokens(self, grid: Grid) -> int:
        """Newest tokens that a ranked head keeps on this grid."""
        return min(grid.line + 1 if self.recent is None else self.recent, grid.tokens)

    def least_budget(self, grid: Grid) -> int:
        """The newest tokens, which no ranked head gets less than."""
        return self.recent_tokens(grid)

    def files(self, spec: ModelSpec) -> Sequence[Path]:
        """The profile, if there is one."""
        return profile_files(spec, self.profile)

    def shares(self, spec: ModelSpec) -> tuple[Windows, int]:
        """Who gets how many tokens.

        Returns:
            The heads that have a window, with W_h, and what each of the others gets, M. Where none is left,
            what their windows leave makes them wider.

        Raises:
            ArkvError: the profile cannot be read, or is of another model.
        """
        tokens, heads = spec.grid.tokens, spec.layers * spec.kv_heads
        budget = resolve_budget(self.budget, self.ratio, tokens)
        left, windows = budget * heads, Windows()
        for path in self.files(spec) if budget < tokens else ():  # with room for all, nothing is left out
            needed = HeadProfile.of_model(spec, path).windows(self.tau)
            places = [(w, layer, head) for layer, row in enumerate(needed) for head, w in enumerate(row)]
            for needs, layer, head in sorted(place for place in places if place[0] < tokens):
                window = max(1, needs)
                rest = left - window - (heads - 1) * max(1, self.least_budget(spec.grid))
                if window * heads > MOST_SHARES * left or rest < 0:
                    break
                windows[layer, head] = window
                left, heads = left - window, heads - 1
        if not heads:
            return widened(windows, left, tokens), 0
        return windows, min(left // heads, tokens)

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """W_h for heads with a window, M for the others."""
        uniform = super().plan(grid, spec)
        windows, share = self.shares(spec)
        if not windows:
            return uniform
        by_head = tuple(
            tuple(windows.get((layer, head), share) for head in range(spec.kv_heads))
            for layer in range(spec.layers)
        )
        return CachePlan(budget=by_head, period=uniform.period)

    def begin(self, store: Store) -> None:
        """Tell every head whether it has a window."""
        windows, _ = self.shares(store.spec)
        places = [[(layer, head) for head in range(store.kv_heads)] for layer in range(store.layers)]
        store.tell_heads_("windowed", [[place in windows for place in layer] for layer in places])

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Sum up what this line looks at."""
        store["score"].add_(seen.mass)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """Newest tokens of ranked heads."""
        newest = store.position >= step - self.recent_tokens(store.grid)
        return newest & ~store.of_slots(store["windowed"])

    def score(self, store: Store, step: Tensor) -> Tensor:
        """Position in heads with a window, what the last line looked at in the others."""
        return torch.where(store.of_slots(store["windowed"]), store.position.float(), store["score"])

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots and forget the line's looks: the next line judges anew."""
        super().evict(store, slots)
        store["score"].zero_()


def widened(windows: Windows, slots: int, most: int) -> Windows:
    """Windows that share out more slots evenly, as far as there are tokens.

    Args:
        windows: of all heads.
        slots: what there is beside them.
        most: tokens of a picture.
    """
    wider = Windows()
    for place in sorted(windows, key=windows.__getitem__, reverse=True):  # the widest has the least room
        more = min(slots // (len(windows) - len(wider)), most - windows[place])
        wider[place], slots = windows[place] + more, slots - more
    return wider
