"""The decoding loop of one batch: a prefill, then line after line, a token at a time.

A picture is `Loop.sample_`, a line of it `Loop._line_`, a token of that `arkv.decoding.step.Step`. A line is
one piece of work: nothing comes back to Python before its end. With `compile="inductor"` the parts of a step
are compiled; with `compile="cudagraphs"` the whole line, compiled so, is captured as one CUDA graph and
replayed for the lines after it.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from arkv.attention import cpu
from arkv.attention.quantization import storage_dtype
from arkv.attention.reference import causal_attention
from arkv.decoding.buffers import Buffers
from arkv.decoding.checks import check_needs, check_selection, is_finite, note_, search
from arkv.decoding.compiling import Compile
from arkv.decoding.graphs import Look, Replayed, on_device
from arkv.decoding.layers import has_kernels
from arkv.decoding.sampling import Sampling
from arkv.decoding.step import Step, recycle_
from arkv.decoding.width import BREAK_EVEN, TRIAL_LINES, WindowSize, chosen_width
from arkv.decoding.window import Window, parts_of, widest_window
from arkv.errors import NumericalError
from arkv.machine.threads import Threads
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
        kv_dtype: "int8", "fp8" or "int4" to store keys and values so; None for the model's own dtype.
        beside: a loop whose first rows this one goes on with, in the same keys and values; None for a loop
            of its own.

    Attributes:
        store: where keys and values lie.
        shape: rows, condition tokens, guidance, dtype and device that the loop was made for.
        tokens: int64 `[pictures, N]`, what `sample_` has drawn so far; behind that, what it guesses.
        passes: forward passes of the newest batch, the prefill not counted.
        widest: the most tokens that a pass can take under this policy.
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
        # What is compiled is compiled for a number of threads, and would be anew for another.
        adapts = device.type == "cpu" and compile == "none" and has_kernels(model, self.store)
        self._threads = Threads(cpu.use_threads if adapts else None)
        self._step = Step(model, policy, self.store, self._buffers, compile, self._threads)
        self._graphs = Replayed(compile == "cudagraphs", device)
        if self._graphs.captures:  # what a captured `advance_` reads and writes
            self._fed = torch.zeros(rows, dtype=torch.long, device=device)
            self._logits = torch.zeros(rows, spec.vocabulary, dtype=torch.float32, device=device)
        # Lines that are launched before the numbers of a line are looked at, so that a GPU need not wait.
        self._ahead = 1 if device.type == "cuda" and compile != "none" else 0
        # For the search for what went wrong: layers and head of the prefill, what `advance_` was
        # given since the last `check`.
        self._prefill_finite = torch.ones(spec.layers + 1, dtype=torch.bool, device=device)
        self._given: dict[int, Tensor] = {}
        self._guided_steps = spec.grid.tokens
        self._unguided: Loop | None = None
        self._windows: dict[int, Window] = {}
        self.widest = widest_window(policy, self.store)
        self.passes = 0

    def sample_(
        self, condition: Condition, keys: Tensor, sampling: Sampling, window: WindowSize = 1
    ) -> Iterator[int]:
        """Decode a batch of pictures into `tokens`.

        Args:
            condition: of all rows.
            keys: int32 `[pictures, 2]`, from `arkv.decoding.noise.seed_keys`: what tokens are drawn by.
            sampling: how; guided exactly if the loop is.
            window: the most tokens of a picture that a pass takes, or "auto"; it changes none of them.

        Yields:
            The index of each line when it is in the cache and its numbers are checked: as soon as it is
            drawn, or, on a GPU, while the next one is being drawn.

        Raises:
            NumericalError: a number was not finite.
        """
        grid, lines = self.model.spec.grid, 0
        self.begin_(condition, keys, sampling)
        looks: deque[Look] = deque()
        for reached in itertools.chain([0], self._places(range(grid.tokens), sampling, window)):
            # The last token of the picture enters no cache.
            while lines < grid.rows and reached >= min((lines + 1) * grid.line, grid.tokens - 1):
                looks.append(Look(self._buffers.first_bad))
                lines += 1
                if len(looks) > self._ahead:
                    self._check(int(looks.popleft().read()))
                    yield lines - 1 - len(looks)
        while looks:
            self._check(int(looks.popleft().read()))
            yield lines - 1 - len(looks)

    def begin_(self, condition: Condition, keys: Tensor, sampling: Sampling) -> None:
        """Start a batch, and draw the first token of every picture; as for `sample_`."""
        buffers = self._buffers
        first_logits = self.prefill_(condition)
        if sampling.guided_tokens is not None:
            # From then on the unconditional rows are not fed: what they would say is not used.
            self._guided_steps = max(0, sampling.guided_tokens - 1)
        with on_device(self.model.device):
            buffers.draw_by_(keys, sampling)
            self._step.draw_(first_logits, buffers, buffers.places[0], sampling.guides(0), sampling.frozen)
            self.tokens[:, 1:] = self.tokens[:, :1]  # the first guesses
        self.passes = 0

    def decode_(self, steps: range, sampling: Sampling, window: WindowSize = 1) -> None:
        """Feed the tokens at some places, and draw the one after each.

        Args:
            steps: those before them have been fed. The last token of a picture is left out: it enters no
                cache.
            sampling: as for `sample_`.
            window: likewise.
        """
        for _ in self._places(steps, sampling, window):
            pass

    def pass_over_(self, steps: range) -> None:
        """Give up slots and claim them as the tokens at some places would, and compute nothing.

        Heads then hold as much as they would, with keys and values of nothing.
        """
        with on_device(self.model.device):
            for position in steps:
                loop = self._loop_at(position)
                store, buffers = loop.store, loop._buffers
                step, offset = buffers.places[position], position % store.plan.period
                if offset == 0:
                    buffers.slots.copy_(recycle_(self.policy, store, step))
                store.claim_(buffers.slots[..., offset], step)

    def prefill_(self, condition: Condition) -> Tensor:
        """Start a batch: empty the store, fill in the condition tokens.

        Returns:
            float32 `[rows, vocabulary]`, logits of the first visual token.
        """
        store, first = self.store, self._buffers.places[0]
        self._guided_steps = self.model.spec.grid.tokens
        self._given.clear()
        with on_device(self.model.device):
            store.reset_(condition.mask)
            self.policy.begin(store)
            self._buffers.begin_(condition)
            # What stands for padding may be anything, and zero times a NaN is NaN.
            hidden = condition.embeddings.masked_fill(~condition.mask[..., None], 0)
            rotation = condition.rotation[:, : store.condition]
            for layer, block in enumerate(self.model.blocks):
                query, key, value = block.project(hidden, rotation)
                store.fill_condition_(layer, key, value)
                hidden = block.merge(hidden, causal_attention(query, key, value, condition.mask))
                # Padding attends to nothing real; only the last column speaks for a row.
                self._prefill_finite[layer] = hidden[:, -1].isfinite().all()
            logits = self._step.head(hidden[:, -1:], first)
            self._prefill_finite[-1] = is_finite(logits)
            note_(self._buffers.first_bad, logits, first)
            check_selection(self.policy, store, self.policy.select(store, first))
        return logits

    def _places(self, steps: range, sampling: Sampling, window: WindowSize) -> Iterator[int]:
        """Feed the tokens at some places, one a pass or several; as for `decode_`.

        Yields:
            The place that all pictures have come to, after a pass or a line of them.
        """
        grid = self.model.spec.grid
        cuts, stop = {self._guided_steps}, min(steps.stop, grid.tokens - 1)
        width, trial = window, grid.tokens
        if width == "auto":
            width = chosen_width(self.store.rows, self.model.device, self.model.dtype)
            # The dtype may be narrow, and what the others in a batch are like must not decide on rounding.
            if len(self.tokens) == 1:
                trial = TRIAL_LINES * grid.line
                cuts.add(trial)
        cuts = {steps.start, stop, *(cut for cut in cuts if steps.start < cut < stop)}
        for start, stop in pairwise(sorted(cuts)):
            if start >= trial and start < BREAK_EVEN * self.passes:
                width = 1
            loop = self._loop_at(start)
            if min(width, loop.widest) == 1:
                for line in parts_of(range(start, stop), grid.line):
                    loop._tokens_(line, sampling)
                    self.passes += len(line)
                    yield line.stop
            else:
                for reached in loop._window(min(width, loop.widest))(range(start, stop), sampling):
                    self.passes += 1
                    yield reached

    def _window(self, width: int) -> Window:
        """Passes of so many tokens of a picture."""
        if width not in self._windows:
            self._windows[width] = Window(
                self.model,
                self.policy,
                self.store,
                self._buffers,
                self._compile,
                self._graphs,
                self._threads,
                width,
            )
        return self._windows[width]

    def _tokens_(self, steps: range, sampling: Sampling) -> None:
        """Feed tokens one after the other, and draw the one after each."""
        buffers, period, frozen = self._buffers, self.store.plan.period, sampling.frozen

        def run() -> None:
            for position in steps:
                tokens = self._drawn(buffers.step)
                logits = self._step(tokens, position)
                buffers.step.add_(1)
                self._step.draw_(logits, buffers, buffers.step, sampling.guides(position + 1), frozen)

        with on_device(self.model.device):
            buffers.step.fill_(steps.start)
            # What a graph has for good; guidance and temperature are tensors.
            self._graphs.run(("line", len(steps), steps.start % period, frozen), run)

    def _drawn(self, step: Tensor) -> Tensor:
        """The token of every row at a step, int64 `[rows]`."""
        tokens = self.tokens.index_select(1, step[None])[:, 0]
        return tokens.repeat(2) if self.guided else tokens

    def advance_(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one given token.

        Args:
            tokens: int64 `[rows]`, the visual tokens at `position`.
            position: their place in raster order; from 0 to N - 2, one after the other.

        Returns:
            float32 `[rows, vocabulary]`, logits of the token at `position + 1`.
        """
        buffers = self._buffers
        tokens = tokens.contiguous()  # another layout would be compiled anew
        self._given[position] = tokens
        with on_device(self.model.device):
            buffers.step.fill_(position)
            if self._graphs.captures:

                def run() -> None:
                    self._logits.copy_(self._step(self._fed, position))

                self._fed.copy_(tokens)
                self._graphs.run(("step", position % self.store.plan.period), run)
                logits = self._logits.clone()
            else:
                logits = self._step(tokens, position)
            note_(buffers.first_bad, logits, buffers.step + 1)
        return logits

    def check(self) -> None:
        """Raise `NumericalError` if a number was not finite since the prefill; waits for the device."""
        self._check(int(self._buffers.first_bad))
        self._given.clear()

    def _check(self, first_bad: int) -> None:
        """Raise `NumericalError` if there is a first token whose logits were not numbers."""
        if first_bad >= 0:
            with on_device(self.model.device):
                where = self._origin(first_bad)
            total = self.model.spec.grid.tokens
            raise NumericalError(f"NaN or infinity at visual token {first_bad} of {total}, first in {where}")

    def _origin(self, first_bad: int) -> str:
        """Where numbers went wrong, and what may be the reason."""
        if first_bad == 0:
            finite = [*self._prefill_finite.tolist(), False]
            bad = finite.index(False)
            layer = None if bad == len(finite) - 1 else bad
        else:
            loop = self._unguided if self._unguided and first_bad > self._guided_steps else self
            fed = loop._buffers.places[first_bad - 1]
            tokens = self._given.get(first_bad - 1)
            tokens = loop._drawn(fed) if tokens is None else tokens
            layer = search(self.model, self.policy, loop.store, loop._buffers.rotation, tokens, fed)
        if layer is None and self.guided:
            return "the guided logits: take less guidance, or a wider dtype"
        layers = self.model.spec.layers
        where = "the output head" if layer is None or layer == layers else f"layer {layer}"
        return f"{where}: the weights are damaged, or the dtype is too narrow for them (try float32)"

    def _loop_at(self, position: int) -> Loop:
        """This loop, or once guidance is over the one of the conditional rows alone."""
        if not self.guided or position < self._guided_steps:
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
        if position == self._guided_steps:
            self._unguided.store.copy_statistics_(self.store)
            self._unguided._buffers.go_on_(self._buffers)
        return self._unguided
