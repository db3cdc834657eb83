"""`Decoder`: prompts in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields, is_dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from arkv.attention.quantization import KvDtype, storage_dtype
from arkv.decoding.arguments import check_batch_size as check_batch_size
from arkv.decoding.arguments import check_window, forced_tokens, is_list, prompt_list, seed_list
from arkv.decoding.compiling import Compile, check_mode
from arkv.decoding.isolation import Turns, isolated
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.preview import LinesSoFar
from arkv.decoding.preview import images as images
from arkv.decoding.sampling import Sampling, guide
from arkv.decoding.width import WindowSize, chosen_width
from arkv.errors import ArkvError, warn
from arkv.estimate import check_memory, estimate, pictures_within, usable_memory
from arkv.model import Condition, Model, check_model
from arkv.policy import CachePolicy
from arkv.registry import load_policy
from arkv.result import ForcedLogits as ForcedLogits
from arkv.result import Result as Result
from arkv.result import Statistics as Statistics
from arkv.scalars import brief, plain
from arkv.store import Store

LONGEST_PROMPTS = 8
"""Prompts that are encoded to find the batch that fits."""

LENGTHS = 16
"""If compiled, condition tokens with padding are a multiple of this: prompts share what is compiled."""

OnLine = Callable[[range, int, Sequence[Image.Image]], object]


class Decoder:
    """Generates pictures with a model while a policy decides what stays in its cache.

    Args:
        model: from `arkv.load_model`, or any `arkv.model.Model`.
        policy: from `arkv.load_policy`, or any `arkv.policy.CachePolicy`; or a text such as
            "linear:ratio=1/6".
        compile: "none" runs eagerly and starts at once; "inductor" compiles one block for all layers,
            which takes a while at the first picture of every batch size and is faster from then on;
            "cudagraphs" does so, too, and replays whole lines as CUDA graphs: the fastest on a GPU.
        kv_dtype: "int8" or "fp8" to store keys and values in eight bits, with a scale for every slot, or
            "int4", in four, with a scale and a zero for 32 numbers; None for the model's own dtype.

    A decoder is what its constructor said: `model`, `policy`, `plan`, `compile` and `kv_dtype` can be read
    and not set. The model is put into evaluation mode. Threads that use one decoder wait for each other; a
    copy, one that was sent to another process, and a decoder in a forked process have a cache of their own.

    Raises:
        BudgetError: the policy's parameters do not fit the model's grid.
        ArkvError: the model has no weights, or there is no such compile mode, here or at all.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy | str,
        compile: Compile = "none",
        kv_dtype: KvDtype | None = None,
    ) -> None:
        check_model(model)
        policy = load_policy(policy) if isinstance(policy, str) else policy
        if not isinstance(policy, CachePolicy):
            raise ArkvError(
                f"policy is {brief(policy)}: give a text such as 'linear:ratio=1/6', or load_policy's"
            )
        if model.device.type == "meta":
            raise ArkvError("the model is on the meta device: it has shapes but no weights to decode with")
        self.model: Model = model.eval()
        self.policy: CachePolicy = policy
        self.compile: Compile = compile
        self.kv_dtype: KvDtype | None = kv_dtype
        self.plan = policy.plan(model.spec.grid, model.spec)
        check_mode(compile, model.device)
        storage_dtype(kv_dtype, model.dtype)
        self._loop: Loop | None = None
        self._has_room = True  # for what "auto" would keep
        self._turns = Turns("this decoder")

    def __setattr__(self, name: str, value: Any) -> None:
        # What is compiled, captured and allocated was made for what the constructor said.
        if not name.startswith("_") and name in vars(self):
            raise ArkvError(f"the {name} of a decoder cannot be changed: make another arkv.Decoder with it")
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy has a cache of its own: processes share the memory of tensors that they are sent.
        return type(self), (self.model, self.policy, self.compile, self.kv_dtype)

    def __repr__(self) -> str:
        model = (
            f"{self.model.spec.name} in {str(self.model.dtype).removeprefix('torch.')} on {self.model.device}"
        )
        stored = "" if self.kv_dtype is None else f", kv_dtype={self.kv_dtype!r}"
        return f"<Decoder: {model}, {_short(self.policy)}, compile={self.compile!r}{stored}>"

    @property
    def store(self) -> Store | None:
        """The cache of the newest batch as it stands, not to be written to; None before the first batch.

        The next batch of the same shape overwrites it.
        """
        return None if self._loop is None else self._loop.store

    def generate(
        self,
        prompts: Iterable[Any],
        *,
        seeds: Iterable[int] | None = None,
        seed: int | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guided_tokens: int | None = None,
        batch_size: int | Literal["auto"] | None = None,
        window: WindowSize = "auto",
        progress: bool = False,
        pixels: bool = True,
        on_line: OnLine | None = None,
    ) -> Result:
        """Make one picture a prompt.

        A picture depends on its prompt, its seed and the settings, not on what else is in the batch: beyond
        rounding, which now and then moves a token where the dtype is narrow.

        Args:
            prompts: what the model is conditioned on: texts, for most.
            seeds: one whole number a prompt; None for 0, 1, 2, ...
            seed: of the first prompt, instead of `seeds`; the others get those after it.
            guidance: scale of classifier-free guidance; 1 switches it off, None takes the model's own.
            temperature: divisor of the logits; 0 takes the likeliest token.
            top_k: draw from this many likeliest tokens only; 0 from all, None takes the model's own number.
            top_p: draw from the smallest set of tokens with at least this probability.
            guided_tokens: guide this many visual tokens from the first on, and draw the others from the
                conditional logits; None takes the model's own number, which is all for most.
            batch_size: pictures decoded at a time; None for all at once, "auto" for as many as the free
                memory has room for by `arkv.estimate`. Compiled, a smaller batch is filled up to it: another
                size would be compiled anew.
            window: the most tokens of a picture that a forward pass takes. It changes none of them, and saves
                passes where they mostly read weights, with one picture or a few; "auto" decides by batch,
                device and dtype (see the guide on windows). Some policies allow of one only.
            progress: show a bar.
            pixels: whether to turn the tokens into pictures, which `images` can do later and elsewhere.
            on_line: called after each line with the range of prompts in this batch, the index of the line
                and, for each of these prompts, the lines finished so far as an image, drawn when it is first
                looked at. If it returns False, no further line is drawn.

        Returns:
            A picture a prompt; if `on_line` ended it, those of the batches that were done.

        Raises:
            ArkvError: a value is out of range; its subclasses `PromptError`, `MemoryLimitError` and
                `NumericalError` say more. Numbers are checked at the end of each line.
        """
        prompts = prompt_list(prompts)
        seeds = seed_list(seeds, seed, len(prompts))
        sampling = self._sampling(guidance, temperature, top_k, top_p, guided_tokens)
        batch_size, window = check_batch_size(batch_size), check_window(window)
        total, line_length = self.model.spec.grid.tokens, self.model.spec.grid.line
        done: list[Tensor] = []
        seconds, passes, bytes_held, bytes_full, goes_on = 0.0, 0, 0, 0, True
        with ExitStack() as stack:
            stack.enter_context(self._turn())
            stack.enter_context(isolated(self.model.device))
            self.model.check_prompts(prompts)
            size = len(prompts) if batch_size is None else batch_size
            if size == "auto":
                size = self._batch_that_fits(prompts, sampling.guided)
            if self.compile != "none":  # a smaller batch is filled up
                self._check_room(size)
            bar = tqdm(total=len(prompts) * total, unit="token", unit_scale=True, disable=not progress)
            stack.enter_context(bar)
            for start in range(0, len(prompts), size):
                begun = time.perf_counter()
                batch = range(start, min(start + size, len(prompts)))
                rows = list(batch)
                if self.compile != "none":
                    rows += [rows[-1]] * (size - len(rows))
                condition = self._condition([prompts[i] for i in rows], sampling.guided)
                loop = self._loop_for(condition, len(rows), sampling.guided, window)
                if loop.store.kv_bytes > bytes_held:
                    length = loop.store.condition
                    estimated = estimate(self.model, self.policy, len(rows), sampling.guided, length)
                    bytes_held, bytes_full = loop.store.kv_bytes, estimated.full_kv
                if window != "auto" and window > loop.widest and loop.widest == 1:
                    name = type(self.policy).__name__
                    warn(f"{name} decides at every token: one a pass is taken, whatever the window is")
                keys, drawn = seed_keys([seeds[i] for i in rows]), loop.tokens[: len(batch)]
                width = window if window != "auto" or self._has_room else 1
                for line in loop.sample_(condition, keys, sampling, width):
                    bar.update(line_length * len(batch))
                    if on_line is not None:
                        with torch.inference_mode(False):  # what the caller does is the caller's
                            goes_on = on_line(batch, line, LinesSoFar(self.model, drawn, line)) is not False
                    if not goes_on:
                        break
                seconds += time.perf_counter() - begun
                if not goes_on:
                    break
                with torch.inference_mode(False):
                    done.append(drawn.clone().cpu())
                passes += 1 + loop.passes  # the prefill draws the first token
                del loop, drawn  # a store of another shape must not be allocated beside this one
        tokens = torch.cat(done) if done else torch.zeros(0, total, dtype=torch.long)
        stats = Statistics(
            pictures=len(tokens),
            tokens=tokens.numel(),
            steps=len(done) * total,
            passes=passes,
            seconds=seconds,
            kv_bytes=bytes_held,
            full_kv_bytes=bytes_full,
        )
        return Result(images(self.model, tokens) if pixels else [], tokens, stats)

    def warm_up(self, sizes: Iterable[int], **settings: Any) -> None:
        """Compile before the first picture is asked for: draw one batch of each size, of no consequence.

        Args:
            sizes: pictures of a batch, as `batch_size` of `generate` will have them.
            settings: as for `generate`; guidance and filters decide what is compiled, too.
        """
        if not is_list(sizes):
            raise ArkvError(f"sizes is {brief(sizes)}: expected a list of them, such as [1, 8]")
        for size in sizes:
            size = check_batch_size(size)
            if not isinstance(size, int):
                raise ArkvError(f"the size {brief(size)}: expected a whole number of pictures, at least 1")
            with self._turn():
                self._check_room(size)
            self.generate(self.model.example_prompts(size, 0), **settings, batch_size=size, pixels=False)

    def teacher_force(self, prompts: Iterable[Any], tokens: Tensor, guidance: float = 1.0) -> ForcedLogits:
        """Logits of every step when the given tokens are decoded instead of sampled ones.

        The tool for parity with a reference and for measuring what a policy changes.

        Args:
            prompts: as for `generate`.
            tokens: int64 `[pictures, N]`.
            guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out.

        Raises:
            ArkvError: the tokens have another shape or are outside the vocabulary.
        """
        prompts = prompt_list(prompts)
        sampling, spec = Sampling(plain(guidance)), self.model.spec
        sampling.check(spec.vocabulary)
        shape = (spec.grid.tokens, spec.vocabulary)
        guided = torch.empty(len(prompts), *shape, dtype=torch.float32, device="cpu")
        raw = torch.empty(2 * len(prompts), *shape, dtype=torch.float32, device="cpu")
        raw = raw if sampling.guided else guided
        with self._turn(), isolated(self.model.device):
            tokens = forced_tokens(tokens, len(prompts), spec.grid.tokens, spec.vocabulary)
            condition = self._condition(prompts, sampling.guided)
            loop = self._loop_for(condition, len(prompts), sampling.guided)
            tokens = tokens.to(self.model.device, torch.long)
            fed = tokens.repeat(2, 1) if sampling.guided else tokens
            scale = torch.tensor(sampling.guidance, dtype=torch.float32, device=self.model.device)
            logits = loop.prefill_(condition)
            for position in range(spec.grid.tokens):
                raw[:, position] = logits
                if sampling.guided:
                    guided[:, position] = guide(logits, scale)
                if position + 1 < spec.grid.tokens:
                    logits = loop.advance_(fed[:, position], position)
            loop.check()
        return ForcedLogits(raw, guided)

    def batch_that_fits(self, prompts: Sequence[Any], guided: bool) -> int:
        """How many pictures of any of these prompts can be decoded at a time.

        Args:
            prompts: as for `generate`.
            guided: whether every picture has an unconditional row too.

        Returns:
            At least 1, at most all of them; which is what it is where nobody can say how much memory is free.
        """
        with self._turn(), isolated(self.model.device):
            return self._batch_that_fits(list(prompts), guided)

    def _batch_that_fits(self, prompts: list[Any], guided: bool) -> int:
        # Every batch is padded to its own longest prompt. Encoding all of them now may take long, so a few of
        # the longest texts speak for the rest; what one of those is off by, `KEPT_FREE` has room for.
        texts = sorted(prompts, key=lambda prompt: len(str(prompt)))[-LONGEST_PROMPTS:]
        longest = self._condition(texts, False).mask.shape[1]
        usable = usable_memory(self.model.device, self._held)
        if usable is None:
            return len(prompts)
        stored, compile = self.kv_dtype, self.compile
        fits = pictures_within(usable, self.model, self.policy, guided, longest, stored, compile=compile)
        return max(1, min(fits, len(prompts)))

    def _turn(self) -> AbstractContextManager[None]:
        """Wait for other threads; in a forked process, begin with a cache of its own."""
        if self._turns.forked:
            self._loop, self._turns = None, Turns("this decoder")
        return self._turns.turn()

    def _condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        """The condition tokens; where every length is compiled anew, of one of a few lengths."""
        condition = self.model.condition(prompts, guided)
        length = condition.mask.shape[1]
        if self.compile == "none":
            return condition
        rounded = -(-length // LENGTHS) * LENGTHS
        return condition.padded(max(length, min(rounded, self.model.spec.max_condition)))

    def _check_room(self, pictures: int) -> None:
        """Raise `MemoryLimitError` where so many cannot be decoded at a time whatever their prompts are."""
        check_memory(self.model, self.policy, pictures, False, 1, self.kv_dtype, held=self._held)

    @property
    def _held(self) -> int:
        """Bytes of the store that was used last: it is used again, or gone before another is made."""
        return 0 if self._loop is None else self._loop.store.nbytes

    def _loop_for(self, condition: Condition, pictures: int, guided: bool, window: WindowSize = 1) -> Loop:
        """The loop of this batch shape; the last one is kept, with its store and its graphs."""
        if self.model.training:
            self.model.eval()
        rows, length = condition.mask.shape
        shape = (rows, length, guided, self.model.dtype, self.model.device)  # a model may have been moved
        if self._loop is None or self._loop.shape != shape:
            self._loop = None  # its memory is free before the next store is allocated
            batch = (self.model, self.policy, pictures, guided, length)
            least = 1 if window == "auto" else window
            check_memory(*batch, self.kv_dtype, least, self.compile)
            width = chosen_width(rows, self.model.device, self.model.dtype)
            needed = estimate(*batch, None, self.kv_dtype, width, self.compile)
            usable = usable_memory(self.model.device)
            self._has_room = usable is None or needed.batch <= usable
            self._loop = Loop(
                self.model, self.policy, rows, length, self.compile, guided, kv_dtype=self.kv_dtype
            )
        return self._loop

    def _sampling(
        self,
        guidance: float | None,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        guided_tokens: int | None,
    ) -> Sampling:
        """What was asked for, and the model's own for the rest."""
        spec = self.model.spec
        top_k = plain(spec.top_k if top_k is None else top_k)
        sampling = Sampling(
            plain(spec.guidance if guidance is None else guidance),
            plain(temperature),
            None if type(top_k) is int and top_k == 0 else top_k,
            plain(top_p),
            plain(spec.guided_tokens if guided_tokens is None else guided_tokens),
        )
        sampling.check(spec.vocabulary)
        return sampling


def _short(policy: CachePolicy) -> str:
    """A policy with the parameters that are not as they come."""
    if not is_dataclass(policy):
        return repr(policy)
    given = [(each, getattr(policy, each.name)) for each in fields(policy) if each.repr]
    words = [f"{each.name}={value!r}" for each, value in given if value != each.default]
    return f"{type(policy).__name__}({', '.join(words)})"
