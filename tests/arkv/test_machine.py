"""Store and policy driven at random, beside Python lists that say what has to be held."""

from typing import Any

import numpy
import oracle
import pytest
import torch
from hypothesis import assume, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import WORD, Entry, Head, Linear
from tiny import POLICIES, Tiny, build, legal_budgets

from arkv import Grid, Store
from arkv.attention import slot_attention
from arkv.loop import recycle_
from arkv.store import CONDITION, FREE, PADDING, write_

FEW = settings(max_examples=max(1, settings().max_examples // 3), stateful_step_count=25)
GRIDS = [Grid(4, 4), Grid(3, 3, newline=True), Grid(5, 2)]


class Decoding(RuleBasedStateMachine):
    """Tokens with random keys, values and queries go through a store, as if a model had made them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        draw = data.draw
        kv_heads, self.group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)]))
        self.model = Tiny(
            draw(st.sampled_from(GRIDS)), draw(st.integers(1, 2)), kv_heads * self.group, kv_heads
        )
        self.grid = self.model.spec.grid
        self.parameters = {
            "window": {"sinks": 2},
            "linear": {"anchors": draw(st.integers(0, 2)), "recent": draw(st.integers(0, 5))},
            "often": {"anchors": 1, "recent": draw(st.integers(0, 3)), "every": draw(st.integers(1, 5))},
        }.get(self.name, {})
        budget = draw(st.sampled_from(legal_budgets(self.name, self.model, **self.parameters)))
        self.policy = build(self.name, budget, **self.parameters)
        plan = self.policy.plan(self.grid, self.model.spec)
        self.rows, self.words = draw(st.integers(1, 3)), draw(st.integers(1, 3))
        self.store = Store(self.model.spec, plan, self.rows, self.words, self.policy.fields, torch.float32)
        self.places = list(numpy.ndindex(*self.store.position.shape[:3]))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.addresses = [leaf.data_ptr() for leaf in self.leaves()]
        self.rule = self.rule_of_the_paper(budget)
        self.restart()

    def rule_of_the_paper(self, budget: int) -> oracle.Rule | None:
        """What the oracle keeps, or None where the policy alone can say."""
        if self.name in ("linear", "often"):
            return Linear(budget, self.parameters["anchors"], self.parameters["recent"])
        return {"full": oracle.keep_all, "window": oracle.window(budget, 2)}.get(self.name)

    def leaves(self) -> list[torch.Tensor]:
        return list(self.store.tensors.values(include_nested=True, leaves_only=True))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 2

    @rule()
    def restart(self) -> None:
        """A new picture in the same store, with other words."""
        lengths = torch.randint(1, self.words + 1, (self.rows, 1), generator=self.generator)
        mask = torch.arange(self.words) >= self.words - lengths
        self.store.reset_(mask)
        self.heads: dict[tuple[int, ...], Head] = {place: [] for place in self.places}
        for layer in range(self.store.layers):
            shape = (self.rows, self.words, self.store.kv_heads, self.store.head_dim)
            key, value = self.normal(*shape), self.normal(*shape)
            self.store.fill_condition_(layer, key, value)
            for row, head in numpy.ndindex(self.rows, self.store.kv_heads):
                self.heads[layer, row, head] = [
                    self.entry(WORD, key[row, word, head], value[row, word, head])
                    for word in range(self.words)
                    if mask[row, word]
                ]
        self.mask, self.step = mask, 0

    @staticmethod
    def entry(position: int, key: torch.Tensor, value: torch.Tensor) -> Entry:
        return Entry(position, key.double().numpy(), value.double().numpy())

    @precondition(lambda self: self.step < self.grid.tokens)
    @rule(count=st.integers(1, 9))
    def decode(self, count: int) -> None:
        """A few tokens."""
        for _ in range(min(count, self.grid.tokens - self.step)):
            self.decode_one()

    def decode_one(self) -> None:
        store, step, period = self.store, torch.tensor(self.step), self.store.plan.period
        if self.step % period == 0:
            self.slots = recycle_(self.policy, store, step)
            self.evict()
        index = store.claim_(self.slots[..., self.step % period], step)
        masses = []
        for layer in range(store.layers):
            shape = (self.rows, 1, store.kv_heads, store.head_dim)
            key, value = self.normal(*shape), self.normal(*shape)
            query = self.normal(self.rows, store.kv_heads * self.group, store.head_dim)
            write_(store.keys[layer], index[layer], key)
            write_(store.values[layer], index[layer], value)
            attended, mass = slot_attention(
                query, store.keys[layer], store.values[layer], store.resident[layer], needs_mass=True
            )
            masses.append(mass)
            for row, head in numpy.ndindex(self.rows, store.kv_heads):
                held = self.heads[layer, row, head]
                held.append(self.entry(self.step, key[row, 0, head], value[row, 0, head]))
                for h in range(head * self.group, (head + 1) * self.group):
                    expected, weights = oracle.attend(query[row, h].double().numpy(), held)
                    numpy.testing.assert_allclose(attended[row, h], expected, atol=1e-4)
                    for entry, weight in zip(held, weights, strict=True):
                        entry.score += weight
        mass = torch.stack(masses)
        assert not mass[~store.resident].any(), "a slot without a token got attention"
        if self.policy.needs_mass:
            self.policy.observe(store, mass, step)
        self.step += 1

    def evict(self) -> None:
        """The oracle's eviction; a head may hold its budget afterwards and no more."""
        for place, held in self.heads.items():
            words = [entry for entry in held if entry.position == WORD]
            tokens = held[len(words) :]
            if self.rule is None:
                left = set(self.store.position[place].tolist())
                kept = [entry for entry in tokens if entry.position in left]
            else:
                kept = self.rule(tokens, self.step)
                if isinstance(self.rule, Linear):
                    assume(self.rule.margin > 1e-5)
            assert len(kept) <= self.store.plan.budget
            self.heads[place] = words + kept

    @precondition(lambda self: self.step % self.store.plan.period == 0)
    @rule()
    def shuffle(self) -> None:
        """The tokens of each head change places, with all that is known of them."""
        store = self.store
        for layer, row, head in self.places:
            place = layer, row, head
            taken = (store.position[place] != FREE).nonzero()[:, 0]
            order = taken[torch.randperm(len(taken), generator=self.generator)]
            for leaf in (store.position, *(store[field] for field in store.fields)):
                leaf[place][taken] = leaf[place][order]
            for leaf in (store.keys[layer], store.values[layer]):
                slots = leaf.view(self.rows, store.kv_heads, store.capacity, -1)[row, head]
                slots[taken] = slots[order]

    @invariant()
    def what_is_held_is_what_the_lists_say(self) -> None:
        store = self.store
        for place, held in self.heads.items():
            position = store.position[place].tolist()
            assert len(held) <= store.capacity
            assert sorted(p for p in position if p >= 0) == sorted(
                e.position for e in held if e.position != WORD
            )
            row = place[1]
            assert position.count(CONDITION) == int(self.mask[row].sum())
            assert position.count(PADDING) == int((~self.mask[row]).sum())

    @invariant()
    def keys_values_and_statistics_are_those_of_their_token(self) -> None:
        store = self.store
        for place, held in self.heads.items():
            layer, row, head = place
            slots = {p: slot for slot, p in enumerate(store.position[place].tolist()) if p >= 0}
            for leaf, field in ((store.keys[layer], "key"), (store.values[layer], "value")):
                by_head = leaf.view(self.rows, store.kv_heads, store.capacity, -1)[row, head]
                for entry in held:
                    if entry.position != WORD:
                        assert (by_head[slots[entry.position]].numpy() == getattr(entry, field)).all()
            if isinstance(self.rule, Linear):
                for entry in held:
                    if entry.position != WORD:
                        got = store["score"][place][slots[entry.position]]
                        assert float(got) == pytest.approx(entry.score, abs=1e-4)

    @invariant()
    def the_store_stays_where_it_is(self) -> None:
        assert [leaf.data_ptr() for leaf in self.leaves()] == self.addresses
        assert self.store.tensors.is_locked


@pytest.mark.parametrize("name", POLICIES)
def test_a_store_under_a_policy_holds_what_plain_lists_hold(name: str) -> None:
    def machine() -> Any:
        return Decoding(name)

    run_state_machine_as_test(machine, settings=FEW)
