"""What the suite does with a case, where a single run does not tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from arkv.decoder import Decoder
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.decoding.step import recycle_
from arkv.model import ModelSpec
from arkv.policy import CachePolicy, Observation
from arkv.store import Store, write_
from arkv.testing.cases import Case, is_whole
from arkv.testing.invariants import assert_close, legal_selection, nothing_moves
from arkv.testing.stores import by_token, copy_rows_, count_by_token, owners, shuffle_, statistics


def changes_nothing(case: Case) -> None:
    """Invariant 5."""
    spec = case.model.spec
    assert is_whole(case.policy, spec), f"{case.policy} does not plan for all of {spec.grid.tokens} tokens"
    expected = case.model.causal_logits(case.model.condition(case.prompts, case.guided), case.rows)
    scale = spec.guidance if case.guided else 1.0
    forced = Decoder(case.model, case.policy).teacher_force(case.prompts, case.tokens, scale)
    assert_close(forced.raw, expected, "logits")


def slots_have_no_order(case: Case) -> None:
    """Invariant 6, slots: at every eviction one store is made a shuffled copy of the other."""
    (loop, condition), (other, _) = case.begin(), case.begin()
    logits, same = loop.prefill_(condition), other.prefill_(condition)
    for position in range(case.model.spec.grid.tokens):
        assert_close(same, logits, "logits")
        same_tokens(other.store, loop.store, list(range(loop.store.rows)))
        if position % loop.store.plan.period == 0:  # between, the slots to come are named already
            copy_rows_(other.store, loop.store, list(range(loop.store.rows)))
            shuffle_(other.store, seed=position)
        if position + 1 < case.model.spec.grid.tokens:
            logits = loop.advance_(case.rows[:, position], position)
            same = other.advance_(case.rows[:, position], position)


def rows_are_independent(case: Case) -> None:
    """Invariant 6, rows: at every eviction a store with one picture is made a copy of its rows in the batch.

    Copied, because what is the same beyond rounding may rank two tokens differently.
    """
    for index in range(len(case.prompts)):
        alone, rows = case.of_picture(index)
        (loop, condition), (single, its_condition) = case.begin(), alone.begin()
        logits, same = loop.prefill_(condition), single.prefill_(its_condition)
        for position in range(case.model.spec.grid.tokens):
            assert_close(same, logits[rows], "logits")
            same_tokens(single.store, loop.store, rows)
            if position % loop.store.plan.period == 0:
                copy_rows_(single.store, loop.store, rows)
            if position + 1 < case.model.spec.grid.tokens:
                logits = loop.advance_(case.rows[:, position], position)
                same = single.advance_(alone.rows[:, position], position)


def same_tokens(store: Store, other: Store, rows: list[int]) -> None:
    """Fail unless a store holds what some rows of another hold, and remembers the same of it."""
    assert torch.equal(count_by_token(store), count_by_token(other)[:, rows]), "other tokens are held"
    for name in store.fields:
        mine, others = by_token(store, store[name]), by_token(other, other[name])[:, rows]
        assert_close(mine, others, f"field {name!r}")
    for name in store.head_fields:
        assert_close(store[name], other[name][:, rows], f"field {name!r}")


def windows_leave_no_trace(case: Case) -> None:
    """Invariant 7, windows: the tokens of one a pass, and statistics as if no draft had ever been."""
    sampling = Sampling(1.5 if case.guided else 1.0, 0.5)  # so little noise that some drafts are right
    keys = seed_keys(range(len(case.prompts)))
    (loop, condition), (other, _) = case.begin(), case.begin()
    lines = zip(
        loop.sample_(condition, keys, sampling), other.sample_(condition, keys, sampling, 4), strict=True
    )
    # Passes end where an eviction is due. Of several pictures one may be lines ahead; where nothing is given
    # up, slots are claimed beforehand.
    ends_alike = case.model.spec.grid.line % loop.store.plan.period == 0
    for _ in lines:
        if ends_alike and len(case.prompts) == 1 and not case.policy.in_order:
            same_tokens(other.store, loop.store, list(range(loop.store.rows)))
    assert torch.equal(other.tokens, loop.tokens), "a window of four tokens draws other tokens"
    same_tokens(other.store, loop.store, list(range(loop.store.rows)))


def verbs_trace(case: Case) -> None:
    """Invariant 7, graphs."""
    torch._dynamo.reset()
    policy = case.policy

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=tensors_only)

    recycle, observe, visible = traced(recycle_), traced(policy.observe), traced(policy.visible)
    (loop, condition), (other, _) = case.begin(), case.begin()
    loop.prefill_(condition)
    other.prefill_(condition)
    eager, graphed, spec = loop.store, other.store, case.model.spec
    generator = torch.Generator().manual_seed(0)
    # Other values must not need another graph.
    with torch._dynamo.config.patch(error_on_recompile=True), nothing_moves(graphed):
        for position in range(spec.grid.tokens):
            step = torch.tensor(position)
            if position % eager.plan.period == 0:
                slots = recycle_(policy, eager, step)
                same_slots = torch.equal(recycle(policy, graphed, step), slots)
                assert same_slots, f"select differs in the graph at token {position}"
            chosen = slots[..., position % eager.plan.period]
            new = torch.randn(
                2, spec.layers, eager.rows, 1, spec.kv_heads, spec.head_dim, generator=generator
            )
            for store in (eager, graphed):
                for layer, index in enumerate(store.claim_(chosen, step)):
                    write_(store.keys[layer], index, new[0, layer])
                    write_(store.values[layer], index, new[1, layer])
            limit, same = policy.visible(eager, step), visible(graphed, step)
            assert limit is same is None or torch.equal(cast(Tensor, limit), same)
            if policy.needs:
                seen = random_observation(eager, spec, policy.needs, generator)
                policy.observe(eager, seen, step)
                observe(graphed, seen, step)
            for (name, mine), (_, theirs) in zip(everything(graphed), everything(eager), strict=True):
                assert torch.equal(mine, theirs), f"{name} differs in the graph at token {position}"


def tensors_only(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """A backend of `torch.compile`: runs a graph as it is, if no number and no size is read from a tensor.

    Dynamo would let it pass, but the device has to be waited for, and a captured graph would repeat it.
    """
    for node in graph.graph.nodes:
        if isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise AssertionError(f"{node.target} takes a number from a tensor: {node.stack_trace}")
    return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def random_observation(
    store: Store, spec: ModelSpec, needs: frozenset[str], generator: torch.Generator
) -> Observation:
    """What queries might have seen of a store, as far as it is needed."""
    resident = store.resident
    parts = {
        "mass": torch.rand(resident.shape, generator=generator) * resident,
        "scores": torch.randn(resident.shape, generator=generator) * resident,
        "queries": torch.randn(spec.layers, store.rows, spec.heads, spec.head_dim, generator=generator),
    }
    return Observation(**{name: parts[name] for name in needs})


def everything(store: Store) -> list[tuple[str, Tensor]]:
    """Name and tensor of all that a policy may look at, keys and values included."""
    leaves = store.tensors.items(include_nested=True, leaves_only=True)
    return [(".".join(name) if isinstance(name, tuple) else name, leaf) for name, leaf in leaves]


def addresses_stay(case: Case) -> None:
    """Invariant 7, addresses."""
    loop, condition = case.begin()
    with nothing_moves(loop.store):
        for _ in range(2):
            loop.prefill_(condition)
            for position in range(case.model.spec.grid.tokens - 1):
                loop.advance_(case.rows[:, position], position)


def looking_leaves_no_trace(case: Case) -> None:
    """At every token, `select` (where it is due) and `visible` are asked once more and must not write."""
    loop, condition = case.begin()
    store, policy = loop.store, case.policy
    loop.prefill_(condition)
    for position in range(case.model.spec.grid.tokens - 1):
        step = torch.tensor(position)
        verbs = [policy.visible] + [policy.select] * (position % store.plan.period == 0)
        for verb in verbs:
            before = [leaf.clone() for _, leaf in everything(store)]
            verb(store, step)
            for (name, leaf), old in zip(everything(store), before, strict=True):
                assert _same_bits(leaf, old), f"{verb.__name__} wrote to {name} at token {position}"
        loop.advance_(case.rows[:, position], position)


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return (
        torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) if x.is_floating_point() else torch.equal(x, y)
    )


def decoding_repeats(case: Case) -> None:
    """Logits and held tokens of three runs, the last one in a store that was used for another picture."""
    (first, condition), (second, _) = case.begin(), case.begin()
    backwards = case.rows.flip(0)

    def decode(loop: Any, rows: Tensor) -> list[Tensor]:
        trail = [loop.prefill_(condition)]
        for position in range(case.model.spec.grid.tokens - 1):
            trail.append(loop.advance_(rows[:, position], position))
            trail.append(loop.store.position.clone())
        return trail

    expected = decode(first, case.rows)
    again = decode(second, case.rows)
    decode(second, backwards)
    reused = decode(second, case.rows)
    for trail, what in ((again, "in a new store"), (reused, "in a store that held another picture")):
        same = all(torch.equal(x, y) for x, y in zip(trail, expected, strict=True))
        assert same, f"{what} the picture came out otherwise"


POISONS = (torch.nan, torch.inf, -torch.inf, 0.0)


def poison_is_survived(case: Case) -> None:
    """At every eviction, `select` is asked what it would do if its statistics were such numbers."""
    loop, condition = case.begin()
    store = loop.store
    loop.prefill_(condition)
    generator = torch.Generator().manual_seed(0)
    for position in range(case.model.spec.grid.tokens - 1):
        if position % store.plan.period == 0:
            held = [(field, field.clone()) for _, field in statistics(store) if field.is_floating_point()]
            for poison in (*POISONS, None):
                for field, _ in held:
                    field.copy_(
                        some_poison(field.shape, generator) if poison is None else torch.tensor(poison)
                    )
                slots = case.policy.select(store, torch.tensor(position))
                legal_selection(case.policy, store, slots, store.position, owners(store))
            for field, before in held:
                field.copy_(before)
        loop.advance_(case.rows[:, position], position)


def some_poison(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """One of `POISONS` for each element."""
    return torch.tensor(POISONS)[torch.randint(len(POISONS), shape, generator=generator)]


def survives_json(case: Case) -> None:
    """Serialisation and equality."""
    policy, spec = case.policy, case.model.spec
    read = CachePolicy.from_dict(json.loads(json.dumps(policy.to_dict(), allow_nan=False)))
    assert type(read) is type(policy)
    assert read == policy, f"{policy} came back as {read}"
    assert read.plan(spec.grid, spec) == policy.plan(spec.grid, spec)
    for field in fields(policy):
        with pytest.raises(AttributeError):
            setattr(policy, field.name, getattr(policy, field.name))
