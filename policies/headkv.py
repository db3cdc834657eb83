"""HeadKV: local and global heads, told apart while the picture is drawn (arXiv 2605.20600).

    visual tokens of a head:   [ history | recent window of w tokens ]

    until `warmup` tokens are cached   keep all
    then, once, in every head          add up the newest query's attention, from the newest token back,
                                       until it reaches tau; fewer than w tokens: local, else global
    at the end of a line   local       drop the history
                           global      drop M tokens of the history, so that B remain in all:
                                       the M/2 of lowest score among its oldest r_s, M/2 among the others

A token's score is the mean scaled dot product with the queries of the last line. The authors have released
no code. What the paper leaves open is marked "inferred" below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import (
    Observation,
    RankedPolicy,
    check_choice,
    least_of_layer,
    rank_in_head,
    resolve_budget,
)
from arkv.store import CONDITION, CachePlan, Store


@dataclass(frozen=True, kw_only=True)
class HeadKV(RankedPolicy):
    """A sliding window for local heads, stratified token eviction for global ones.

    Heads are grouped for each picture and each guidance row (inferred; with `share_rows` by both together).
    The budget is that of a global head and includes its recent window (inferred). Evictions are a line apart
    (inferred, as in LineAR). If the cache is full before `warmup` tokens, grouping is done then.

    The pool of a layer is allocated before anything is known of its heads: it has room for `local_share` of
    them being local. In a picture with fewer local heads the global ones keep a little less than their
    budget, in one with more some slots stay empty.

    Attributes:
        warmup: cached tokens, the condition's among them (inferred), before heads are grouped. None: the
            paper's 100 for up to 576 visual tokens, 300 for up to 2352, 500 for more.
        tau: attention that has to be found within the window for a head to be local (0.9).
        window: recent tokens that every head keeps, and the limit of local attention (stated as
            "typically two rows"; that both are the same number is inferred). None: two lines, or one where
            the budget does not hold two.
        stratum: share of the history that counts as far away, the paper's r_s (0.5).
        scope: what a head's attention is measured against when it is grouped: "all" tokens, as the paper's
            words say, or the "visual" ones alone.
        scoring: "raw" scaled dot products, as printed, or "softmax" attention.
        local_share: share of local heads that memory is planned for (ours; the paper's memory figures
            speak for 0.06 to 0.17).
        redistribute: give what local heads leave to the global heads of the same layer, so that memory is
            that of the budget in every head (ours).
    """

    fields: ClassVar[Mapping[str, torch.dtype]] = {"score": torch.float32}
    head_fields: ClassVar[Mapping[str, torch.dtype]] = {"local": torch.bool}
    needs: ClassVar[frozenset[str]] = frozenset({"mass", "scores"})
    source: ClassVar[str] = "HeadKV, arXiv 2605.20600"

    warmup: int | None = None
    tau: float = 0.9
    window: int | None = None
    stratum: float = 0.5
    scope: Literal["all", "visual"] = "all"
    scoring: Literal["raw", "softmax"] = "raw"
    local_share: float = 0.1
    redistribute: bool = False

    def __post_init__(self) -> None:
        for name in ("warmup", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BudgetError(f"{name} is {value}: expected at least 1 visual token")
        for name in ("tau", "stratum", "local_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise BudgetError(f"{name} is {getattr(self, name)}: expected a share from 0 to 1")
        check_choice(self, "scope")
        check_choice(self, "scoring")

    def recent_tokens(self, grid: Grid) -> int:
        """Tokens of the recent window on this grid; all of them if nothing has to be compressed."""
        budget = resolve_budget(self.budget, self.ratio, grid.tokens)
        if budget == grid.tokens:
            return budget
        if self.window is not None:
            return min(self.window, grid.tokens)
        return 2 * grid.line if budget >= 2 * grid.line else grid.line

    def least_budget(self, grid: Grid) -> int:
        """The recent window."""
        return self.recent_tokens(grid)

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """One pool a layer, with room for the local heads that are expected."""
        uniform = super().plan(grid, spec)
        assert isinstance(uniform.budget, int)
        spared = 0.0 if self.redistribute else self.local_share * (uniform.budget - self.recent_tokens(grid))
        return CachePlan(budget=round(uniform.budget - spared), period=uniform.period, shared=True)

    def grouping_step(self, store: Store) -> Tensor:
        """Visual tokens decoded when heads are grouped: a line end at which none has been given up yet.

        Returns:
            int64 `[layers, rows, kv_heads]`, for all heads of a row the same.
        """
        plan, tokens = store.plan, store.grid.tokens
        assert isinstance(plan.budget, int)
        warmup = self.warmup
        if warmup is None:
            warmup = 100 if tokens <= 576 else 300 if tokens <= 2352 else 500
        # A row's own condition tokens: how much padding it has depends on what else is in the batch.
        condition = self.of_picture(store, store.sum_by_head(store.position == CONDITION).long())
        if self.share_rows and store.guided:
            condition = condition // 2
        # No more are cached by the end of the picture; a larger number may not fit into a tensor.
        warmup = min(warmup, store.condition + tokens)
        lines = -((condition - warmup).clamp(max=-1) // plan.period)
        return lines.clamp(max=plan.budget // plan.period + 1) * plan.period

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Sum up the line's scores; group the heads when the time has come."""
        store["score"].add_(seen.scores if self.scoring == "raw" else seen.mass)
        grouped = step == self.grouping_step(store) - 1
        store["local"].copy_(torch.where(grouped, self.is_local(store, seen.mass, step), store["local"]))

    def is_local(self, store: Store, mass: Tensor, step: Tensor) -> Tensor:
        """Whether fewer than `window` tokens, from the newest back, have the share `tau` of the attention.

        Args:
            store: positions and heads.
            mass: float32 `[layers, rows, slots]`.
            step: int64 0-d, position of the token whose query looked.

        Returns:
            bool `[layers, rows, kv_heads]`.
        """
        window = self.recent_tokens(store.grid)
        mass = self.of_picture(store, mass)
        near = store.sum_by_head(mass * (store.position > step - (window - 1)))
        whole = store.sum_by_head(mass if self.scope == "all" else mass * (store.position >= 0))
        return near >= self.tau * whole

    def given_up(self, store: Store, step: Tensor) -> Tensor:
        """The tokens that the budgets of their heads do not hold, bool `[layers, rows, slots]`."""
        window = self.recent_tokens(store.grid)
        history = (store.position >= 0) & (store.position < step - window)
        length = store.sum_by_head(history).long()
        room = self.global_budget(store) - window
        excess = (length - room).clamp(min=0)
        dropped = stratified(store, history, length, excess, self._line_score(store), self.stratum)
        return torch.where(store.of_slots(store["local"]), history, dropped)

    def global_budget(self, store: Store) -> Tensor:
        """Visual tokens that there is room for in each global head, int64 `[layers, rows, 1]`."""
        tokens, window = store.grid.tokens, self.recent_tokens(store.grid)
        assert isinstance(store.plan.budget, int)
        most = tokens if self.redistribute else resolve_budget(self.budget, self.ratio, tokens)
        local = store["local"].sum(-1, keepdim=True)
        left = store.plan.budget * store.kv_heads - local * window
        return (left // (store.kv_heads - local).clamp(min=1)).clamp(max=most)

    def score(self, store: Store, step: Tensor) -> Tensor:
        """2 for what stays, 1 for what a global head gives up, 0 for what a local one does."""
        dropped = self.given_up(store, step)
        return torch.where(dropped, torch.where(store.of_slots(store["local"]), 0.0, 1.0), 2.0)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """The free slots of the layer, then what its heads give up."""
        return least_of_layer(store, self.worth(store, step))

    def evict(self, store: Store, slots: Tensor) -> None:
        """Give up the slots and all that is over a head's budget, and forget the line's scores."""
        if not self.redistribute:
            step = store.position.amax() + 1
            store.free_where_(self.given_up(store, step))
        super().evict(store, slots)
        store["score"].zero_()

    def _line_score(self, store: Store) -> Tensor:
        return self.of_picture(store, store["score"])


def stratified(
    store: Store, history: Tensor, length: Tensor, excess: Tensor, score: Tensor, stratum: float
) -> Tensor:
    """Stratified token eviction (section on eviction of 2605.20600).

    Args:
        store: positions and heads.
        history: bool `[layers, rows, slots]`, the tokens to choose from.
        length: int64 `[layers, rows, kv_heads]`, how many a head has of them.
        excess: int64, as `length`: how many of them each head has to give up, the paper's M; of an odd
            number the newer part gives up one more (inferred).
        score: float32 `[layers, rows, slots]`.
        stratum: share of the history, by number of tokens from the oldest, that is ranked by itself.

    Returns:
        bool `[layers, rows, slots]`: what is given up.
    """
    far_length = (length * stratum).long()
    age = rank_in_head(store, torch.where(history, store.position.float(), torch.inf))
    far = history & (age < store.of_slots(far_length))
    near = history & ~far
    # What one part does not have, the other has to give.
    from_far = torch.minimum(excess // 2, far_length)
    from_near = torch.minimum(excess - from_far, length - far_length)
    from_far = torch.minimum(excess - from_near, far_length)
    count = torch.where(near, store.of_slots(from_near), store.of_slots(from_far))
    return history & (rank_in_head(store, torch.where(history, score, torch.inf), apart=near) < count)
