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

from arkv import Grid, Observation, Store
from arkv.attention.reference import ragged_attention, slot_attention
from arkv.decoding.layers import layout_of_layer
from arkv.decoding.step import observe_, recycle_
from arkv.store import CONDITION, PADDING, write_
from arkv.testing.oracle import Place
from arkv.testing.stores import positions, shuffle_

FEW = settings(max_examples=max(1, settings().max_examples // 6), stateful_step_count=25)
ALL = frozenset({"mass", "scores"})
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
        self.store = Store(
            self.model.spec,
            plan,
            self.rows,
            self.words,
            self.policy.fields,
            torch.float32,
            head_fields=self.policy.head_fields,
        )
        self.places = list(numpy.ndindex(self.store.layers, self.rows, kv_heads))
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.addresses = [leaf.data_ptr() for leaf in self.leaves()]
        self.rule = self.rule_of_the_paper(budget)
        self.restart()

    def rule_of_the_paper(self, budget: int) -> oracle.Rule | None:
        """What the oracle keeps, or None where the policy alone can say."""
        if self.name in ("linear", "often"):
            return Linear(budget, self.parameters["anchors"], self.parameters["recent"])
        rules = {
            "full": oracle.keep_all,
            "window": oracle.window(budget, 2),
            "streaming": oracle.window(budget, 4),
        }
        return rules.get(self.name)

    def leaves(self) -> list[torch.Tensor]:
        return list(self.store.tensors.values(include_nested=True, leaves_only=True))

    def look_up_owners(self) -> None:
        """Notes the slots that each head owns from now on, indices within its layer's pool."""
        owner = self.store.head.expand(self.store.position.shape)
        self.slots = {
            (layer, row, head): (owner[layer, row] == head).nonzero()[:, 0]
            for layer, row, head in self.places
        }

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator) * 2

    @rule()
    def restart(self) -> None:
        """A new picture in the same store, with other words."""
        lengths = torch.randint(1, self.words + 1, (self.rows, 1), generator=self.generator)
        mask = torch.arange(self.words) >= self.words - lengths
        self.store.reset_(mask)
        self.policy.begin(self.store)
        self.look_up_owners()
        self.heads: dict[Place, Head] = {place: [] for place in self.places}
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
            self.free = recycle_(self.policy, store, step)
            self.look_up_owners()
            self.evict()
        index = store.claim_(self.free[..., self.step % period], step)
        visible = store.resident
        limit = self.policy.visible(store, step)
        if limit is not None:
            visible = visible & limit
        seen = []
        for layer in range(store.layers):
            shape = (self.rows, 1, store.kv_heads, store.head_dim)
            key, value = self.normal(*shape), self.normal(*shape)
            query = self.normal(self.rows, store.kv_heads * self.group, store.head_dim)
            write_(store.keys[layer], index[layer], key)
            write_(store.values[layer], index[layer], value)
            arguments = (
                query,
                store.keys[layer],
                store.values[layer],
                visible[layer, :, : store.pools[layer]],
            )
            owner = layout_of_layer(store, layer, with_kernels=False)
            if owner is None:
                attended = slot_attention(*arguments, store.kv_heads, ALL)
            else:
                attended = ragged_attention(*arguments, owner, store.kv_heads, ALL)
            seen.append(Observation(attended.mass, attended.scores, query))
            for row, head in numpy.ndindex(self.rows, store.kv_heads):
                place = layer, row, head
                self.heads[place].append(self.entry(self.step, key[row, 0, head], value[row, 0, head]))
                mine = self.slots[place]
                looked_at = set(store.position[layer, row, mine[visible[layer, row, mine]]].tolist())
                held = [e for e in self.heads[place] if e.position == WORD or e.position in looked_at]
                for h in range(head * self.group, (head + 1) * self.group):
                    expected, weights = oracle.attend(query[row, h].double().numpy(), held)
                    numpy.testing.assert_allclose(attended.output[row, h], expected, atol=1e-4)
                    for entry, weight in zip(held, weights, strict=True):
                        entry.score += weight
            assert attended.mass is not None
            assert not attended.mass[~arguments[-1]].any(), "a slot that may not be seen got attention"
        if self.policy.needs:
            observe_(self.policy, store, seen, {}, step)
        self.step += 1

    def evict(self) -> None:
        """The oracle's eviction; a head may hold its budget afterwards and no more."""
        held_by = positions(self.store)
        for place, held in self.heads.items():
            words = [entry for entry in held if entry.position == WORD]
            tokens = held[len(words) :]
            if self.rule is None:
                left = set(held_by[place])
                kept = [entry for entry in tokens if entry.position in left]
            else:
                kept = self.rule(tokens, self.step)
                if isinstance(self.rule, Linear):
                    assume(self.rule.margin > 1e-5)
            self.heads[place] = words + kept
        budgets = self.store.plan.budgets(self.model.spec)
        for layer, row in numpy.ndindex(self.store.layers, self.rows):
            held_now = [len(held_by[layer, row, head]) for head in range(self.store.kv_heads)]
            if self.store.plan.shared:
                assert sum(held_now) <= sum(budgets[layer])
            else:
                assert all(n <= budget for n, budget in zip(held_now, budgets[layer], strict=True))

    @precondition(lambda self: self.step % self.store.plan.period == 0)
    @rule()
    def shuffle(self) -> None:
        """The tokens of each head change places, with all that is known of them."""
        shuffle_(self.store, int(torch.randint(2**31, (), generator=self.generator)))

    @invariant()
    def what_is_held_is_what_the_lists_say(self) -> None:
        for place, held in self.heads.items():
            mine, row = self.slots[place], place[1]
            position = self.store.position[place[:2]][mine].tolist()
            assert len(held) <= len(mine)
            assert sorted(p for p in position if p >= 0) == sorted(
                e.position for e in held if e.position != WORD
            )
            assert position.count(CONDITION) == int(self.mask[row].sum())
            assert position.count(PADDING) == int((~self.mask[row]).sum())

    @invariant()
    def keys_values_and_statistics_are_those_of_their_token(self) -> None:
        store = self.store
        for place, held in self.heads.items():
            layer, row, _ = place
            mine = self.slots[place].tolist()
            slots = dict(zip(store.position[layer, row, mine].tolist(), mine, strict=True))
            tokens = [(entry, slots[entry.position]) for entry in held if entry.position != WORD]
            for entry, slot in tokens:
                assert (store.keys[layer][row, slot].numpy() == entry.key).all()
                assert (store.values[layer][row, slot].numpy() == entry.value).all()
                if isinstance(self.rule, Linear):
                    assert store["score"][layer, row, slot].item() == pytest.approx(entry.score, abs=1e-4)

    @invariant()
    def the_store_stays_where_it_is(self) -> None:
        assert [leaf.data_ptr() for leaf in self.leaves()] == self.addresses
        assert self.store.tensors.is_locked


@pytest.mark.parametrize("name", POLICIES)
def test_a_store_under_a_policy_holds_what_plain_lists_hold(name: str) -> None:
    def machine() -> Any:
        return Decoding(name)

    run_state_machine_as_test(machine, settings=FEW)
