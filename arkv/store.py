"""The static store: every resident key and value, and what a policy remembers about it.

One locked TensorDict holds all of it. Keys and values are one leaf a layer, `[rows, slots, head_dim]`,
because Inductor keeps an in-place write in place only on a tensor of its own; positions and a policy's
statistics are one leaf for all layers, `[layers, rows, slots]`, so that a policy ranks every layer in one
call. `slots` is the pool of a layer: its heads laid end to end, each with as many slots as its budget
asks for. Layers may have pools of different sizes; the common leaves are as wide as the widest, and what
lies beyond a layer's pool is padding.

Nothing is ever moved. A key is stored after its rotation, attention does not care in which order keys lie,
and an eviction only names the slots that the next tokens overwrite. Where the heads of a layer share
their pool, a slot belongs to whichever head it was last named for.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from arkv.attention.blocks import BLOCK, Blocks, blocks_of
from arkv.attention.quantization import dequantize, quantize, scale_shape, stored_width
from arkv.errors import ArkvError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.plan import CachePlan as CachePlan

FREE = -1
"""Position of a slot that may be written."""
CONDITION = -2
"""Position of a slot with a condition token: resident to the end, outside every budget."""
PADDING = -3
"""Position of a slot that a left-padded condition, or a smaller layer, leaves empty for good."""

HeadFields = Mapping[str, torch.dtype | tuple[torch.dtype, Literal["tokens"]]]
"""Per-head statistics: a dtype for one number a head, or with "tokens" for one for each visual token."""


class Store:
    """Slots of every (layer, row, head), at fixed addresses.

    Methods whose name ends in an underscore write to the store without moving it; no other does.

    Args:
        spec: the model's shape.
        plan: budgets and period.
        rows: sequences of the batch, both guidance rows of a picture counted.
        condition: condition tokens of a row, padding included.
        fields: per-slot statistics to allocate, name to dtype.
        dtype: of keys and values.
        device: where to allocate.
        head_fields: per-head statistics to allocate, name to dtype; a head has one number, or, with a dtype
            and "tokens", one for each visual token.
        guided: whether the second half of the rows are the unconditional ones of the first half.
        beside: a store of the same plan and at least as many rows, the first of whose keys and values are
            to be this one's too; None to allocate them.

    Attributes:
        spec: the model's shape.
        plan: budgets and period.
        tensors: the locked TensorDict with leaves `keys`/`values` -> `"0"`, `"1"`, ..., `slots` ->
            `position` and the statistics, `heads` -> the per-head statistics.
        keys: the key leaves by layer, `[rows, pool, head_dim]`, or half as wide with two codes a byte.
        values: the value leaves by layer.
        key_scales: by layer what makes numbers of stored codes, float32 `[rows, pool]` or, of codes of four
            bits, `[rows, pool, 2 groups]`; None where keys are stored as they are (see
            `arkv.attention.quantization`).
        value_scales: the same for values.
        position: int32 `[layers, rows, slots]`: index of the visual token in each slot, or `FREE`,
            `CONDITION`, `PADDING`.
        head: int64, `[layers, 1 or rows, slots]`: the key head that each slot belongs to; `kv_heads`
            beyond a layer's pool.
        pools: slots of a row in each layer.
        slots: the most slots of a row in any layer.
        starts: int64 `[layers, kv_heads]`, the first slot of each head by the plan.
        sizes: slots of a head to the heads that have as many by the plan: layer and head, int64 `[heads, 2]`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        plan: CachePlan,
        rows: int,
        condition: int,
        fields: Mapping[str, torch.dtype],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        head_fields: HeadFields | None = None,
        guided: bool = False,
        beside: Store | None = None,
    ) -> None:
        head_fields = head_fields or {}
        if "position" in fields or "head" in fields:
            raise ArkvError("a policy's field may not be called 'position' or 'head': the store has its own")
        if both := fields.keys() & head_fields.keys():
            raise ArkvError(f"{sorted(both)[0]!r} is both a field of slots and one of heads")
        self.spec, self.grid, self.plan = spec, spec.grid, plan
        self.rows, self.condition, self.guided = rows, condition, guided
        self.layers, self.kv_heads, self.head_dim = spec.layers, spec.kv_heads, spec.head_dim
        visual = plan.visual_slots(spec)
        self.pools = [sum(condition + n for n in layer) for layer in visual]
        self.slots = max(self.pools)
        # Heads of one size, each in its own part of the pool, are attended to as one dense tensor.
        self.dense = [not plan.shared and len(set(layer)) == 1 for layer in visual]
        names = [str(layer) for layer in range(self.layers)]

        def leaves(kind: str, dtype: torch.dtype, *size: int) -> dict[str, Tensor]:
            if beside is not None:
                return {name: beside.tensors[kind, name][:rows] for name in names}
            return {
                name: torch.zeros(rows, pool, *size, dtype=dtype, device=device)
                for name, pool in zip(names, self.pools, strict=True)
            }

        kinds = ("keys", "values")
        kept = {kind: leaves(kind, dtype, stored_width(dtype, self.head_dim)) for kind in kinds}
        if beside_codes := scale_shape(dtype, self.head_dim):
            scale, numbers = beside_codes
            kept |= {f"{kind}_scale": leaves(f"{kind}_scale", scale, *numbers) for kind in kinds}
        shape = (self.layers, rows, self.slots)
        statistics = {name: torch.zeros(shape, dtype=kind, device=device) for name, kind in fields.items()}
        of_heads = {
            name: torch.zeros(self.layers, rows, self.kv_heads, *size, dtype=kind, device=device)
            for name, (kind, size) in sizes_of(head_fields, spec.grid).items()
        }
        # The plan's own layout: where each head begins, and to whom each slot belongs at first.
        sizes = torch.tensor(visual) + condition
        ends = sizes.cumsum(-1)
        starts = ends - sizes
        slots = torch.arange(self.slots).expand(self.layers, -1).contiguous()
        owner = torch.searchsorted(ends, slots, right=True)
        outside = owner == self.kv_heads
        offset = torch.arange(self.slots) - pad(starts, (0, 1)).gather(1, owner)
        self.starts = starts.to(device)
        of_size: dict[int, list[tuple[int, int]]] = {}
        for layer, heads in enumerate(visual):
            for number, count in enumerate(heads):
                of_size.setdefault(condition + count, []).append((layer, number))
        self.sizes = {size: torch.tensor(heads, device=device) for size, heads in of_size.items()}
        self._first_head = owner[:, None].to(device)
        # The condition token that stands in each slot, or `condition` where none does.
        self._condition_index = torch.where(outside, condition, offset).clamp(max=condition).to(device)
        self._empty = torch.where(outside, PADDING, FREE).to(device, torch.int32)[:, None]

        # A pool that is shared changes hands; the plan's layout is for good.
        head = self._first_head.expand(shape).clone() if plan.shared else self._first_head
        position = torch.full(shape, FREE, dtype=torch.int32, device=device)
        blocks = None if all(self.dense) else blocks_of(head, self.kv_heads)
        tensors = TensorDict(
            {
                **kept,
                "slots": {"position": position} | statistics,
                "heads": of_heads,
                "layout": {"head": head} | ({} if blocks is None else {"blocks": blocks._asdict()}),
            },
            batch_size=[],
        )
        self.fields, self.head_fields = tuple(fields), tuple(head_fields)
        self._hold(tensors)
        # Of the common leaves, by which they are written: `[layers, 1, 1]` and `[rows, 1]`.
        self._layer_index = torch.arange(self.layers, device=device)[:, None, None]
        self._row_index = torch.arange(rows, device=device)[:, None]

    def _hold(self, tensors: TensorDict) -> None:
        """Lock the leaves and look them up once: an access per layer and step from Python is not free."""
        self.tensors = tensors.lock_()

        def by_layer(kind: str) -> list[Any]:
            leaves = tensors.get(kind, None)
            return [None if leaves is None else leaves[str(layer)] for layer in range(self.layers)]

        self.keys: list[Tensor] = by_layer("keys")
        self.values: list[Tensor] = by_layer("values")
        self.key_scales: list[Tensor | None] = by_layer("keys_scale")
        self.value_scales: list[Tensor | None] = by_layer("values_scale")
        self.position: Tensor = tensors["slots", "position"]
        self.head: Tensor = tensors["layout", "head"]
        blocks = tensors["layout"].get("blocks", None)
        self.blocks = None if blocks is None else Blocks(**blocks)

    def of_picture(self, picture: int) -> Store:
        """The rows of one picture as a store of their own, over the same memory.

        Args:
            picture: its place in the batch.
        """
        pictures = self.rows // 2 if self.guided else self.rows
        rows = slice(picture, None, pictures)
        view = copy.copy(self)
        view.rows, view._row_index = self.rows // pictures, self._row_index[: self.rows // pictures]

        def cut(name: tuple[str, ...], leaf: Tensor) -> Tensor:
            if name[0] in ("slots", "heads", "layout"):  # what heads have for good is the same for all rows
                return leaf if leaf.shape[1] == 1 else leaf[:, rows]
            return leaf[rows]

        view._hold(self.tensors.named_apply(cut, nested_keys=True))
        return view

    def __getitem__(self, field: str) -> Tensor:
        """A statistic: `[layers, rows, slots]`, or of heads `[layers, rows, kv_heads]` or `[..., N]`."""
        return self.tensors["heads" if field in self.head_fields else "slots", field]

    @property
    def equal(self) -> bool:
        """Whether all heads of all layers have as many slots, each in its own part of the pool."""
        return all(self.dense) and len(set(self.pools)) == 1

    @property
    def resident(self) -> Tensor:
        """Bool `[layers, rows, slots]`: where a token is held, condition or visual."""
        return (self.position >= 0) | (self.position == CONDITION)

    @property
    def recyclable(self) -> Tensor:
        """Bool `[layers, rows, slots]`: slots of visual tokens, held or free."""
        return self.position >= FREE

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values, and their scales where they have some."""
        scales = [leaf for leaf in [*self.key_scales, *self.value_scales] if leaf is not None]
        return sum(leaf.nbytes for leaf in [*self.keys, *self.values, *scales])

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all: keys, values, positions, statistics and the layout of unequal heads."""
        return sum(leaf.nbytes for leaf in self.tensors.values(include_nested=True, leaves_only=True))

    def key_numbers(self, layer: int) -> Tensor:
        """What the stored keys of a layer stand for, `[rows, pool, head_dim]`.

        The leaf itself where they are stored as they are, else new memory in float32.
        """
        keys, scale = self.keys[layer], self.key_scales[layer]
        return keys if scale is None else dequantize(keys, scale, torch.float32)

    def by_head(self, x: Tensor) -> Tensor:
        """View `[..., slots]` as `[..., kv_heads, capacity]`.

        Raises:
            ArkvError: the heads do not all have as many slots.
        """
        if not self.equal:
            raise ArkvError("heads of different sizes cannot be seen as one block; use store.head instead")
        return x.unflatten(-1, (self.kv_heads, -1))

    def of_slots(self, x: Tensor) -> Tensor:
        """What each slot's head has: `[layers, rows, kv_heads]` to `[layers, rows, slots]`; zero outside."""
        padded = pad(x, (0, 1))
        return padded.gather(-1, self.head.expand(self.position.shape))

    def sum_by_head(self, x: Tensor) -> Tensor:
        """Sum over the slots of each head: `[layers, rows, slots]` to float32 `[layers, rows, kv_heads]`."""
        if self.equal:
            return self.by_head(x).sum(-1, dtype=torch.float32)
        slot, filled, head = self.blocks or blocks_of(self.head, self.kv_heads)
        slot, filled = (leaf.expand(self.layers, self.rows, -1) for leaf in (slot, filled))
        sums = (x.gather(-1, slot) * filled).unflatten(-1, (-1, BLOCK)).sum(-1, dtype=torch.float32)
        # A product, not a scattered sum: the same result whenever it is computed.
        member = head[..., None, :] == torch.arange(self.kv_heads, device=x.device)[:, None]
        return (member.float() @ sums[..., None])[..., 0]

    def reset_(self, mask: Tensor) -> None:
        """Forget every visual token and lay out the condition slots.

        Args:
            mask: bool `[rows, condition]`, False on padding.
        """
        # Keys, values and scales too: a free slot has weight zero, but zero times a NaN left behind is NaN.
        statistics = [self[field] for field in (*self.fields, *self.head_fields)]
        for leaf in [*self.keys, *self.values, *self.key_scales, *self.value_scales, *statistics]:
            if leaf is not None:
                leaf.zero_()
        if self.plan.shared:
            self.head.copy_(self._first_head.expand_as(self.head))
            self._lay_out_()
        laid_out = torch.where(mask, CONDITION, PADDING).to(torch.int32)
        laid_out = pad(laid_out, (0, 1), value=FREE)
        index = self._condition_index[:, None].expand(-1, self.rows, -1)
        words = laid_out.expand(self.layers, -1, -1).gather(-1, index)
        self.position.copy_(torch.where(words == FREE, self._empty, words))

    def tell_heads_(self, field: str, numbers: Sequence[Sequence[float]]) -> None:
        """Give a statistic of heads its number, the same in every row.

        Args:
            field: one number a head.
            numbers: by layer and key head.
        """
        leaf = self[field]
        leaf.copy_(torch.tensor(numbers, device=leaf.device)[:, None].expand_as(leaf))

    def fill_condition_(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the condition tokens of one layer.

        Args:
            layer: index of the block.
            key: `[rows, condition, kv_heads, head_dim]`.
            value: as `key`.
        """
        places = self.starts[layer][:, None] + torch.arange(self.condition, device=self.starts.device)
        of_key = (self.keys[layer], self.key_scales[layer], key)
        of_value = (self.values[layer], self.value_scales[layer], value)
        for leaf, scale, new in (of_key, of_value):
            new = new.transpose(1, 2).flatten(1, 2)
            if scale is not None:
                new, scale[:, places.flatten()] = quantize(new, leaf.dtype)
            leaf[:, places.flatten()] = new.to(leaf.dtype)

    def copy_statistics_(self, other: Store) -> None:
        """Take over everything but keys and values from the first rows of another store.

        Args:
            other: of the same plan and fields, with at least as many rows.
        """
        for kind in ("slots", "heads", "layout"):
            for name, leaf in self.tensors[kind].items(include_nested=True, leaves_only=True):
                leaf.copy_(other.tensors[kind][name][:, : leaf.shape[1]])

    def claim_(self, slots: Tensor, step: Tensor) -> list[Tensor]:
        """Give one slot of every head to a new token: its position is set, its statistics start at zero.

        Args:
            slots: int64 `[layers, rows, kv_heads]`, index within the layer's pool; or more of them in a row,
                for several tokens at a time.
            step: int64 0-d, position of the visual token, or of each slot's, `[slots in a row]`.

        Returns:
            By layer, int64 `[rows, kv_heads]`: where `write_` puts the token's key and value.
        """
        self._put_(self.position, slots, step.to(torch.int32))
        for field in self.fields:
            leaf = self[field]
            self._put_(leaf, slots, leaf.new_zeros(()))
        return list(slots.unbind())

    def free_(self, slots: Tensor) -> None:
        """Mark slots free.

        Args:
            slots: int64 `[layers, rows, kv_heads, n]`, indices within each layer's pool, none of them a
                condition slot.
        """
        self._put_(self.position, slots.flatten(2), self.position.new_full((), FREE))

    def free_where_(self, mask: Tensor) -> None:
        """Mark slots free.

        Args:
            mask: bool `[layers, rows, slots]`, nowhere True at a condition slot or padding.
        """
        self.position.copy_(torch.where(mask, FREE, self.position))

    def assign_(self, slots: Tensor) -> None:
        """Hand slots of a shared pool to the heads that they are named for; nothing where none is shared.

        Args:
            slots: int64 `[layers, rows, kv_heads, n]`, indices within each layer's pool.
        """
        if not self.plan.shared:
            return
        heads = torch.arange(self.kv_heads, device=slots.device)[:, None].expand(slots.shape)
        self._put_(self.head, slots.flatten(2), heads.flatten(2))
        self._lay_out_()

    def _put_(self, leaf: Tensor, slots: Tensor, new: Tensor) -> None:
        """Write to slots, `[layers, rows, n]`, of a leaf common to all layers.

        To the leaf itself, by an index for each of its dimensions: what Inductor of torch 2.11 makes of a
        write through a view of it copies all of it.
        """
        leaf.index_put_((self._layer_index, self._row_index, slots), new)

    def _lay_out_(self) -> None:
        assert self.blocks is not None
        for held, new in zip(self.blocks, blocks_of(self.head, self.kv_heads), strict=True):
            held.copy_(new)


def sizes_of(head_fields: HeadFields, grid: Grid) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape within a head of per-head statistics."""
    return {
        name: (kind[0], (grid.tokens,)) if isinstance(kind, tuple) else (kind, ())
        for name, kind in head_fields.items()
    }


def write_(leaf: Tensor, slots: Tensor, new: Tensor, scale: Tensor | None = None) -> None:
    """Put one token's keys, or values, of one layer into its slots.

    Args:
        leaf: `[rows, slots, head_dim]`, a leaf of the store; written to itself, not through a view, which
            Inductor of torch 2.11 would copy.
        slots: int64 `[rows, kv_heads]`, of this layer, from `Store.claim_`.
        new: `[rows, 1, kv_heads, head_dim]`.
        scale: `[rows, slots, ...]`, what stands beside a leaf of codes.
    """
    new = new[:, 0]
    rows = torch.arange(len(leaf), device=leaf.device)[:, None]
    if scale is not None:
        new, factor = quantize(new, leaf.dtype)
        scale.index_put_((rows, slots), factor)
    leaf.index_put_((rows, slots), new.to(leaf.dtype))
