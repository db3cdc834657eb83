"""A run of a policy under given tokens, looked at after every token, and what has to hold then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arkv.decoding.checks import check_selection
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.policy import CachePolicy, Observation
from arkv.store import CONDITION, FREE, PADDING, CachePlan, Store
from arkv.testing.cases import Case
from arkv.testing.oracle import Oracle, Place
from arkv.testing.stores import columns, count_by_head, count_by_token, owners

ROUNDING = 1e-4
"""How far float32 may be from the oracle, or from the same sums in another order, absolute and relative."""


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Fail unless two tensors are the same beyond rounding; NaN equals NaN."""
    torch.testing.assert_close(
        actual, expected, atol=ROUNDING, rtol=ROUNDING, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )


@dataclass
class Eviction:
    """One eviction.

    Attributes:
        slots: what `select` returned.
        head: int64 `[layers, rows, slots]`, to whom the slots belonged.
        before: int32 `[layers, rows, slots]`, the positions when `select` was asked.
        after: int32 `[layers, rows, slots]`, the positions when `evict` was done.
    """

    slots: Tensor
    head: Tensor
    before: Tensor
    after: Tensor

    @property
    def chosen(self) -> Tensor:
        """Bool `[layers, rows, slots]`: where `slots` are."""
        return torch.zeros_like(self.before, dtype=torch.bool).scatter(-1, self.slots.flatten(2), True)


class Watched(CachePolicy):
    """A policy that does as another does, and remembers what happened last.

    Attributes:
        inner: the policy watched.
        eviction: the last eviction; None until there is one, and whoever has looked at it may say so again.
        seen: everything that the last token's queries saw.
        attended: bool `[layers, rows, slots]`: what they looked at.
        columns: where the tokens they looked at stand, from `arkv.testing.stores.columns`.
    """

    inner: CachePolicy
    eviction: Eviction | None
    seen: Observation
    attended: Tensor
    columns: list[list[list[tuple[int, int]]]]

    def __init__(self, inner: CachePolicy) -> None:
        self._set(inner=inner, fields=inner.fields, head_fields=inner.head_fields, eviction=None)
        self._set(needs=inner.needs | set(Observation._fields))

    def _set(self, **attributes: Any) -> None:
        vars(self).update(attributes)  # policies are frozen

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        """As the policy does."""
        return self.inner.plan(grid, spec)

    def begin(self, store: Store) -> None:
        """As the policy does."""
        self.inner.begin(store)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Show the policy what it asked for and nothing else."""
        self._set(seen=seen)
        if self.inner.needs:
            wanted = {name: getattr(seen, name) for name in self.inner.needs}
            self.inner.observe(store, Observation(**wanted), step)

    def select(self, store: Store, step: Tensor) -> Tensor:
        """As the policy does."""
        self._set(before=store.position.clone(), head=owners(store).clone())
        return self.inner.select(store, step)

    def evict(self, store: Store, slots: Tensor) -> None:
        """As the policy does."""
        self.inner.evict(store, slots)
        before, head = vars(self)["before"], vars(self)["head"]
        self._set(eviction=Eviction(slots.clone(), head, before, store.position.clone()))

    def visible(self, store: Store, step: Tensor) -> Tensor | None:
        """As the policy does."""
        limit = self.inner.visible(store, step)
        resident = store.resident
        self._set(attended=resident if limit is None else resident & limit)
        self._set(columns=columns(store, store.position, owners(store)))
        return limit


class Run:
    """A case being decoded.

    Attributes:
        case: what is decoded.
        watched: its policy.
        loop: the runtime.
        store: the runtime's store.
        oracle: the batch without a cache policy; decoded along only if `follow` is called after each token.
        position: the token decoded last; -1 after the prefill.
        logits: of the token after it.
        eviction: the one that preceded it; None where none did.
        born: the first of the tokens that were decoded since the last eviction.
    """

    def __init__(self, case: Case) -> None:
        self.case, self.watched = case, Watched(case.policy)
        self.loop, self.condition = case.begin(self.watched)
        self.store = self.loop.store
        self.oracle = Oracle(case.model, self.condition)
        self.position, self.born = -1, 0
        self.eviction: Eviction | None = None
        self.logits = self.loop.prefill_(self.condition)
        self.held = count_by_token(self.store) > 0
        self.held_before = self.held

    def advance(self) -> None:
        """Decode one more token."""
        self.watched._set(eviction=None)
        self.position += 1
        self.logits = self.loop.advance_(self.case.rows[:, self.position], self.position)
        self.eviction = self.watched.eviction
        if self.eviction is not None:
            self.born = self.position
        self.held_before, self.held = self.held, count_by_token(self.store) > 0

    def follow(self) -> Tensor:
        """The oracle's logits after the same token, looking at what the runtime looked at."""
        if self.position < 0:
            return self.oracle.prefill()
        tokens = self.case.rows[:, self.position]
        return self.oracle.advance(tokens, self.position, self.attended_columns())

    def attended_columns(self) -> dict[Place, set[int]]:
        """By layer, row and key head, what the last token looked at, as columns of the sequence."""
        attended: dict[Place, set[int]] = {place: set() for place in self.oracle.heads}
        for layer, row, slot in self.watched.attended.nonzero().tolist():
            head, column = self.watched.columns[layer][row][slot]
            attended[layer, row, head].add(column)
        return attended


Invariant = Callable[[Run], None]
"""Looks at a run after a token and fails if something is wrong."""


def check(case: Case, *invariants: Invariant) -> None:
    """Decode a case and look at it after the prefill and after every token."""
    run = Run(case)
    for _ in range(case.model.spec.grid.tokens):
        for invariant in invariants:
            invariant(run)
        if run.position + 2 < case.model.spec.grid.tokens:
            run.advance()


def budgets_hold(run: Run) -> None:
    """Invariant 1: no head holds more than its budget after an eviction, nor ever more than its capacity."""
    store, plan, spec = run.store, run.store.plan, run.case.model.spec
    budgets = torch.tensor(plan.budgets(spec))[:, None]
    capacities = torch.tensor(plan.visual_slots(spec))[:, None]

    def held(position: Tensor, head: Tensor) -> Tensor:
        counts = count_by_head(position >= 0, head, store.kv_heads)
        return counts.sum(-1, keepdim=True) if plan.shared else counts

    if plan.shared:
        budgets, capacities = budgets.sum(-1, keepdim=True), capacities.sum(-1, keepdim=True)
    assert (held(store.position, owners(store)) <= capacities).all(), "more tokens held than there are slots"
    eviction = run.eviction
    assert run.position < 0 or (run.position % plan.period == 0) == (eviction is not None)
    if eviction is not None:
        counts = held(eviction.after, eviction.head)
        assert (counts <= budgets).all(), (
            f"after the eviction at token {run.position} heads hold {counts.tolist()} visual tokens, the "
            f"plan allows {budgets.tolist()}"
        )


def tokens_are_themselves(run: Run) -> None:
    """Invariant 2: condition tokens stay, no token stands twice in a head or comes back once it is gone."""
    store, spec = run.store, run.case.model.spec
    mask, head, kv_heads = run.condition.mask, owners(store), store.kv_heads
    for marker, wanted in ((CONDITION, mask.sum(1)), (PADDING, (~mask).sum(1))):
        count = count_by_head(store.position == marker, head, kv_heads)
        expected = wanted[None, :, None].expand_as(count)
        what = "condition tokens" if marker == CONDITION else "padding slots"
        assert torch.equal(count, expected), (
            f"heads have {count.tolist()} {what} instead of {wanted.tolist()}"
        )
    outside = (head == kv_heads) == (torch.arange(store.slots) >= torch.tensor(store.pools)[:, None, None])
    assert outside.all(), "a slot belongs to no head"
    assert (store.position >= PADDING).all()
    assert (store.position <= run.position).all(), "a token is held that is not born yet"
    assert (count_by_token(store) <= 1).all(), "a token stands twice in a head"
    came_back = run.held & ~run.held_before
    came_back[..., max(run.position, 0) : spec.grid.tokens] = False
    assert not came_back.any(), "a token that was given up is held again"


def attention_is_exact(run: Run) -> None:
    """Invariant 3: the output is softmax attention over what is attended to, and so is what a policy sees."""
    expected = run.follow()
    assert_close(run.logits, expected, "logits")
    if run.position < 0:
        return
    seen, attended, oracle = run.watched.seen, run.watched.attended, run.oracle
    assert seen.mass is not None and seen.scores is not None and seen.queries is not None  # noqa: PT018
    assert torch.equal(seen.mass > 0, attended), "attention mass is zero exactly where nothing is attended to"
    mass, scores = torch.zeros_like(seen.mass), torch.zeros_like(seen.scores)
    for layer, row, slot in attended.nonzero().tolist():
        head, column = run.watched.columns[layer][row][slot]
        mass[layer, row, slot] = oracle.mass[layer, row, head][column]
        scores[layer, row, slot] = oracle.scores[layer, row, head][column]
    assert_close(seen.mass, mass, "mass")
    assert_close(seen.scores, scores, "scores")
    assert_close(seen.queries.double(), torch.from_numpy(oracle.queries), "queries")


def every_head_sees(run: Run) -> None:
    """A policy that limits what is attended to leaves every head something, else there is no softmax."""
    if run.position >= 0:
        count = count_by_head(run.watched.attended, owners(run.store), run.store.kv_heads)
        assert (count > 0).all(), f"the token at {run.position} may look at nothing in some head"


def newborns_live(run: Run) -> None:
    """Invariant 4: a token lives at least until the eviction after its birth."""
    if run.position >= 0:
        missing = ~run.held[..., run.born : run.position + 1].all(-1)
        assert not missing.any(), (
            f"of the tokens {run.born} to {run.position}, born since the last eviction, some are gone in the "
            f"heads [layer, row, head] {missing.nonzero().tolist()}"
        )


def evictions_are_legal(run: Run) -> None:
    """What `select` owes: legal slots, free ones first; and `evict`: to free them, and to move nothing."""
    eviction, store = run.eviction, run.store
    if eviction is None:
        return
    legal_selection(run.watched.inner, store, eviction.slots, eviction.before, eviction.head)
    assert (eviction.after[eviction.chosen] == FREE).all(), (
        "evict left a token where the next will be written"
    )
    changed = eviction.after != eviction.before
    assert (eviction.before[changed] >= 0).all(), "evict wrote to a slot that holds no visual token"
    assert (eviction.after[changed] == FREE).all(), "evict gave a slot another token"


def legal_selection(policy: CachePolicy, store: Store, slots: Tensor, before: Tensor, head: Tensor) -> None:
    """Fail unless slots are distinct, recyclable, the head's own, and as far as possible free.

    Args:
        policy: who selected.
        store: its plan decides whether heads share.
        slots: what `select` returned.
        before: int32 `[layers, rows, slots]`, the positions it looked at.
        head: int64 `[layers, rows, slots]`, the owners it looked at.
    """
    check_selection(policy, _Past(store, before, head), slots)  # type: ignore[arg-type]
    chosen = torch.zeros_like(before, dtype=torch.bool).scatter(-1, slots.flatten(2), True)
    given_up = count_by_head(chosen & (before >= 0), head, store.kv_heads)
    left_free = count_by_head((before == FREE) & ~chosen, head, store.kv_heads)
    if store.plan.shared:
        given_up, left_free = given_up.sum(-1), left_free.sum(-1)
    wasted = (given_up > 0) & (left_free > 0)
    assert not wasted.any(), f"a token is given up while a slot is free: {wasted.nonzero().tolist()}"


class _Past:
    """A store as it was when the policy was asked, as far as `check_selection` looks at one."""

    def __init__(self, store: Store, position: Tensor, head: Tensor) -> None:
        self.layers, self.rows, self.kv_heads = store.layers, store.rows, store.kv_heads
        self.plan, self.slots, self.position, self.head = store.plan, store.slots, position, head
        self.recyclable = position >= FREE


EVERY_INVARIANT: tuple[Invariant, ...] = (
    budgets_hold,
    tokens_are_themselves,
    every_head_sees,
    attention_is_exact,
    newborns_live,
    evictions_are_legal,
)
"""What can be looked at after a token of a single run."""


@contextmanager
def nothing_moves(store: Store) -> Iterator[None]:
    """Fails unless every tensor of a store stays where it is, none is added, and the store stays locked."""

    def addresses() -> dict[str, Any]:
        found: dict[str, Any] = {name: id(value) for name, value in vars(store).items()}
        for name, value in vars(store).items():
            tensors = value if isinstance(value, (list, tuple)) else [value]
            found[f"{name} at"] = [x.data_ptr() for x in tensors if isinstance(x, Tensor)]
        for key, leaf in store.tensors.items(include_nested=True, leaves_only=True):
            found[str(key)] = (leaf.data_ptr(), tuple(leaf.shape), leaf.dtype)
        return found

    before = addresses()
    yield
    after = addresses()
    moved = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    assert not moved, f"the store's tensors must stay where they are, these did not: {moved}"
    assert store.tensors.is_locked, "the store was unlocked"
