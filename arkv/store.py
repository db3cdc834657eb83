"""The static store: every resident key and value, and what a policy remembers about it.

One locked TensorDict holds all of it. Keys and values are one leaf a layer, `[rows, slots, head_dim]`,
because Inductor keeps an in-place write in place only on a tensor of its own; positions and a policy's
statistics are one leaf for all layers, `[layers, rows, slots]`, so that a policy ranks every layer in one
call. `slots` lays the heads of a layer end to end, `capacity` slots each.

Nothing is ever moved. A key is stored after its rotation, attention does not care in which order keys lie,
and an eviction only names the slots that the next tokens overwrite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor

from arkv.errors import ArkvError, BudgetError
from arkv.grid import Grid
from arkv.model import ModelSpec

FREE = -1
"""Position of a slot that may be written."""
CONDITION = -2
"""Position of a slot with a condition token: resident to the end, outside every budget."""
PADDING = -3
"""Position of a slot that a left-padded condition leaves empty for good."""


@dataclass(frozen=True)
class CachePlan:
    """What a policy asks for before anything is allocated.

    Attributes:
        budget: visual slots of a head right after an eviction, `B`.
        period: visual tokens decoded between two evictions, `P`.
    """

    budget: int
    period: int

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("period", self.period)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise BudgetError(f"a plan with a {name} of {value!r}: expected a whole number, at least 1")

    def visual_slots(self, grid: Grid) -> int:
        """Visual slots to allocate for a head: budget and period, never more than whole periods of tokens."""
        periods = -(-grid.tokens // self.period)
        return min(self.budget + self.period, periods * self.period)


class Store:
    """Slots of every (layer, row, head), at fixed addresses.

    Methods whose name ends in an underscore write to the store without moving it; no other does.

    Args:
        spec: the model's shape.
        plan: budget and period.
        rows: sequences of the batch, both guidance rows of a picture counted.
        condition: condition tokens of a row, padding included.
        fields: per-slot statistics to allocate, name to dtype.
        dtype: of keys and values.
        device: where to allocate.

    Attributes:
        tensors: the locked TensorDict with leaves `keys`/`values` -> `"0"`, `"1"`, ... and `slots` ->
            `position` and the statistics.
        keys: the key leaves by layer, `[rows, slots, head_dim]`.
        values: the value leaves by layer.
        position: int32 `[layers, rows, kv_heads, capacity]`: index of the visual token in each slot, or
            `FREE`, `CONDITION`, `PADDING`.
        capacity: slots of a head: condition, budget and period.
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
    ) -> None:
        if "position" in fields:
            raise ArkvError("a policy's field may not be called 'position': the store has its own")
        self.grid, self.plan = spec.grid, plan
        self.rows, self.condition = rows, condition
        self.layers, self.kv_heads, self.head_dim = spec.layers, spec.kv_heads, spec.head_dim
        self.capacity = condition + plan.visual_slots(spec.grid)
        slots = self.kv_heads * self.capacity
        names = [str(layer) for layer in range(self.layers)]

        def leaves() -> dict[str, Tensor]:
            return {
                name: torch.zeros(rows, slots, self.head_dim, dtype=dtype, device=device) for name in names
            }

        shape = (self.layers, rows, slots)
        statistics = {name: torch.zeros(shape, dtype=kind, device=device) for name, kind in fields.items()}
        position = torch.full(shape, FREE, dtype=torch.int32, device=device)
        self.tensors = TensorDict(
            {"keys": leaves(), "values": leaves(), "slots": {"position": position} | statistics},
            batch_size=[],
        ).lock_()
        self.fields = tuple(fields)
        # Looked up once: a TensorDict access per layer and step from Python is not free.
        self.keys = [self.tensors["keys", name] for name in names]
        self.values = [self.tensors["values", name] for name in names]
        self.position = self._by_head(position)
        heads = torch.arange(self.layers * rows * self.kv_heads, device=device)
        # Where each head begins, in the flat view of all layers' slots and of one layer's.
        self._starts = heads.view(self.layers, rows, self.kv_heads) * self.capacity
        self._layer_starts = self._starts[0]

    def __getitem__(self, field: str) -> Tensor:
        """A statistic of the policy, `[layers, rows, kv_heads, capacity]`, a view of the store."""
        return self._by_head(self.tensors["slots", field])

    def _by_head(self, leaf: Tensor) -> Tensor:
        return leaf.view(self.layers, self.rows, self.kv_heads, self.capacity)

    @property
    def resident(self) -> Tensor:
        """Bool `[layers, rows, kv_heads, capacity]`: where a token is held, condition or visual."""
        return (self.position >= 0) | (self.position == CONDITION)

    @property
    def recyclable(self) -> Tensor:
        """Bool `[layers, rows, kv_heads, capacity]`: slots of visual tokens, held or free."""
        return self.position >= FREE

    @property
    def kv_bytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(leaf.nbytes for leaf in [*self.keys, *self.values])

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all: keys, values, positions and statistics."""
        return sum(leaf.nbytes for leaf in self.tensors.values(include_nested=True, leaves_only=True))

    def reset_(self, mask: Tensor) -> None:
        """Forget every visual token and lay out the condition slots.

        Args:
            mask: bool `[rows, condition]`, False on padding.
        """
        # Keys and values too: a free slot has weight zero, but zero times a NaN left behind is NaN.
        for leaf in [*self.keys, *self.values, *(self[field] for field in self.fields)]:
            leaf.zero_()
        self.position.fill_(FREE)
        laid_out = torch.where(mask, CONDITION, PADDING).to(torch.int32)
        self.position[..., : self.condition] = laid_out[None, :, None]

    def fill_condition_(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store the condition tokens of one layer.

        Args:
            layer: index of the block.
            key: `[rows, condition, kv_heads, head_dim]`.
            value: as `key`.
        """
        for leaf, new in ((self.keys[layer], key), (self.values[layer], value)):
            by_head = leaf.view(self.rows, self.kv_heads, self.capacity, self.head_dim)
            by_head[:, :, : self.condition] = new.transpose(1, 2)

    def claim_(self, slots: Tensor, step: Tensor) -> Tensor:
        """Give one slot of every head to a new token: its position is set, its statistics start at zero.

        Args:
            slots: int64 `[layers, rows, kv_heads]`, index within the head.
            step: int64 0-d, position of the visual token.

        Returns:
            int64 `[layers, rows * kv_heads]`: where `write_` puts the token's key and value.
        """
        everywhere = ((self._starts + slots).flatten(),)
        token = step.to(torch.int32).expand(everywhere[0].shape)
        self.tensors["slots", "position"].view(-1).index_put_(everywhere, token)
        for field in self.fields:
            leaf = self.tensors["slots", field].view(-1)
            leaf.index_put_(everywhere, leaf.new_zeros(()))
        return (self._layer_starts + slots).flatten(1)

    def free_(self, slots: Tensor) -> None:
        """Mark slots free.

        Args:
            slots: int64 `[layers, rows, kv_heads, n]`, indices within each head, none of them a
                condition slot.
        """
        everywhere = (self._starts[..., None] + slots).flatten()
        leaf = self.tensors["slots", "position"].view(-1)
        leaf.index_put_((everywhere,), leaf.new_full((), FREE))


def write_(leaf: Tensor, index: Tensor, new: Tensor) -> None:
    """Put one token's keys, or values, of one layer into its slots.

    Args:
        leaf: `[rows, slots, head_dim]`, a leaf of the store.
        index: int64 `[rows * kv_heads]`, of one layer, from `Store.claim_`.
        new: `[rows, 1, kv_heads, head_dim]`.
    """
    head_dim = leaf.shape[-1]
    leaf.view(-1, head_dim).index_put_((index,), new.reshape(-1, head_dim).to(leaf.dtype))
