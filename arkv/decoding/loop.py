"""The decoding loop of one batch: a prefill, then line after line, a token at a time.

A picture is `Loop.sample_`, a line of it `Loop._line_`, a token of that `arkv.decoding.step.Step`. A line is
one piece of work: nothing comes back to Python before its end. With `compile="inductor"` the parts of a step
are compiled; with `compile="cudagraphs"` the whole line, compiled so, is captured as one CUDA graph and
replayed for the lines after it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from arkv.attention.quantization import storage_dtype
from arkv.attention.reference import causal_attention
from arkv.decoding.buffers import Buffers
from arkv.decoding.checks import check_needs, check_numbers, check_selection
from arkv.decoding.compiling import Compile
from arkv.decoding.graphs import Replayed
from arkv.decoding.sampling import Sampling, draw, guide
from arkv.decoding.step import Step
from arkv.model import Condition, Model
from arkv.policy import CachePolicy
from arkv.store import Store


class Loop:
    """Model, policy and store of one batch shape.

    Args:
        model: whose weights decode.
        policy: what stays resident.
        rows: sequences, both guidance rows of a picture counted.
        condition: condition tokens of a row, padding included.
        compile: "none" runs eagerly, "inductor" through `torch.compile`, "cudagraphs" replays whole lines.
        guided: whether the second half of the rows are the unconditional ones of the first half.
        kv_dtype: "int8" or "fp8" to store keys and values in eight bits; None for the model's own dtype.
        beside: a loop whose first rows this one goes on with, in the same keys and values; None for a loop
            of its own.

    Attributes:
        store: where keys and values lie.
        shape: rows, condition tokens, guidance, dtype and device that the loop was made for.
        tokens: int64 `[pictures, N]`, what `sample_` has drawn so far.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        rows: int,
        condition: int,
        compile: Compile,
        guided: bool = False,
        kv_dtype: str | None = None,
        beside: Loop | None = None,
    ) -> None:
        check_needs(policy)
        spec, device = model.spec, model.device
        self.model, self.policy, self.guided = model, policy, guided
        self.store: Store = Store(
            spec,
            policy.plan(spec.grid, spec),
            rows,
            condition,
            policy.fields,
            storage_dtype(kv_dtype, model.dtype),
            device,
            policy.head_fields,
            guided,
            None if beside is None else beside.store,
        )
        self.shape = (rows, condition, guided, model.dtype, device)
        self._compile, self._kv_dtype = compile, kv_dtype
        self._buffers: Buffers = Buffers(self.store, None if beside is None else beside._buffers)
        self.tokens = self._buffers.tokens
        self._step = Step(model, policy, self.store, self._buffers, compile)
        self._graphs = Replayed(compile == "cudagraphs")
        if self._graphs.captures:  # what a captured `advance_` reads and writes
            self._fed = torch.zeros(rows, dtype=torch.long, device=device)
            self._logits = torch.zeros(rows, spec.vocabulary, device=device)
        self._unguided: Loop | None = None

    def sample_(self, condition: Condition, uniforms: Tensor, sampling: Sampling) -> Iterator[int]:
        """Decode a batch of pictures into `tokens`.

        Args:
            condition: of all rows.
            uniforms: float32 `[pictures, N]`, what each token is drawn by.
            sampling: how; guided exactly if the loop is.

        Yields:
            The index of each line as soon as it is drawn and in the cache, its numbers checked.

        Raises:
            NumericalError: a number was not finite.
        """
        grid = self.model.spec.grid
        self._buffers.draw_by_(uniforms, sampling)
        self._draw_(self.prefill_(condition), self._buffers.places[0], 0, sampling)
        for line in range(grid.rows):
            # The last token of the picture enters no cache.
            stop = min((line + 1) * grid.line, grid.tokens - 1)
            for part in split(line * grid.line, stop, self._guided_steps(sampling)):
                self._loop_at(part.start, sampling)._line_(part, sampling)
            self.check()
            yield line

    def prefill_(self, condition: Condition) -> Tensor:
        """Start a batch: empty the store, fill in the condition tokens.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.
        """
        store, first = self.store, self._buffers.places[0]
        store.reset_(condition.mask)
        self.policy.begin(store)
        self._buffers.begin_(condition)
        hidden = condition.embeddings
        rotation = condition.rotation[:, : store.condition]
        sums = []
        for layer, block in enumerate(self.model.blocks):
            query, key, value = block.project(hidden, rotation)
            store.fill_condition_(layer, key, value)
            hidden = block.merge(hidden, causal_attention(query, key, value, condition.mask))
            # Padding attends to nothing real; only the last column speaks for a row.
            sums.append(hidden[:, -1].float().sum())
        logits = self._step.finish(hidden[:, -1:], sums, first)
        check_selection(self.policy, store, self.policy.select(store, first))
        return logits

    def _line_(self, steps: range, sampling: Sampling) -> None:
        """One line, or a part of it: feed its tokens one after the other, and draw the one after each."""
        buffers, period = self._buffers, self.store.plan.period

        def run() -> None:
            for position in steps:
                tokens = self.tokens.index_select(1, buffers.step[None])[:, 0]
                if self.guided:
                    tokens = tokens.repeat(2)
                logits = self._step(tokens, position)
                buffers.step.add_(1)
                self._draw_(logits, buffers.step, position + 1, sampling)

        buffers.step.fill_(steps.start)
        # What a graph has for good; guidance and temperature are tensors.
        self._graphs.run(("line", len(steps), steps.start % period, sampling.frozen), run)

    def _draw_(self, logits: Tensor, step: Tensor, position: int, sampling: Sampling) -> None:
        """Draw the token at a place."""
        buffers = self._buffers
        if sampling.guides(position):
            logits = guide(logits, buffers.scale)
        uniforms = buffers.uniforms.index_select(1, step[None])[:, 0]
        drawn = draw(logits[: len(self.tokens)], uniforms, sampling, buffers.temperature)
        self.tokens.index_copy_(1, step[None], drawn[:, None])

    def advance_(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one given token.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order; from 0 to N - 2, one after the other.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """
        self._buffers.step.fill_(position)
        if not self._graphs.captures:
            return self._step(tokens, position)

        def run() -> None:
            self._logits.copy_(self._step(self._fed, position))

        self._fed.copy_(tokens)
        self._graphs.run(("step", position % self.store.plan.period), run)
        return self._logits.clone()

    def check(self) -> None:
        """Raise `NumericalError` if a number was not finite since the prefill; waits for the device."""
        check_numbers(self._buffers.first_bad, self.model.spec.grid.tokens)

    def _guided_steps(self, sampling: Sampling) -> int:
        """From which step on the unconditional rows are not fed: what they would say is not used."""
        total = self.model.spec.grid.tokens
        return total if sampling.guided_tokens is None else max(0, sampling.guided_tokens - 1)

    def _loop_at(self, position: int, sampling: Sampling) -> Loop:
        """This loop, or once guidance is over the one of the conditional rows alone."""
        over = self._guided_steps(sampling)
        if not self.guided or position < over:
            return self
        if self._unguided is None:
            pictures, condition = len(self.tokens), self.store.condition
            self._unguided = Loop(
                self.model,
                self.policy,
                pictures,
                condition,
                self._compile,
                kv_dtype=self._kv_dtype,
                beside=self,
            )
        if position == over:
            self._unguided.store.copy_statistics_(self.store)
            self._unguided._buffers.go_on_(self._buffers)
        return self._unguided


def split(start: int, stop: int, at: int) -> list[range]:
    """The range, in two where `at` lies inside of it."""
    return [part for part in (range(start, min(stop, at)), range(max(start, at), stop)) if part]
