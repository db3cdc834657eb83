"""The slots of unequal heads in blocks, each of one head: what attention over a shared pool walks along."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 16
"""Slots that attention over unequal heads takes at a time."""


class Blocks(NamedTuple):
    """The slots of unequal heads in blocks of `BLOCK`, each of one head.

    Attributes:
        slot: int64 `[..., blocks * BLOCK]`, index within the pool; 0 where a block is not full.
        filled: bool, as `slot`: where a block has a slot.
        head: int64 `[..., blocks]`, the key head of each block.
    """

    slot: Tensor
    filled: Tensor
    head: Tensor


def blocks_of(head: Tensor, kv_heads: int) -> Blocks:
    """Sort slots into blocks of one head each.

    Args:
        head: int64 `[layers, rows, slots]`, the key head of each slot; `kv_heads` for one of nobody.
        kv_heads: heads of a layer.

    Returns:
        As many blocks as any distribution of the slots over the heads can need, `slots // BLOCK + kv_heads`.
    """
    shape, slots = head.shape[:-1], head.shape[-1]
    blocks = slots // BLOCK + kv_heads
    ordered, order = head.sort(dim=-1, stable=True)
    # Where each head begins in that order, and, last, the slots of nobody.
    heads = torch.arange(kv_heads + 1, device=head.device).expand(*shape, -1)
    starts = torch.searchsorted(ordered, heads.contiguous())
    needed = (starts.diff(dim=-1) + BLOCK - 1) // BLOCK
    ends = needed.cumsum(-1)
    # Slots of nobody go to one place past the end.
    first_place = pad((ends - needed) * BLOCK, (0, 1), value=blocks * BLOCK)
    rank = torch.arange(slots, device=head.device) - starts.gather(-1, ordered)
    place = (first_place.gather(-1, ordered) + rank).clamp(max=blocks * BLOCK)
    place = torch.where(ordered == kv_heads, blocks * BLOCK, place)
    empty = torch.zeros(*shape, blocks * BLOCK + 1, dtype=torch.long, device=head.device)
    slot = empty.scatter(-1, place, order)[..., :-1]
    filled = empty.bool().scatter(-1, place, True)[..., :-1]
    index = torch.arange(blocks, device=head.device)
    owner = (ends[..., None, :] <= index[:, None]).sum(-1).clamp(max=kv_heads - 1)
    return Blocks(slot.contiguous(), filled.contiguous(), owner)


def owners_of(blocks: Blocks, slots: int, kv_heads: int) -> Tensor:
    """What `blocks_of` sorted: the key head of each slot.

    Args:
        blocks: of one layer, `[1 or rows, ...]`.
        slots: of the pool.
        kv_heads: heads of the layer.

    Returns:
        int64 `[1 or rows, slots]`; `kv_heads` for a slot of nobody.
    """
    # Places of a block that hold no slot all name one past the end.
    slot = torch.where(blocks.filled, blocks.slot, slots)
    owner = torch.full((len(slot), slots + 1), kv_heads, device=slot.device)
    return owner.scatter(1, slot, blocks.head.repeat_interleave(BLOCK, 1))[:, :-1]
