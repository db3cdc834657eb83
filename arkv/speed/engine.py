"""What the benchmark times: a batch that is decoded, whoever holds the cache."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from arkv.attention.quantization import KvDtype
from arkv.decoding.compiling import Compile, check_mode
from arkv.decoding.loop import Loop
from arkv.decoding.sampling import Sampling, draw, guide
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
    """Decodes a batch as its library does.

    Rows are as in `arkv.model.Condition`, and every batch has the same shape as the first.

    Attributes:
        cold_batches: batches after which nothing is compiled or captured any more.
    """

    cold_batches = 1

    @abstractmethod
    def begin(self, condition: Condition, keys: Tensor, sampling: Sampling) -> None:
        """Start a batch: prefill, and the first token of every picture.

        Args:
            condition: of all rows.
            keys: int32 `[pictures, 2]`, from `arkv.decoding.noise.seed_keys`: what tokens are drawn by.
            sampling: how.

        Raises:
            MemoryLimitError: there is not enough memory.
        """

    @abstractmethod
    def decode(self, steps: range) -> None:
        """Feed the tokens at some places, one of `pieces`, and draw the one after each."""

    def pieces(self, steps: range) -> list[range]:
        """The steps of a line as they can be timed: each, or where the line is one piece of work, all."""
        return [range(position, position + 1) for position in steps]

    @abstractmethod
    def skip(self, position: int) -> None:
        """Make the next step, the one at a later position, cost what it does after all those before it.

        What the cache then holds is as much, but of no use for pictures.

        Args:
            position: of the next step.
        """

    def check(self) -> None:  # noqa: B027  not every engine has something to check
        """Raise `NumericalError` where numbers are not finite; waits for the device."""

    @property
    @abstractmethod
    def tokens(self) -> Tensor:
        """int64 `[pictures, N]`, what was drawn in the newest batch; behind that anything."""

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


class StepByStep(Engine):
    """A library that gives logits for tokens: they are drawn here, by the operations of arkv's own loop.

    Args:
        model: whose pictures are drawn.
    """

    def __init__(self, model: Model) -> None:
        self._grid, self._device = model.spec.grid, model.device

    @abstractmethod
    def prefill(self, condition: Condition) -> Tensor:
        """Start a batch.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.
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

    def begin(self, condition: Condition, keys: Tensor, sampling: Sampling) -> None:
        """Prefill, and draw from the logits."""
        self._keys, self._sampling = keys, sampling
        self._places = torch.arange(self._grid.tokens, device=self._device)
        numbers = torch.tensor([sampling.guidance, sampling.temperature], device=self._device)
        self._scale, self._temperature = numbers.unbind()
        self._tokens = torch.zeros(len(keys), self._grid.tokens, dtype=torch.long, device=self._device)
        self._draw(self.prefill(condition), 0)

    def decode(self, steps: range) -> None:
        """Feed tokens, and draw from the logits."""
        for position in steps:
            fed = self._tokens[:, position]
            logits = self.advance(fed.repeat(2) if self._sampling.guided else fed, position)
            self._draw(logits, position + 1)

    def _draw(self, logits: Tensor, position: int) -> None:
        sampling, pictures = self._sampling, len(self._tokens)
        guided = guide(logits, self._scale) if sampling.guides(position) else logits[:pictures]
        place = self._places[position].expand(pictures)
        self._tokens[:, position] = draw(guided, self._keys, place, sampling, self._temperature)

    @property
    def tokens(self) -> Tensor:
        """What was drawn."""
        return self._tokens


class PolicyEngine(Engine):
    """arkv's own loop under a policy, as `arkv.Decoder` runs it: what is captured is a line.

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
        # The last line is shorter by a step: another graph, which the first batch has run for the first time.
        self.cold_batches = 2 if compile == "cudagraphs" else 1

    def begin(self, condition: Condition, keys: Tensor, sampling: Sampling) -> None:
        """Start a batch; the store is allocated at the first."""
        if self._loop is None:
            rows, length = condition.mask.shape
            pictures = rows // 2 if self._guided else rows
            batch = (self._model, self._policy, pictures, self._guided, length)
            check_memory(*batch, self._kv_dtype, compile=self._compile)
            self._loop = Loop(
                self._model, self._policy, rows, length, self._compile, self._guided, self._kv_dtype
            )
        self._next, self._sampling = 0, sampling
        self._loop.begin_(condition, keys, sampling)

    def decode(self, steps: range) -> None:
        """A line, or a part of it."""
        self._begun.decode_(steps, self._sampling)
        self._next = steps.stop

    def pieces(self, steps: range) -> list[range]:
        """All of a line where it is captured: its graph is what `generate` replays."""
        return [steps] if self._compile == "cudagraphs" else super().pieces(steps)

    def skip(self, position: int) -> None:
        """Slots are given up and claimed, and nothing is computed."""
        self._begun.pass_over_(range(self._next, position))
        self._next = position

    def check(self) -> None:
        """Raise `NumericalError` where numbers are not finite."""
        self._begun.check()

    @property
    def tokens(self) -> Tensor:
        """What was drawn, and guesses behind that."""
        return self._begun.tokens

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
