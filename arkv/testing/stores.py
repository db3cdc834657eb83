"""What a store holds, seen by token instead of by slot, and stores that are made from others."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arkv.attention.blocks import blocks_of
from arkv.store import FREE, Store
from arkv.testing.oracle import Place


def owners(store: Store) -> Tensor:
    """int64 `[layers, rows, slots]`: the key head of each slot, `kv_heads` beyond a layer's pool."""
    return store.head.expand(store.position.shape)


def count_by_head(mask: Tensor, head: Tensor, kv_heads: int) -> Tensor:
    """How often a mask is True in each head.

    Args:
        mask: bool `[layers, rows, slots]`.
        head: as `owners`.
        kv_heads: key heads.

    Returns:
        int64 `[layers, rows, kv_heads]`.
    """
    counts = torch.zeros(*mask.shape[:2], kv_heads + 1, dtype=torch.long, device=mask.device)
    return counts.scatter_add(-1, head, mask.long())[..., :-1]


def count_by_token(store: Store) -> Tensor:
    """How often each head holds each visual token: int64 `[layers, rows, kv_heads, N]`."""
    index = _token_index(store)
    counts = torch.zeros(*index.shape[:2], _places(store) + 1, dtype=torch.long, device=index.device)
    counts = counts.scatter_add(-1, index, torch.ones_like(index))
    return counts[..., :-1].unflatten(-1, (store.kv_heads, -1))


def by_token(store: Store, x: Tensor) -> Tensor:
    """What visual tokens have, zero if absent: `[layers, rows, slots]` to `[layers, rows, kv_heads, N]`."""
    index = _token_index(store)
    spread = x.new_zeros(*index.shape[:2], _places(store) + 1).scatter(-1, index, x)
    return spread[..., :-1].unflatten(-1, (store.kv_heads, -1))


def positions(store: Store) -> dict[Place, list[int]]:
    """The visual tokens of every layer, row and key head, in order."""
    return {
        (layer, row, head): tokens.nonzero()[:, 0].tolist()
        for layer, of_layer in enumerate(count_by_token(store))
        for row, of_row in enumerate(of_layer)
        for head, tokens in enumerate(of_row)
    }


def columns(store: Store, position: Tensor, head: Tensor) -> list[list[list[tuple[int, int]]]]:
    """Where each slot's token stands in the whole sequence, condition and padding counted.

    Args:
        store: knows where each head's condition slots are.
        position: int32 `[layers, rows, slots]`, as `store.position`.
        head: as `owners`.

    Returns:
        By layer, row and slot the key head and the column, which means nothing where nothing is held.
    """
    slots = torch.arange(store.slots, device=position.device)
    starts = torch.cat([store.starts, store.starts[:, -1:]], dim=1)[:, None]
    offset = slots - starts.expand(-1, store.rows, -1).gather(-1, head)
    column = torch.where(position >= 0, store.condition + position, offset)
    pairs: list[list[list[tuple[int, int]]]] = torch.stack([head, column], dim=-1).tolist()
    return pairs


def statistics(store: Store) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything that the policy remembers, of slots and of heads."""
    for name in (*store.fields, *store.head_fields):
        yield name, store[name]


def copy_rows_(target: Store, source: Store, rows: list[int]) -> None:
    """Make a store what some rows of another are, slot by slot.

    The other may have a longer condition, if what is longer is padding in these rows.

    Args:
        target: of the same model and plan.
        source: what to copy from.
        rows: a row of the source for every row of the target.
    """
    longer = source.condition - target.condition
    slots = torch.arange(target.slots, device=target.position.device)
    for layer, pool in enumerate(target.pools):
        before = (slots[:pool, None] >= target.starts[layer]).sum(-1)
        index = slots[:pool] + longer * before
        by_slot = [(target.position, source.position)]
        by_slot += [(target[name], source[name]) for name in target.fields]
        if target.plan.shared:
            by_slot.append((target.head, source.head))
        for new, old in by_slot:
            new[layer, :, :pool] = old[layer, rows][:, index]
        target.keys[layer].copy_(source.keys[layer][rows][:, index])
        target.values[layer].copy_(source.values[layer][rows][:, index])
    for name in target.head_fields:
        target[name].copy_(source[name][:, rows])
    if target.plan.shared and target.blocks is not None:
        for held, laid_out in zip(target.blocks, blocks_of(target.head, target.kv_heads), strict=True):
            held.copy_(laid_out)


def shuffle_(store: Store, seed: int) -> None:
    """Let the tokens of every head, with all that is known of them, change places.

    Guidance rows of a picture that hold the same tokens in the same slots still do so afterwards: a policy
    that selects for both may count on it.
    """
    generator = torch.Generator().manual_seed(seed)
    head, pictures = owners(store).clone(), store.rows // 2 if store.guided else store.rows
    tokens = store.position.clamp(min=FREE)
    taken = store.position != FREE
    for layer in range(store.layers):
        leaves = [store.keys[layer], store.values[layer], store.position[layer]]
        leaves += [store[name][layer] for name in store.fields]
        for picture in range(pictures):
            both = list(range(picture, store.rows, pictures))
            alike = all(torch.equal(x[layer, both[0]], x[layer, both[-1]]) for x in (head, tokens, taken))
            for rows in [both] if alike else [[row] for row in both]:
                for h in range(store.kv_heads):
                    slots = (taken[layer, rows[0]] & (head[layer, rows[0]] == h)).nonzero()[:, 0]
                    order = slots[torch.randperm(len(slots), generator=generator)]
                    for leaf in leaves:
                        for row in rows:
                            leaf[row, slots] = leaf[row, order]


def _places(store: Store) -> int:
    return store.kv_heads * store.grid.tokens


def _token_index(store: Store) -> Tensor:
    """Head and token of each slot as one number; what is no visual token has the last of all."""
    position, head, tokens = store.position.long(), owners(store), store.grid.tokens
    token = (position >= 0) & (position < tokens) & (head < store.kv_heads)
    return torch.where(token, head * tokens + position, _places(store))
