import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, Tiny
from torch import Tensor

from arkv import ArkvError, CachePlan, Store
from arkv.attention.blocks import BLOCK, Blocks, blocks_of, owners_of
from arkv.errors import BudgetError
from arkv.store import CONDITION, FREE, PADDING, write_

FIELDS = {"score": torch.float32, "age": torch.int32}
# Unequal on purpose, over two layers of three key heads; the first layer's pool is the larger.
BUDGETS = ((1, 9, 6), (2, 4, 3))
SPEC = Tiny(heads=6, kv_heads=3).spec


def make(
    rows: int = 2, condition: int = 3, budget: int = 4, period: int = 5, fields: Mapping = FIELDS
) -> Store:
    return Store(Tiny().spec, CachePlan(budget, period), rows, condition, fields, torch.float32)


def unequal(shared: bool = False, rows: int = 2, period: int = 5, **arguments: Any) -> Store:
    plan = CachePlan(BUDGETS, period, shared)
    return Store(SPEC, plan, rows, 3, FIELDS, torch.float32, **arguments)


def full_mask(store: Store) -> Tensor:
    return torch.ones(store.rows, store.condition, dtype=torch.bool)


every_kind = pytest.mark.parametrize(
    "kind", [make, unequal, partial(unequal, shared=True)], ids=["equal", "unequal", "shared"]
)


def leaves(store: Store) -> list[Tensor]:
    return list(store.tensors.values(include_nested=True, leaves_only=True))


# What is asked for


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((12, 0), "period of 0"),
        ((12, True), "period of True"),
        ((12, 2.5), "period of 2.5"),
        ((0, 5), "budget of 0"),
        ((-3, 5), "budget of -3"),
        ((12.0, 5), "budget of 12.0"),
        ((True, 5), "budget of True"),
        ((None, 5), "budget of None"),
        (([[1, 2]], 5), r"budget of \[\[1, 2\]\]"),
        ((((1, 2), (3, 0)), 5), "budget of 0"),
        ((((1, 2), (3, 1.5)), 5), "budget of 1.5"),
        (((1, 2), 5), "a tuple of numbers a layer"),
    ],
    ids=str,
)
def test_a_plan_is_whole_and_positive(arguments: tuple[Any, Any], words: str) -> None:
    with pytest.raises(BudgetError, match=words) as caught:
        CachePlan(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("budget", [(), ((1, 2),), ((1, 2), (3,)), ((1,), (2,)), ((1, 2), (3, 4), (5, 6))])
def test_a_plan_of_unequal_heads_has_a_budget_for_each_that_there_is(budget: Any) -> None:
    with pytest.raises(BudgetError, match="tiny has 2 layers of 2 key heads") as caught:
        CachePlan(budget, 5).budgets(Tiny().spec)
    assert "\n" not in str(caught.value)


def test_budgets_are_by_layer_and_key_head() -> None:
    assert CachePlan(7, 5).budgets(SPEC) == [[7, 7, 7], [7, 7, 7]]
    assert CachePlan(BUDGETS, 5).budgets(SPEC) == [[1, 9, 6], [2, 4, 3]]
    assert CachePlan(BUDGETS, 5).visual_slots(SPEC) == [[6, 14, 11], [7, 9, 8]]
    assert CachePlan(((16, 15, 99), (1, 1, 1)), 5).visual_slots(SPEC) == [[20, 20, 20], [6, 6, 6]]
    assert CachePlan(((16, 15, 1), (1, 1, 1)), 7).visual_slots(SPEC) == [[21, 21, 8], [8, 8, 8]]


def test_plans_are_values() -> None:
    assert CachePlan(BUDGETS, 5) == CachePlan(BUDGETS, 5, shared=False) != CachePlan(BUDGETS, 5, shared=True)
    assert len({CachePlan(4, 5), CachePlan(4, 5), CachePlan(BUDGETS, 5)}) == 2


# What is allocated


@pytest.mark.parametrize(
    ("budget", "period", "slots"), [(4, 5, 9), (1, 1, 2), (15, 5, 20), (20, 5, 20), (16, 5, 20), (20, 7, 21)]
)
def test_capacity_is_budget_and_period_and_never_more_than_whole_periods(
    budget: int, period: int, slots: int
) -> None:
    store = make(condition=3, budget=budget, period=period)
    assert store.pools == [2 * (3 + slots)] * 2
    assert store.slots == 2 * (3 + slots)
    assert store.position.shape == (2, 2, store.slots)
    assert store.by_head(store.position).shape == (2, 2, 2, 3 + slots)


def test_bytes_are_those_of_the_leaves() -> None:
    store = make()
    pool = 2 * (3 + 9)  # key heads, capacity
    assert store.kv_bytes == 2 * 2 * pool * 2 * 8 * 4  # layers, rows, slots, keys and values, head_dim, bytes
    assert store.nbytes == store.kv_bytes + 2 * 2 * pool * (4 + 4 + 4) + 2 * pool * 8  # and the owners
    assert store.blocks is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_of_unequal_heads_are_the_sum_of_the_budgets(shared: bool, dtype: torch.dtype) -> None:
    store = Store(SPEC, CachePlan(BUDGETS, 5, shared), 2, 3, {}, dtype)
    slots = sum(3 + budget + 5 for layer in BUDGETS for budget in layer)
    assert store.kv_bytes == 2 * slots * 2 * 8 * dtype.itemsize
    assert sum(leaf.nbytes for leaf in (*store.keys, *store.values)) == store.kv_bytes
    widest = 3 * (3 + 5) + max(map(sum, BUDGETS))
    assert store.slots == widest
    owners, blocks = 2 * (2 if shared else 1), widest // BLOCK + 3
    table = owners * (widest * 8 + blocks * BLOCK * (8 + 1) + blocks * 8)  # owners, places, heads of blocks
    assert store.nbytes == store.kv_bytes + 2 * 2 * widest * 4 + table
    assert [leaf.shape[1] for leaf in store.keys] == [leaf.shape[1] for leaf in store.values] == store.pools
    largest = Store(SPEC, CachePlan(9, 5), 2, 3, {}, dtype)
    assert store.kv_bytes < largest.kv_bytes


@every_kind
def test_all_that_the_store_knows_lies_in_its_tensors(kind: Callable[[], Store]) -> None:
    store = kind()
    known = [*store.keys, *store.values, store.position, store.head, store["score"], store["age"]]
    known += [] if store.blocks is None else store.blocks
    assert sorted(leaf.data_ptr() for leaf in known) == sorted(leaf.data_ptr() for leaf in leaves(store))


def test_equal_heads_of_unequal_layers_are_dense_and_of_their_own_size() -> None:
    store = Store(SPEC, CachePlan(((9, 9, 9), (2, 2, 2)), 5), 2, 3, {}, torch.float32)
    assert store.dense == [True, True]
    assert store.blocks is None
    assert store.pools == [3 * 17, 3 * 10]
    mixed = Store(SPEC, CachePlan(((9, 9, 9), (2, 3, 2)), 5), 2, 3, {}, torch.float32)
    assert mixed.dense == [True, False]
    assert mixed.blocks is not None
    # A pool that is shared changes hands, however even it is to begin with.
    assert Store(SPEC, CachePlan(9, 5, shared=True), 2, 3, {}, torch.float32).dense == [False, False]


def test_only_heads_of_one_size_are_seen_as_a_block() -> None:
    store = make()
    assert torch.equal(store.by_head(store.position).flatten(-2), store.position)
    for other in (
        unequal(),
        Store(SPEC, CachePlan(4, 5, shared=True), 1, 1, {}, torch.float32),
        Store(SPEC, CachePlan(((4, 4, 4), (5, 5, 5)), 5), 1, 1, {}, torch.float32),
    ):
        with pytest.raises(ArkvError, match="store.head"):
            other.by_head(other.position)


def test_a_policys_statistics_are_laid_out_like_positions() -> None:
    store = make()
    assert {name: store[name].dtype for name in store.fields} == FIELDS
    assert {store[name].shape for name in store.fields} == {store.position.shape}
    store["score"].add_(1)
    assert store["score"].sum() == store.position.numel()
    with pytest.raises(KeyError):
        store["other"]


def test_statistics_of_heads_have_one_value_a_head() -> None:
    store = unequal(head_fields={"kind": torch.int64})
    assert store["kind"].shape == (2, 2, 3)
    assert store["kind"].dtype == torch.int64
    store["kind"].copy_(torch.arange(12).view(2, 2, 3))
    spread = store.of_slots(store["kind"])
    for layer, row, slot in itertools.product(range(2), range(2), range(store.slots)):
        head = int(store.head[layer, 0, slot])
        assert spread[layer, row, slot] == (0 if head == 3 else store["kind"][layer, row, head])


def test_a_head_may_have_a_number_for_each_token() -> None:
    store = unequal(head_fields={"profile": (torch.float32, "tokens")})
    assert store["profile"].shape == (2, 2, 3, GRID.tokens)
    store["profile"].fill_(3)
    store.reset_(full_mask(store))
    assert not store["profile"].any()


def test_names_that_are_taken_are_refused() -> None:
    for name in ("position", "head"):
        with pytest.raises(ArkvError, match=name):
            make(fields={name: torch.int32})
    with pytest.raises(ArkvError, match="'score' is both"):
        unequal(head_fields={"score": torch.float32})


def test_nothing_can_be_added_to_the_store() -> None:
    with pytest.raises(RuntimeError, match="lock"):
        make().tensors["more"] = torch.zeros(())


# A new picture


def test_reset_lays_out_words_and_padding_and_forgets_the_rest() -> None:
    store = make()
    for leaf in (store.position, store["score"], store["age"], *store.keys, *store.values):
        leaf.fill_(7)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    store.reset_(mask)
    for layer, row, head in itertools.product(range(2), range(2), range(2)):
        words = [CONDITION if real else PADDING for real in mask[row].tolist()]
        for what, expected in (
            (store.position, words + [FREE] * 9),
            (store.resident, mask[row].tolist() + [False] * 9),
            (store.recyclable, [False] * 3 + [True] * 9),
        ):
            assert store.by_head(what)[layer, row, head].tolist() == expected
    for leaf in (store["score"], store["age"], *store.keys, *store.values):
        assert not leaf.any()


@pytest.mark.parametrize("shared", [False, True])
def test_every_head_begins_with_the_condition_and_smaller_pools_end_in_padding(shared: bool) -> None:
    store = unequal(shared)
    store.position.fill_(7)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    store.reset_(mask)
    assert store.pools == [9 + 6 + 14 + 11, 9 + 7 + 9 + 8]
    assert store.starts.tolist() == [[0, 9, 26], [0, 10, 22]]
    for layer, row in itertools.product(range(2), range(2)):
        words = [CONDITION if real else PADDING for real in mask[row].tolist()]
        position, owner = [], []
        for head, budget in enumerate(BUDGETS[layer]):
            position += words + [FREE] * (budget + 5)
            owner += [head] * (3 + budget + 5)
        beyond = store.slots - len(owner)
        assert store.position[layer, row].tolist() == position + [PADDING] * beyond
        assert store.head.expand(store.position.shape)[layer, row].tolist() == owner + [3] * beyond
        assert not store.recyclable[layer, row, len(owner) :].any()
        assert not store.resident[layer, row, len(owner) :].any()


def test_a_condition_is_stored_head_by_head() -> None:
    for store, heads in ((make(), 2), (unequal(), 3), (unequal(shared=True), 3)):
        store.reset_(full_mask(store))
        key = torch.arange(2 * 3 * heads * 8.0).view(2, 3, heads, 8) + 1
        store.fill_condition_(1, key, -key)
        for head, start in enumerate(store.starts[1].tolist()):
            assert torch.equal(store.keys[1][:, start : start + 3], key[:, :, head])
        assert torch.equal(store.values[1], -store.keys[1])
        words = store.position[1, :, : store.pools[1]] == CONDITION
        assert torch.equal(store.keys[1].any(-1), words)
        assert not store.keys[0].any()


# Tokens come and go


def some_slots(store: Store, count: int, seed: int = 0) -> Tensor:
    """Free slots of every head, `count` each, within the plan's own layout."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for layer, row, head in itertools.product(range(store.layers), range(store.rows), range(store.kv_heads)):
        position, owner = store.position[layer, row], store.head.expand(store.position.shape)[layer, row]
        free = ((position == FREE) & (owner == head)).nonzero()[:, 0]
        chosen.append(free[torch.randperm(len(free), generator=generator)[:count]])
    return torch.stack(chosen).view(store.layers, store.rows, store.kv_heads, count)


def marked(store: Store, slots: Tensor) -> Tensor:
    return torch.zeros_like(store.position, dtype=torch.bool).scatter(-1, slots.flatten(2), True)


@every_kind
def test_a_claimed_slot_has_its_token_and_fresh_statistics(kind: Callable[[], Store]) -> None:
    store = kind()
    store.reset_(full_mask(store))
    store["score"].fill_(3)
    store["age"].fill_(3)
    slots = some_slots(store, 1)
    index = store.claim_(slots[..., 0], torch.tensor(6))
    chosen = marked(store, slots)
    assert torch.equal(store.position == 6, chosen)
    assert torch.equal(store["score"] == 0, chosen)
    assert torch.equal(store["age"] == 0, chosen)

    new = torch.randn(2, 1, store.kv_heads, 8, generator=torch.Generator().manual_seed(0))
    for layer in range(2):
        write_(store.keys[layer], index[layer], new + layer)
        write_(store.values[layer], index[layer], -new)
        for row, head in itertools.product(range(2), range(store.kv_heads)):
            slot = slots[layer, row, head, 0]
            assert torch.equal(store.keys[layer][row, slot], new[row, 0, head] + layer)
            assert torch.equal(store.values[layer][row, slot], -new[row, 0, head])
        assert torch.equal(store.keys[layer].any(-1), chosen[layer, :, : store.pools[layer]])


@every_kind
def test_freed_slots_hold_nothing_and_others_stay(kind: Callable[[], Store]) -> None:
    store = kind()
    store.reset_(full_mask(store))
    slots = some_slots(store, 6)
    for position in range(6):
        store.claim_(slots[..., position], torch.tensor(position))
    assert torch.equal(store.position >= 0, marked(store, slots))
    before = store.position.clone()
    given_up = slots[..., torch.randperm(6, generator=torch.Generator().manual_seed(1))[:4]]
    store.free_(given_up)
    freed = marked(store, given_up)
    assert (store.position[freed] == FREE).all()
    assert torch.equal(store.position[~freed], before[~freed])
    assert int((store.position >= 0).sum()) == 2 * 2 * store.kv_heads * 2


def test_heads_are_told_what_is_theirs_in_every_row() -> None:
    fields = {"local": torch.bool, "share": torch.float32}
    store = Store(Tiny().spec, CachePlan(4, 5), 3, 1, {}, torch.float32, head_fields=fields)
    for field, numbers in (("local", [[True, False], [False, False]]), ("share", [[0.5, 2.0], [0.0, 1.0]])):
        store.tell_heads_(field, numbers)
        assert store[field].tolist() == [[layer] * 3 for layer in numbers]


def test_keys_are_stored_in_the_stores_dtype() -> None:
    store = Store(Tiny().spec, CachePlan(4, 5), 1, 1, {}, torch.bfloat16)
    index = store.claim_(store.starts[:, None] + 1, torch.tensor(0))
    write_(store.keys[0], index[0], torch.full((1, 1, 2, 8), 1.0))
    assert store.keys[0].dtype == torch.bfloat16
    assert store.keys[0].sum() == 16


# Slots change hands


def test_a_shared_pool_changes_hands_and_reset_gives_everything_back() -> None:
    store = unequal(shared=True)
    store.reset_(full_mask(store))
    first, addresses = store.head.clone(), [leaf.data_ptr() for leaf in leaves(store)]
    # All heads' free slots in another order, so that every head is handed some of the others.
    slots = some_slots(store, 6).flatten(2)
    slots = slots[..., torch.randperm(18, generator=torch.Generator().manual_seed(0))].unflatten(2, (3, 6))
    store.assign_(slots)
    expected = first.clone()
    for layer, row, head in itertools.product(range(2), range(2), range(3)):
        expected[layer, row, slots[layer, row, head]] = head
    assert torch.equal(store.head, expected)
    assert not torch.equal(expected, first)
    assert store.blocks is not None
    for held, new in zip(store.blocks, blocks_of(expected, 3), strict=True):
        assert torch.equal(held, new)
    store.reset_(full_mask(store))
    assert torch.equal(store.head, first)
    for held, new in zip(store.blocks, blocks_of(first, 3), strict=True):
        assert torch.equal(held, new)
    assert [leaf.data_ptr() for leaf in leaves(store)] == addresses


def test_what_is_not_shared_never_changes_hands() -> None:
    for store in (make(), unequal()):
        store.reset_(full_mask(store))
        first = store.head.clone()
        store.assign_(some_slots(store, 2).roll(1, dims=2))
        assert torch.equal(store.head, first)


# Blocks of slots


def naive_blocks(owners: list[int], kv_heads: int) -> list[tuple[int, list[int]]]:
    """Head and slots of each block: those of a head in the order they lie in, `BLOCK` at a time."""
    blocks = []
    for head in range(kv_heads):
        mine = [slot for slot, owner in enumerate(owners) if owner == head]
        blocks += [(head, mine[i : i + BLOCK]) for i in range(0, len(mine), BLOCK)]
    return blocks


@given(st.data(), st.integers(1, 5), st.integers(1, 2), st.integers(1, 3))
def test_blocks_are_slots_of_one_head_each(
    data: st.DataObject, kv_heads: int, layers: int, rows: int
) -> None:
    slots = data.draw(st.one_of(st.integers(1, BLOCK), st.integers(1, 6 * BLOCK), st.just(3 * BLOCK)))
    # Some heads are likelier than others, and some have nothing at all.
    likely = data.draw(st.lists(st.integers(0, kv_heads), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    head = torch.tensor(likely)[torch.randint(len(likely), (layers, rows, slots), generator=generator)]
    blocks = blocks_of(head, kv_heads)
    count = slots // BLOCK + kv_heads
    assert blocks.slot.shape == blocks.filled.shape == (layers, rows, count * BLOCK)
    assert blocks.head.shape == (layers, rows, count)
    assert (blocks.slot.dtype, blocks.filled.dtype, blocks.head.dtype) == (
        torch.int64,
        torch.bool,
        torch.int64,
    )
    for layer, row in itertools.product(range(layers), range(rows)):
        expected = naive_blocks(head[layer, row].tolist(), kv_heads)
        assert len(expected) <= count
        got = list(
            zip(
                blocks.head[layer, row].tolist(),
                blocks.slot[layer, row].view(count, BLOCK).tolist(),
                blocks.filled[layer, row].view(count, BLOCK).tolist(),
                strict=True,
            )
        )
        for (owner, mine), (got_owner, slot, filled) in zip(expected, got, strict=False):
            assert got_owner == owner
            assert filled == [True] * len(mine) + [False] * (BLOCK - len(mine))
            assert slot == mine + [0] * (BLOCK - len(mine))
        for got_owner, slot, filled in got[len(expected) :]:
            assert 0 <= got_owner < kv_heads
            assert not any(filled)
            assert not any(slot)
    for layer in range(layers):
        of_layer = Blocks(*(leaf[layer] for leaf in blocks))
        assert torch.equal(owners_of(of_layer, slots, kv_heads), head[layer])


def test_there_are_as_many_blocks_as_the_worst_distribution_needs() -> None:
    """Every head has a single slot in its last block."""
    sizes = [1, BLOCK + 1, 2 * BLOCK + 1, 1]
    head = torch.cat([torch.full((size,), h) for h, size in enumerate(sizes)])[None, None]
    blocks = blocks_of(head, 4)
    assert blocks.filled.view(-1, BLOCK).any(-1).all()
    assert sorted(blocks.slot[blocks.filled].tolist()) == list(range(sum(sizes)))


def test_the_layout_of_a_fixed_plan_is_that_of_its_heads() -> None:
    store = unequal()
    assert store.blocks is not None
    for layer in range(2):
        used = [owner for owner, _ in naive_blocks(store.head[layer, 0].tolist(), 3)]
        assert store.blocks.head[layer, 0].tolist()[: len(used)] == used
        places = store.blocks.slot[layer, 0][store.blocks.filled[layer, 0]].tolist()
        assert sorted(places) == list(range(store.pools[layer]))
