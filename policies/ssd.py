"""SSD: spatial and semantic heads (arXiv 2510.18716, algorithm 1).

    before    each head is measured once: the share of its attention that a window of W tokens leaves out;
              above tau it is semantic, else spatial
    at every `buffer`-th token
              spatial   keep the last W tokens
              semantic  keep the R newest tokens and, of the others, the M of the largest sums of attention

`SSD(recent=1, buffer=1)` is algorithm 1 to the letter, `buffer=24` the paper's "SSD w/ buffer". The authors
have released no code. What the paper leaves open is marked "inferred" below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from arkv.errors import ArkvError, BudgetError
from arkv.grid import Grid
from arkv.head_profile import HeadProfile, profile_files, usual_window
from arkv.model import ModelSpec
from arkv.policy import Observation, RankedPolicy, resolve_budget
from arkv.store import CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class SSD(RankedPolicy):
    """Two kinds of heads, known before the first picture, with a budget for each kind.

    `budget` (or `ratio`) is the mean over all heads of all layers, of visual tokens (inferred; the paper's
    memory figures speak for it). Spatial heads get W; what they leave is shared equally by the semantic ones,
    M + R = (B H - W n_spatial) / n_semantic, rounded down, at most N. If that would be less than W, all heads
    get B.

    Sums of attention are of each guidance row for itself (inferred). As in the listing, a token's attention
    to itself does not count: it is left out of the softmax. Query heads that share a key head count by what
    they pay together, then without their own (the paper's models have no such heads).

    Defaults are what the authors' figures speak for on pictures of 24 x 24: W 64 at every budget, 32 newest
    tokens of semantic heads beside M, and as many semantic heads as tau 0.2 gives. On other grids W and R
    scale with the line, as what a head looks at nearby is above the query; tau, a share, does not.

    Attributes:
        profile: file that `arkv profile` wrote; None for the one that comes with the model.
        tau: share of attention left out by the window above which a head is semantic, to a percent
            (inferred).
        window: the paper's W. None: 8/3 lines (inferred: 64 in lines of 24).
        recent: newest tokens that semantic heads do not give up, R; 1 for the listing, which appends the
            newest token after ranking. None: 4/3 lines (inferred: 32 in lines of 24), at most half of the
            budget.
        buffer: tokens between two evictions; None for a line, which is the paper's 24 on its models.
        buffer_within: whether the buffer takes its room from the budget, so that a head never holds more
            than that, instead of lying beside it (both are readings: the paper's buffered variant takes a
            little less memory than the plain one).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    head_fields: ClassVar[Mapping[str, torch.dtype]] = {"semantic": torch.bool}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False
    source: ClassVar[str] = "SSD, arXiv 2510.18716"

    profile: str | None = None
    tau: float = 0.2
    window: int | None = None
    recent: int | None = None
    buffer: int | None = None
    buffer_within: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise BudgetError(f"tau is {self.tau}: expected a share from 0 to 1")
        for name, least in (("window", 1), ("recent", 0), ("buffer", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BudgetError(f"{name} is {value}: expected at least {least} visual tokens")
        if self.period is not None:
            raise BudgetError("SSD has no period of its own: give it as buffer")

    def eviction_period(self, grid: Grid) -> int:
        """The buffer."""
        return grid.line if self.buffer is None else self.buffer

    def recent_tokens(self, grid: Grid) -> int:
        """Newest tokens that a semantic head keeps on this grid."""
        if self.recent is not None:
            return min(self.recent, grid.tokens)
        return min(round(grid.line * 32 / 24), resolve_budget(self.budget, self.ratio, grid.tokens) // 2)

    def least_budget(self, grid: Grid) -> int:
        """The recent tokens of a semantic head, and a buffer that takes its room from the budget."""
        buffer = self.eviction_period(grid) if self.buffer_within else 0
        return self.recent_tokens(grid) + buffer

    def files(self, spec: ModelSpec) -> Sequence[Path]:
        """The profile, if there is one."""
        return profile_files(spec, self.profile)

    def measured(self, spec: ModelSpec) -> HeadProfile:
        """What is known of the heads.

        Raises:
            ArkvError: there is no profile, or it is of another model.
        """
        files = self.files(spec)
        if not files:
            raise ArkvError(
                f"SSD needs to know the heads of {spec.name}, and no profile comes with it: measure one "
                f"with 'arkv profile --model {spec.name} --out heads.json' and give profile='heads.json'"
            )
        (path,) = files
        return HeadProfile.of_model(spec, path)

    def window_tokens(self, grid: Grid) -> int:
        """The paper's W on this grid, where there is room for it."""
        return min(usual_window(grid) if self.window is None else self.window, grid.tokens)

    def semantic_heads(self, spec: ModelSpec) -> tuple[tuple[bool, ...], ...]:
        """Which key heads are semantic, by layer."""
        left_out = self.measured(spec).left_out(self.window_tokens(spec.grid))
        return tuple(tuple(share >= self.tau for share in layer) for layer in left_out)

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """W for spatial heads, M + R for semantic ones."""
        uniform = super().plan(grid, spec)
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        semantic = self.semantic_heads(spec)
        window, memory = self.sizes(budget, self.window_tokens(grid), sum(map(sum, semantic)), spec)
        if self.buffer_within:
            if window <= uniform.period:
                raise BudgetError(
                    f"SSD: a window of {window} tokens has no room for a buffer of {uniform.period} within: "
                    f"give a buffer of at most {window - 1}"
                )
            window, memory = window - uniform.period, memory - uniform.period
        by_head = tuple(tuple(memory if chosen else window for chosen in layer) for layer in semantic)
        return CachePlan(budget=by_head, period=uniform.period)

    @staticmethod
    def sizes(budget: int, window: int, semantic: int, spec: ModelSpec) -> tuple[int, int]:
        """W and M + R.

        Args:
            budget: mean visual tokens of a head.
            window: W, at most as many as there are tokens.
            semantic: number of semantic heads, all layers together.
            spec: the model's shape.
        """
        tokens, heads = spec.grid.tokens, spec.layers * spec.kv_heads
        spatial = heads - semantic
        if budget <= window or not spatial or not semantic:
            return budget, budget
        memory = (budget * heads - window * spatial) // semantic
        if memory < tokens:
            return window, memory
        # Semantic heads hold everything: the others get what is left.
        return min((budget * heads - tokens * semantic) // spatial, tokens), tokens

    def begin(self, store: Store) -> None:
        """Tell every head its kind."""
        store.tell_heads_("semantic", self.semantic_heads(store.spec))

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add this token's attention to the others to their sums."""
        others = torch.where(store.position == step, 0, seen.mass)
        whole = store.of_slots(store.sum_by_head(others)).clamp(min=torch.finfo(torch.float32).tiny)
        store["score"].add_(others / whole)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The newest tokens."""
        return store.position >= step - self.recent_tokens(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """Sum of attention in semantic heads, position in spatial ones."""
        semantic = store.of_slots(store["semantic"])
        return torch.where(semantic, store["score"], store.position.float())
