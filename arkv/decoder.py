"""`Decoder`: prompts in, pictures out."""

from __future__ import annotations

import base64
import html
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from operator import index
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from arkv.attention.quantization import KvDtype, storage_dtype
from arkv.decoding.compiling import Compile, check_mode
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling, guide
from arkv.errors import ArkvError
from arkv.estimate import check_memory, estimate, format_bytes, pictures_within, usable_memory
from arkv.model import Condition, Model, check_model
from arkv.pictures.files import png
from arkv.pictures.sheet import Cell, contact_sheet, in_rows
from arkv.policy import CachePolicy
from arkv.store import Store

LONGEST_PROMPTS = 8
"""Prompts that are encoded to find the batch that fits."""

LENGTHS = 16
"""If compiled, condition tokens with padding are a multiple of this: prompts share what is compiled."""

SHOWN = 64
"""Pictures of a result that a notebook shows."""

OnLine = Callable[[range, int, list[Image.Image]], None]


@dataclass(frozen=True)
class Statistics:
    """What a call of `Decoder.generate` took.

    Attributes:
        pictures: pictures made.
        tokens: visual tokens sampled, all pictures together.
        steps: sequential decoding steps, all batches together.
        seconds: wall time of conditioning, prefill and decoding, and of compiling what had to be compiled;
            drawing the pixels at the end is not in it.
        kv_bytes: keys and values allocated for the largest batch.
        full_kv_bytes: what the full cache would have taken for it.
    """

    pictures: int
    tokens: int
    steps: int
    seconds: float
    kv_bytes: int
    full_kv_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Visual tokens a second, guidance rows not counted twice."""
        return self.tokens / self.seconds

    def __str__(self) -> str:
        share = self.kv_bytes / self.full_kv_bytes
        pictures = "1 picture" if self.pictures == 1 else f"{self.pictures} pictures"
        return (
            f"{pictures}, {self.steps} steps in {self.seconds:.2f} s, "
            f"{self.tokens_per_second:,.0f} tokens/s, KV {format_bytes(self.kv_bytes)} "
            f"({share:.0%} of the full cache's {format_bytes(self.full_kv_bytes)})"
        )


@dataclass(frozen=True)
class Result:
    """Pictures and how they came about.

    Attributes:
        images: one a prompt, in order; none if only tokens were asked for.
        tokens: int64 `[pictures, N]` on the CPU.
        stats: time and memory.
    """

    images: list[Image.Image]
    tokens: Tensor
    stats: Statistics

    def __repr__(self) -> str:
        size = f" of {self.images[0].width} x {self.images[0].height} pixels" if self.images else ""
        return f"<Result{size}: {self.stats}>"

    def _repr_html_(self) -> str | None:
        """A contact sheet for notebooks; None, so that they show the text, where there are no pictures."""
        if not self.images:
            return None
        sheet = contact_sheet(in_rows([Cell(image) for image in self.images[:SHOWN]]))
        data = base64.b64encode(png(sheet, {})).decode()
        more = "" if len(self.images) <= SHOWN else f"The first {SHOWN} are shown. "
        return (
            f'<img src="data:image/png;base64,{data}" alt="{len(self.images)} pictures" '
            f'style="max-width: 100%"><p>{more}{html.escape(str(self.stats))}</p>'
        )


@dataclass(frozen=True)
class ForcedLogits:
    """Logits of every step under given tokens, float32 on the CPU.

    Attributes:
        raw: `[rows, N, vocabulary]`: every conditional row, then, with guidance, every unconditional one.
        guided: `[pictures, N, vocabulary]`; the conditional rows themselves without guidance.
    """

    raw: Tensor
    guided: Tensor


class Decoder:
    """Generates pictures with a model while a policy decides what stays in its cache.

    Args:
        model: from `arkv.load_model`, or any `arkv.model.Model`.
        policy: from `arkv.load_policy`, or any `arkv.policy.CachePolicy`.
        compile: "none" runs eagerly and starts at once; "inductor" compiles one block for all layers,
            which takes a while at the first picture of every batch size and is faster from then on;
            "cudagraphs" does so, too, and replays whole lines as CUDA graphs: the fastest on a GPU.
        kv_dtype: "int8" or "fp8" to store keys and values in eight bits, with a scale for every slot; None
            for the model's own dtype.

    The model is put into evaluation mode.

    Raises:
        BudgetError: the policy's parameters do not fit the model's grid.
        ArkvError: the model has no weights, or there is no such compile mode, here or at all.
    """

    def __init__(
        self,
        model: Model,
        policy: CachePolicy,
        compile: Compile = "none",
        kv_dtype: KvDtype | None = None,
    ) -> None:
        check_model(model)
        if model.device.type == "meta":
            raise ArkvError("the model is on the meta device: it has shapes but no weights to decode with")
        self.model, self.policy, self.compile = model.eval(), policy, compile
        self.kv_dtype = kv_dtype
        self.plan = policy.plan(model.spec.grid, model.spec)
        check_mode(compile, model.device)
        storage_dtype(kv_dtype, model.dtype)
        self._loop: Loop | None = None

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

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Any],
        *,
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guided_tokens: int | None = None,
        batch_size: int | Literal["auto"] | None = None,
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
            guidance: scale of classifier-free guidance; 1 switches it off, None takes the model's own.
            temperature: divisor of the logits; 0 takes the likeliest token.
            top_k: draw from this many likeliest tokens only; 0 from all, None takes the model's own number.
            top_p: draw from the smallest set of tokens with at least this probability.
            guided_tokens: guide this many visual tokens from the first on, and draw the others from the
                conditional logits; None takes the model's own number, which is all for most.
            batch_size: pictures decoded at a time; None for all at once, "auto" for as many as the free
                memory has room for by `arkv.estimate`.
            progress: show a bar.
            pixels: whether to turn the tokens into pictures, which `images` can do later and elsewhere.
            on_line: called after each line with the range of prompts in this batch, the index of the line
                and, for each of these prompts, the lines finished so far as an image.

        Raises:
            ArkvError: a value is out of range; its subclasses `PromptError`, `MemoryLimitError` and
                `NumericalError` say more. Numbers are checked at the end of each line.
        """
        prompts, seeds = self._check_prompts(prompts), self._check_seeds(seeds, len(prompts))
        guidance = self.model.spec.guidance if guidance is None else guidance
        top_k = self.model.spec.top_k if top_k is None else top_k
        guided_tokens = self.model.spec.guided_tokens if guided_tokens is None else guided_tokens
        sampling = Sampling(guidance, temperature, top_k if top_k != 0 else None, top_p, guided_tokens)
        sampling.check(self.model.spec.vocabulary)
        check_batch_size(batch_size)
        self.model.check_prompts(prompts)
        total = self.model.spec.grid.tokens
        tokens, seconds, bytes_held, bytes_full = [], 0.0, 0, 0
        size = len(prompts) if batch_size is None else batch_size
        start = 0
        with tqdm(total=len(prompts) * total, unit="token", unit_scale=True, disable=not progress) as bar:
            while start < len(prompts):
                begun = time.perf_counter()
                if size == "auto":
                    size = self.batch_that_fits(prompts, sampling.guided)
                batch = range(start, min(start + size, len(prompts)))
                rows = list(batch)
                if start and self.compile != "none":
                    # A short last batch is filled up: a shape of its own would be compiled anew.
                    rows += [rows[-1]] * (size - len(rows))
                condition = self._condition([prompts[i] for i in rows], sampling.guided)
                loop = self._loop_for(condition, len(rows), sampling.guided)
                keys = seed_keys([seeds[i] for i in rows])
                for line in loop.sample_(condition, keys, sampling):
                    bar.update(self.model.spec.grid.line * len(batch))
                    if on_line is not None:
                        on_line(batch, line, self._lines_so_far(loop.tokens[: len(batch)], line))
                tokens.append(loop.tokens[: len(batch)].to("cpu", copy=True))
                seconds += time.perf_counter() - begun
                if loop.store.kv_bytes > bytes_held:
                    estimated = estimate(
                        self.model, self.policy, len(rows), sampling.guided, loop.store.condition
                    )
                    bytes_held, bytes_full = loop.store.kv_bytes, estimated.full_kv
                del loop  # a store of another shape must not be allocated beside this one
                start = batch.stop
        all_tokens = torch.cat(tokens)
        stats = Statistics(
            pictures=len(prompts),
            tokens=all_tokens.numel(),
            steps=len(tokens) * total,
            seconds=seconds,
            kv_bytes=bytes_held,
            full_kv_bytes=bytes_full,
        )
        return Result(images(self.model, all_tokens) if pixels else [], all_tokens, stats)

    @torch.inference_mode()
    def teacher_force(self, prompts: Sequence[Any], tokens: Tensor, guidance: float = 1.0) -> ForcedLogits:
        """Logits of every step when the given tokens are decoded instead of sampled ones.

        The tool for parity with a reference and for measuring what a policy changes.

        Args:
            prompts: as for `generate`.
            tokens: int64 `[pictures, N]`.
            guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out.

        Raises:
            ArkvError: the tokens have another shape or are outside the vocabulary.
        """
        prompts = self._check_prompts(prompts)
        sampling = Sampling(guidance)
        sampling.check(self.model.spec.vocabulary)
        spec = self.model.spec
        tokens = torch.as_tensor(tokens)
        wanted = (len(prompts), spec.grid.tokens)
        if tuple(tokens.shape) != wanted:
            raise ArkvError(
                f"tokens have shape {list(tokens.shape)}: expected {list(wanted)}, a picture a prompt"
            )
        if (
            tokens.is_floating_point()
            or tokens.dtype == torch.bool
            or int(tokens.min()) < 0
            or int(tokens.max()) >= spec.vocabulary
        ):
            raise ArkvError(f"tokens must be whole numbers from 0 to {spec.vocabulary - 1}")
        condition = self._condition(prompts, sampling.guided)
        loop = self._loop_for(condition, len(prompts), sampling.guided)
        tokens = tokens.to(self.model.device, torch.long)
        scale = torch.tensor(guidance, dtype=torch.float32, device=self.model.device)
        logits = loop.prefill_(condition)
        raw = torch.empty(len(logits), spec.grid.tokens, spec.vocabulary)
        guided = torch.empty(len(prompts), *raw.shape[1:]) if sampling.guided else raw
        for position in range(spec.grid.tokens):
            raw[:, position] = logits
            if sampling.guided:
                guided[:, position] = guide(logits, scale)
            if position + 1 < spec.grid.tokens:
                logits = loop.advance_(_for_rows(tokens[:, position], sampling), position)
        loop.check()
        return ForcedLogits(raw, guided)

    @torch.inference_mode()
    def batch_that_fits(self, prompts: Sequence[Any], guided: bool) -> int:
        """How many pictures of any of these prompts can be decoded at a time.

        Args:
            prompts: as for `generate`.
            guided: whether every picture has an unconditional row too.

        Returns:
            At least 1, at most all of them; which is what it is where nobody can say how much memory is free.
        """
        # Every batch is padded to its own longest prompt. Encoding all of them now may take long, so a few of
        # the longest texts speak for the rest; what one of those is off by, `KEPT_FREE` has room for.
        texts = sorted(prompts, key=lambda prompt: len(str(prompt)))[-LONGEST_PROMPTS:]
        longest = self._condition(texts, False).mask.shape[1]
        usable = usable_memory(self.model.device)
        if usable is None:
            return len(prompts)
        fits = pictures_within(usable, self.model, self.policy, guided, longest, self.kv_dtype)
        return max(1, min(fits, len(prompts)))

    def _condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        """The condition tokens; where every length is compiled anew, of one of a few lengths."""
        condition = self.model.condition(prompts, guided)
        length = condition.mask.shape[1]
        if self.compile == "none":
            return condition
        rounded = -(-length // LENGTHS) * LENGTHS
        return condition.padded(max(length, min(rounded, self.model.spec.max_condition)))

    def _loop_for(self, condition: Condition, pictures: int, guided: bool) -> Loop:
        """The loop of this batch shape; the last one is kept, with its store and its graphs."""
        rows, length = condition.mask.shape
        shape = (rows, length, guided, self.model.dtype, self.model.device)  # a model may have been moved
        if self._loop is None or self._loop.shape != shape:
            self._loop = None  # its memory is free before the next store is allocated
            check_memory(self.model, self.policy, pictures, guided, length, self.kv_dtype)
            self._loop = Loop(
                self.model, self.policy, rows, length, self.compile, guided, kv_dtype=self.kv_dtype
            )
        return self._loop

    def _lines_so_far(self, tokens: Tensor, line: int) -> list[Image.Image]:
        """The upper part of each picture, down to a line that is finished."""
        rows = self.model.spec.grid.rows
        return [i.crop((0, 0, i.width, i.height * (line + 1) // rows)) for i in images(self.model, tokens)]

    @staticmethod
    def _check_prompts(prompts: Sequence[Any]) -> list[Any]:
        if isinstance(prompts, str):
            raise ArkvError("prompts is one text: expected a list of them, such as ['a red circle']")
        if not isinstance(prompts, Iterable):
            raise ArkvError(f"prompts is {prompts!r}: expected a list of them")
        prompts = list(prompts)
        if not prompts:
            raise ArkvError("the list of prompts is empty: give at least one")
        return prompts

    @staticmethod
    def _check_seeds(seeds: Sequence[int] | None, count: int) -> list[int]:
        if seeds is None:
            return list(range(count))
        if not isinstance(seeds, Iterable):
            raise ArkvError(f"seeds is {seeds!r}: expected a list, one seed a prompt")
        seeds = list(seeds)
        if len(seeds) != count:
            raise ArkvError(f"{len(seeds)} seeds for {count} prompts: give one seed a prompt")
        for seed in seeds:
            if isinstance(seed, bool) or not hasattr(seed, "__index__") or not 0 <= seed < 2**64:
                raise ArkvError(f"seed {seed!r}: expected a whole number from 0 to 2^64 - 1")
        return [index(seed) for seed in seeds]


@torch.inference_mode()
def images(model: Model, tokens: Tensor) -> list[Image.Image]:
    """The pictures that tokens stand for.

    Args:
        model: whose tokens they are.
        tokens: int64 `[pictures, N]`.
    """
    return [Image.fromarray(picture) for picture in model.pixels(tokens).numpy()]


def check_batch_size(size: object) -> None:
    """Raise `ArkvError` unless it is a whole number of pictures, "auto" or None."""
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
    if not whole and size not in ("auto", None):
        raise ArkvError(f"batch_size is {size!r}: expected a whole number, at least 1, or 'auto'")


def _short(policy: CachePolicy) -> str:
    """A policy with the parameters that are not as they come."""
    if not is_dataclass(policy):
        return repr(policy)
    given = [(each, getattr(policy, each.name)) for each in fields(policy) if each.repr]
    words = [f"{each.name}={value!r}" for each, value in given if value != each.default]
    return f"{type(policy).__name__}({', '.join(words)})"


def _for_rows(tokens: Tensor, sampling: Sampling) -> Tensor:
    """A picture's token for each of its rows."""
    return tokens.repeat(2) if sampling.guided else tokens
