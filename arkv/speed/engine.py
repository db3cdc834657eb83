"""What the benchmark times: a batch decoded a visual token at a time, whoever holds the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from arkv.attention.quantization import KvDtype
from arkv.decoding.compiling import Compile, check_mode
from arkv.decoding.loop import Loop
from arkv.decoding.step import recycle_
from arkv.estimate import check_memory
from arkv.model import Condition, Model
from arkv.policy import CachePolicy
from arkv.speed.roofline import resident_slots
from arkv.store import Store

DYNAMIC, STATIC = "transformers-dynamic", "transformers-static"
BASELINES = (DYNAMIC, STATIC)
"""What `arkv.speed.baselines` decodes with: transformers' `DynamicCache`, eagerly, and its `StaticCache` with
the compiled model."""


class Engine(ABC):
    """Decodes a batch step by step; drawing the tokens is left to the caller, the same for all.

    Rows are as in `arkv.model.Condition`, and every batch has the same shape as the first.
    """

    @abstractmethod
    def begin(self, condition: Condition) -> Tensor:
        """Start a batch: prefill.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.

        Raises:
            MemoryLimitError: there is not enough memory.
        """

    @abstractmethod
    def advance(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one token further.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """

    @abstractmethod
    def skip(self, position: int) -> None:
        """Make the next step, the one at a later position, cost what it does after all those before it.

        What the cache then holds is as much, but of no use for pictures.

        Args:
            position: of the next step.
        """

    def check(self) -> None:  # noqa: B027  not every engine has something to check
        """Raise `NumericalError` where numbers are not finite; called at the end of a line."""

    @property
    @abstractmethod
    def kv_bytes(self) -> int:
        """Bytes of keys and values that are held now."""

    @property
    @abstractmethod
    def slot_bytes(self) -> float:
        """Bytes of one token's key and value in one head."""

    @abstractmethod
    def resident(self, position: int) -> float:
        """Visual slots of a head that the step at a position attends to, its own included; a mean."""

    @abstractmethod
    def release(self) -> None:
        """Let go of the cache."""


class PolicyEngine(Engine):
    """arkv's own loop under a policy.

    Args:
        model: what draws.
        policy: what stays resident.
        compile: as for `arkv.Decoder`.
        guided: whether the second half of the rows are unconditional.
        kv_dtype: as for `arkv.Decoder`.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        compile: Compile,
        guided: bool,
        kv_dtype: KvDtype | None = None,
    ) -> None:
        self._model, self._policy, self._compile, self._guided = model, policy, compile, guided
        self._kv_dtype = kv_dtype
        check_mode(compile, model.device)
        self._plan = policy.plan(model.spec.grid, model.spec)
        self._loop: Loop | None = None
        self._next = 0

    def begin(self, condition: Condition) -> Tensor:
        """Start a batch; the store is allocated at the first."""
        if self._loop is None:
            rows, length = condition.mask.shape
            pictures = rows // 2 if self._guided else rows
            check_memory(self._model, self._policy, pictures, self._guided, length, self._kv_dtype)
            self._loop = Loop(
                self._model, self._policy, rows, length, self._compile, self._guided, self._kv_dtype
            )
        self._next = 0
        return self._loop.prefill_(condition)

    def advance(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one token further."""
        self._next = position + 1
        return self._begun.advance_(tokens, position)

    def skip(self, position: int) -> None:
        """Between two evictions' worth of steps, slots are given up and claimed, and nothing is computed.

        So heads hold as much as they would, with keys and values of nothing. Where the position or the last
        one is not at an eviction, the steps up to it are decoded.
        """
        period = self._plan.period
        self._decode_until(min(position, -(-self._next // period) * period))
        last = position - position % period
        steps = torch.arange(position, device=self._model.device)
        for start in range(self._next, last, period):
            slots = recycle_(self._policy, self.store, steps[start])
            for offset in range(period):
                self.store.claim_(slots[..., offset], steps[start + offset])
        self._next = max(self._next, last)
        self._decode_until(position)

    def _decode_until(self, position: int) -> None:
        tokens = torch.zeros(self.store.rows, dtype=torch.long, device=self._model.device)
        for earlier in range(self._next, position):
            self.advance(tokens, earlier)

    def check(self) -> None:
        """Raise `NumericalError` where numbers are not finite."""
        self._begun.check()

    @property
    def kv_bytes(self) -> int:
        """Bytes of the store's keys and values."""
        return self.store.kv_bytes

    @property
    def slot_bytes(self) -> float:
        """Bytes of a slot of the store."""
        store = self.store
        return store.kv_bytes / (store.rows * sum(store.pools))

    def resident(self, position: int) -> float:
        """As the plan says."""
        return resident_slots(self._plan, self._model.spec, position)

    def release(self) -> None:
        """Drop store and graphs."""
        self._loop = None

    @property
    def store(self) -> Store:
        """The cache of the newest batch, not to be written to."""
        return self._begun.store

    @property
    def _begun(self) -> Loop:
        assert self._loop is not None, "begin comes first"
        return self._loop
