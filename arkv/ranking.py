"""Slots by what they are worth: the least of every head, or of every layer, without a sort of all.

Of equal worth the older token goes first, so a ranking does not depend on where tokens lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arkv.store import PADDING, Store

LOW = 2**32 - 1
"""The bits of a key in which age and index stand; the worth stands above them."""


def ranking(store: Store, worth: Tensor, count: int | None = None) -> Tensor:
    """Slots from the least worth to the greatest; of equal ones the older token, wherever it lies.

    Args:
        store: has the positions.
        worth: float32 `[layers, rows, slots]`.
        count: so many of the least; None for all.

    Returns:
        int64 `[layers, rows, count]`, indices within the layer's pool.
    """
    # Heads that share a pool may hold the same token; the lower head's goes first, wherever it lies.
    heads = store.kv_heads + 1
    age = _age(store) * heads + store.head
    return _least(worth, age, ages=_ages(store) * heads, count=count)


def least_of_head(store: Store, worth: Tensor) -> Tensor:
    """The `period` slots of least worth of every head, in order: what `select` returns.

    Args:
        store: whose heads each have their own part of the pool.
        worth: float32 `[layers, rows, slots]`.
    """
    period = store.plan.period
    if store.equal:
        worth, age = store.by_head(worth), store.by_head(_age(store))
        return store.starts[:, None, :, None] + _least(worth, age, ages=_ages(store), count=period)
    if period == 1 and (key := _keys(worth, _age(store), _ages(store))) is not None:
        # At every token, where a sort of the whole pool would be most of the step.
        none = key.new_full((*key.shape[:2], store.kv_heads + 1), torch.iinfo(key.dtype).max)
        least = none.scatter_reduce(-1, store.head.expand(key.shape), key, "amin")
        return (least[..., :-1, None] & LOW) % store.slots
    if len(store.sizes) <= store.layers:
        return _least_by_size(store, worth)
    ranked = ranking(store, worth)
    of_head = store.head.expand(ranked.shape).gather(-1, ranked)
    by_head = ranked.gather(-1, of_head.argsort(dim=-1, stable=True))
    first = store.starts[:, None, :, None] + torch.arange(period, device=worth.device)
    return by_head.gather(-1, first.expand(-1, store.rows, -1, -1).flatten(2)).view(
        store.layers, store.rows, store.kv_heads, -1
    )


def _least_by_size(store: Store, worth: Tensor) -> Tensor:
    """As `least_of_head` where heads are of a few sizes: those of one size are ranked at once, as equal ones.

    Two sizes for spatial and semantic heads, one a layer for a pyramid: a sort of the pool would be more.
    """
    period, device = store.plan.period, worth.device
    found = torch.zeros(store.layers, store.rows, store.kv_heads, period, dtype=torch.long, device=device)
    rows = torch.arange(store.rows, device=device)[:, None]
    for size, heads in store.sizes.items():
        layer, head = heads.unbind(-1)
        first = store.starts[layer, head]
        place = (layer[:, None, None], rows, (first[:, None] + torch.arange(size, device=device))[:, None])
        age = store.position[place].long() - PADDING
        least = _least(worth[place], age, ages=_ages(store), count=period)
        found[layer[:, None], rows[:, 0], head[:, None]] = least + first[:, None, None]
    return found


def least_of_layer(store: Store, worth: Tensor) -> Tensor:
    """The slots of least worth of every layer, `period` for each head: what `select` returns.

    Args:
        store: whose heads share the pool of their layer.
        worth: float32 `[layers, rows, slots]`.
    """
    ranked = ranking(store, worth, store.kv_heads * store.plan.period)
    return ranked.unflatten(-1, (store.kv_heads, -1))


def _age(store: Store) -> Tensor:
    """int64 `[layers, rows, slots]`, from 0 up, less for an older token; what is no token comes first."""
    return store.position.long() - PADDING


def _ages(store: Store) -> int:
    """One more than the greatest age there can be."""
    return store.grid.tokens - PADDING


def _least(worth: Tensor, age: Tensor, ages: int, count: int | None) -> Tensor:
    """Indices along the last axis by worth, then by age, then as they lie.

    Where all three fit into one number there is nothing left to be equal, and the least of them need no sort
    of the rest.

    Args:
        worth: float32 `[..., n]`.
        age: int64, as `worth`, 0 to `ages - 1`.
        ages: as many there may be.
        count: how many of the least; None for all.

    Returns:
        int64 `[..., count]`.
    """
    key = _keys(worth, age, ages)
    if key is None:
        by_age = age.argsort(dim=-1, stable=True)
        by_worth = worth.gather(-1, by_age).argsort(dim=-1, stable=True)
        return by_age.gather(-1, by_worth)[..., :count]
    if count is None or count == worth.shape[-1]:
        return key.argsort(dim=-1)
    return key.topk(count, dim=-1, largest=False).indices


def _keys(worth: Tensor, age: Tensor, ages: int) -> Tensor | None:
    """One number for each place that is less than another's where worth, age, and then index are.

    Returns:
        int64, as `worth`, the index being the remainder of the lower 32 bits by how many there are; None
        where they do not fit.
    """
    places = worth.shape[-1]
    if ages * places > LOW + 1:
        return None
    return (_ordered_bits(worth).long() << 32) | (age * places + torch.arange(places, device=age.device))


def _ordered_bits(x: Tensor) -> Tensor:
    """int32 that compare as float32 numbers do; NaN above all of them, and one zero."""
    bits = torch.where(x.isnan(), torch.nan, x + 0.0).view(torch.int32)
    # Of negative numbers a larger pattern is a smaller number.
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def rank_in_head(store: Store, worth: Tensor, apart: Tensor | None = None) -> Tensor:
    """Rank of each slot within its head: 0 for the least worth; of equal ones the older token first.

    Args:
        store: has positions and heads.
        worth: float32 `[layers, rows, slots]`.
        apart: bool, as `worth`: slots that are ranked by themselves, and the others of their head without
            them; None to rank a head as one.

    Returns:
        int64 `[layers, rows, slots]`.
    """
    group = store.head.expand(worth.shape)
    groups = store.kv_heads + 1
    if apart is not None:
        group, groups = 2 * group + apart, 2 * groups
    # Group, worth and age in one number: there is room for more tokens than any store has.
    key = ((group << 32) + (_ordered_bits(worth).long() + (1 << 31))) * _ages(store) + _age(store)
    order = key.argsort(dim=-1, stable=True)
    ordered = group.gather(-1, order)
    each = torch.arange(groups, device=worth.device).expand(*worth.shape[:2], -1)
    starts = torch.searchsorted(ordered, each.contiguous())
    rank = torch.arange(store.slots, device=worth.device) - starts.gather(-1, ordered)
    return torch.zeros_like(rank).scatter(-1, order, rank)
