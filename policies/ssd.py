"""SSD: spatial and semantic heads (arXiv 2510.18716, algorithm 1).

    before    each head is measured once: the share of its attention that goes beyond the neighbourhood
              of the query; above tau it is semantic, else spatial
    at every `buffer`-th token
              spatial   keep the last W tokens
              semantic  keep the M tokens of the largest sums of attention, from their birth on

`buffer=24` is the paper's "SSD w/ buffer", `buffer=1` the plain method. The authors have released no code.
What the paper leaves open is marked "inferred" below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from arkv.errors import ArkvError, BudgetError
from arkv.grid import Grid
from arkv.head_profile import HeadProfile
from arkv.model import ModelSpec
from arkv.policy import Observation, RankedPolicy, resolve_budget
from arkv.store import CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class SSD(RankedPolicy):
    """Two kinds of heads, known before the first picture, with a budget for each kind.

    `budget` (or `ratio`) is the mean over all heads of all layers, of visual tokens (inferred; the paper's
    memory figures speak for it). Spatial heads get W; what they leave is shared equally by the semantic ones,
    M = (B H - W n_spatial) / n_semantic, rounded down, at most N. If M would be less than W, both are B.

    Sums of attention are of each guidance row for itself (inferred), and of attention to the cached tokens
    only, as in the listing.

    Attributes:
        profile: file that `arkv profile` wrote; None for the one that comes with the model.
        tau: share of distant attention above which a head is semantic (unknown in the paper).
        window: the paper's W. None: r (P + 1) tokens, of lines of P, which reaches all of the neighbourhood
            that the profile counts as near, r cells upwards and to either side (the paper's is unknown).
        buffer: tokens between two evictions, kept beside the budget; None for a line.
        recent: newest tokens that semantic heads do not give up (ours; the listing protects none).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    head_fields: ClassVar[Mapping[str, torch.dtype]] = {"semantic": torch.bool}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    allocatable: ClassVar[bool] = False
    source: ClassVar[str] = "SSD, arXiv 2510.18716"

    profile: str | None = None
    tau: float = 0.5
    window: int | None = None
    buffer: int | None = None
    recent: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise BudgetError(f"tau is {self.tau}: expected a share from 0 to 1")
        for name, least in (("window", 1), ("buffer", 1), ("recent", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise BudgetError(f"{name} is {value}: expected at least {least} visual tokens")
        if self.period is not None:
            raise BudgetError("SSD has no period of its own: give it as buffer")

    def eviction_period(self, grid: Grid) -> int:
        """The buffer."""
        return grid.line if self.buffer is None else self.buffer

    def least_budget(self, grid: Grid) -> int:
        """The recent tokens of a semantic head."""
        return min(self.recent, grid.tokens)

    def measured(self, spec: ModelSpec) -> HeadProfile:
        """What is known of the heads.

        Raises:
            ArkvError: there is no profile, or it is of another model.
        """
        path = self.profile or spec.head_profile
        if path is None:
            raise ArkvError(
                f"SSD needs to know the heads of {spec.name}, and no profile comes with it: measure one "
                f"with 'arkv profile --model {spec.name} --out heads.json' and give profile='heads.json'"
            )
        profile = HeadProfile.load(Path(path))
        shape = {len(layer) for layer in profile.outside}
        if len(profile.outside) != spec.layers or shape != {spec.kv_heads}:
            raise ArkvError(
                f"{path} has {len(profile.outside)} layers of {sorted(shape)} heads, {spec.name} "
                f"{spec.layers} of {spec.kv_heads}: it was measured with another model"
            )
        return profile

    def semantic_heads(self, profile: HeadProfile) -> tuple[tuple[bool, ...], ...]:
        """Which key heads are semantic, by layer."""
        return tuple(tuple(share > self.tau for share in layer) for layer in profile.outside)

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """W for spatial heads, M for semantic ones."""
        uniform = super().plan(grid, spec)
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        profile = self.measured(spec)
        semantic = self.semantic_heads(profile)
        near = profile.radius * (grid.line + 1) if self.window is None else self.window
        window, memory = self.sizes(budget, near, sum(map(sum, semantic)), spec)
        by_head = tuple(tuple(memory if chosen else window for chosen in layer) for layer in semantic)
        return CachePlan(budget=by_head, period=uniform.period)

    @staticmethod
    def sizes(budget: int, window: int, semantic: int, spec: ModelSpec) -> tuple[int, int]:
        """W and M.

        Args:
            budget: mean visual tokens of a head.
            window: W, where there is room for it.
            semantic: number of semantic heads, all layers together.
            spec: the model's shape.
        """
        tokens, heads = spec.grid.tokens, spec.layers * spec.kv_heads
        spatial = heads - semantic
        window = min(window, tokens)
        if budget <= window or not spatial or not semantic:
            return budget, budget
        memory = (budget * heads - window * spatial) // semantic
        if memory < tokens:
            return window, memory
        # Semantic heads hold everything: the others get what is left.
        return min((budget * heads - tokens * semantic) // spatial, tokens), tokens

    def begin(self, store: Store) -> None:
        """Tell every head its kind."""
        heads = self.semantic_heads(self.measured(store.spec))
        kinds = torch.tensor(heads, device=store.position.device)
        store["semantic"].copy_(kinds[:, None].expand_as(store["semantic"]))

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Add this token's attention to the sums."""
        store["score"].add_(seen.mass)

    def protected(self, store: Store, step: Tensor) -> Tensor:
        """The newest tokens."""
        return store.position >= step - self.least_budget(store.grid)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """Sum of attention in semantic heads, position in spatial ones."""
        semantic = store.of_slots(store["semantic"])
        return torch.where(semantic, store["score"], store.position.float())
