from collections.abc import Mapping

import pytest
import torch
from tiny import Tiny

from arkv import CachePlan, Store
from arkv.store import CONDITION, FREE, PADDING, write_

FIELDS = {"score": torch.float32, "age": torch.int32}


def make(
    rows: int = 2, condition: int = 3, budget: int = 4, period: int = 5, fields: Mapping = FIELDS
) -> Store:
    return Store(Tiny().spec, CachePlan(budget, period), rows, condition, fields, torch.float32)


def full_mask(store: Store) -> torch.Tensor:
    return torch.ones(store.rows, store.condition, dtype=torch.bool)


@pytest.mark.parametrize(
    ("budget", "period", "slots"), [(4, 5, 9), (1, 1, 2), (15, 5, 20), (20, 5, 20), (16, 5, 20), (20, 7, 21)]
)
def test_capacity_is_budget_and_period_and_never_more_than_whole_periods(
    budget: int, period: int, slots: int
) -> None:
    store = make(condition=3, budget=budget, period=period)
    assert store.capacity == 3 + slots
    assert store.position.shape == (2, 2, 2, 3 + slots)


def test_bytes_are_those_of_the_leaves() -> None:
    store = make()
    slots = 2 * 2 * 2 * (3 + 9)  # layers, rows, key heads, capacity
    assert store.kv_bytes == slots * 2 * 8 * 4
    assert store.nbytes == store.kv_bytes + slots * (4 + 4 + 4)


def test_a_policys_statistics_are_laid_out_like_positions() -> None:
    store = make()
    assert {name: store[name].dtype for name in store.fields} == FIELDS
    assert {store[name].shape for name in store.fields} == {store.position.shape}
    store["score"].add_(1)
    assert store["score"].sum() == store.position.numel()
    with pytest.raises(KeyError):
        store["other"]


def test_nothing_can_be_added_to_the_store() -> None:
    with pytest.raises(RuntimeError, match="lock"):
        make().tensors["more"] = torch.zeros(())


def test_reset_lays_out_words_and_padding_and_forgets_the_rest() -> None:
    store = make()
    for leaf in store.tensors.values(include_nested=True, leaves_only=True):
        leaf.fill_(7)
    mask = torch.tensor([[False, True, True], [False, False, True]])
    store.reset_(mask)
    for layer, row, head in torch.cartesian_prod(*map(torch.arange, (2, 2, 2))).tolist():
        words = [CONDITION if real else PADDING for real in mask[row].tolist()]
        assert store.position[layer, row, head].tolist() == words + [FREE] * 9
        assert store.resident[layer, row, head].tolist() == mask[row].tolist() + [False] * 9
        assert store.recyclable[layer, row, head].tolist() == [False] * 3 + [True] * 9
    assert not store["score"].any()
    assert not store["age"].any()


def test_a_condition_is_stored_head_by_head() -> None:
    store = make()
    store.reset_(full_mask(store))
    key = torch.arange(2 * 3 * 2 * 8.0).view(2, 3, 2, 8)
    store.fill_condition_(1, key, -key)
    by_head = store.keys[1].view(2, 2, store.capacity, 8)
    assert torch.equal(by_head[:, :, :3], key.transpose(1, 2))
    assert torch.equal(store.values[1], -store.keys[1])
    assert not by_head[:, :, 3:].any()
    assert not store.keys[0].any()


def test_a_claimed_slot_has_its_token_and_fresh_statistics() -> None:
    store = make()
    store.reset_(full_mask(store))
    store["score"].fill_(3)
    store["age"].fill_(3)
    slots = torch.randint(3, store.capacity, (2, 2, 2), generator=torch.Generator().manual_seed(0))
    index = store.claim_(slots, torch.tensor(6))
    chosen = torch.zeros_like(store.position, dtype=torch.bool).scatter(-1, slots[..., None], True)
    assert torch.equal(store.position == 6, chosen)
    assert torch.equal(store["score"] == 0, chosen)
    assert torch.equal(store["age"] == 0, chosen)

    new = torch.randn(2, 1, 2, 8)
    for layer in range(2):
        write_(store.keys[layer], index[layer], new + layer)
        by_head = store.keys[layer].view(2, 2, store.capacity, 8)
        assert torch.equal(by_head[chosen[layer]].view(2, 2, 8), new[:, 0] + layer)
        assert not by_head[~chosen[layer]].any()


def test_freed_slots_hold_nothing_and_others_stay() -> None:
    store = make()
    store.reset_(full_mask(store))
    for position in range(9):
        store.claim_(torch.full((2, 2, 2), 3 + position), torch.tensor(position))
    noise = torch.rand(2, 2, 2, 9, generator=torch.Generator().manual_seed(0))
    slots = 3 + noise.argsort(-1)[..., :5]
    before = store.position.clone()
    store.free_(slots)
    freed = torch.zeros_like(before, dtype=torch.bool).scatter(-1, slots, True)
    assert torch.equal(store.position == FREE, freed)
    assert torch.equal(store.position[~freed], before[~freed])
    assert torch.equal(store.resident, ~freed)


def test_keys_are_stored_in_the_stores_dtype() -> None:
    store = Store(Tiny().spec, CachePlan(4, 5), 1, 1, {}, torch.bfloat16)
    index = store.claim_(torch.full((2, 1, 2), 1), torch.tensor(0))
    write_(store.keys[0], index[0], torch.full((1, 1, 2, 8), 1.0))
    assert store.keys[0].dtype == torch.bfloat16
    assert store.keys[0].sum() == 16
