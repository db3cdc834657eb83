"""How fast policies decode on this machine, what they hold, and how near they come to the memory's speed.

Configurations that are compared take turns, one picture batch each, round after round: a machine that is slow
for a minute is slow for all of them, and a speed-up is a median over rounds, not the luck of one. Where their
caches do not fit into memory together they follow one another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from arkv.attention.quantization import KvDtype
from arkv.decoding.compiling import Compile
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError, MemoryLimitError
from arkv.estimate import estimate, pictures_within, usable_memory
from arkv.machine.instruments import PeakMemory
from arkv.model import Model
from arkv.registry import at_ratios
from arkv.speed.contestant import Configuration as Configuration
from arkv.speed.contestant import Contestant, engine_of, policy_of
from arkv.speed.engine import BASELINES
from arkv.speed.measurement import Measurement, Refusal
from arkv.speed.roofline import copy_bandwidth, weight_bytes
from arkv.speed.summary import summary
from arkv.speed.timing import WHOLE, Extent, decode


def configurations(
    policies: Sequence[str], ratios: Sequence[str], batch_sizes: Sequence[int]
) -> list[Configuration]:
    """Every policy at every ratio and every batch size.

    Args:
        policies: names, with parameters if any. One that has no ratio, or is given its budget here, is
            taken once as it stands, and so are baselines.
        ratios: such as "1/6".
        batch_sizes: pictures decoded at a time.

    Raises:
        UnknownNameError: there is no such policy.
    """
    complete: dict[str, None] = {}  # an ordered set
    for text in policies:
        baseline = text.partition(":")[0] in BASELINES
        complete |= dict.fromkeys([text] if baseline else at_ratios([text], ratios))
    return [Configuration(policy, size) for size in batch_sizes for policy in complete]


def at_equal_memory(
    model: Model,
    policies: Sequence[str],
    memory: int,
    guidance: float | None = None,
    seed: int = 0,
    kv_dtype: KvDtype | None = None,
) -> list[Configuration]:
    """Every policy with the largest batch whose estimate, weights included, fits into some memory.

    A baseline gets the batch of the full cache.

    Args:
        model: what draws.
        policies: with their parameters; baselines too.
        memory: bytes.
        guidance: as for `measure`.
        seed: of the prompts, whose length counts.
        kv_dtype: as for `measure`.

    Raises:
        MemoryLimitError: not even one picture fits.
        ArkvError: a policy does not fit the model.
    """
    guided = _sampling(model, guidance).guided
    length = _condition_length(model, SAMPLE, guided, seed)
    found = []
    for text in policies:
        policy, stored = policy_of(text), None if text in BASELINES else kv_dtype
        one = estimate(model, policy, 1, guided, length, kv_dtype=stored)
        if one.total > memory:
            raise MemoryLimitError(
                f"{text}: one picture needs {one.total / 1e9:.3g} GB with the weights, and "
                f"{memory / 1e9:.3g} GB are given"
            )
        size = pictures_within(memory - one.weights, model, policy, guided, length, stored)
        found.append(Configuration(text, size, memory))
    return found


SAMPLE = 64
"""Prompts whose longest stands for the length of all."""


def refusal(model: Model, wanted: Configuration) -> Refusal | None:
    """Why a configuration cannot be measured with a model, or None if nothing speaks against it so far."""
    try:
        engine_of(model, wanted, "none", True, None)
    except ArkvError as error:
        return _refused(model, wanted, error)
    return None


def measure(
    model: Model,
    wanted: Sequence[Configuration],
    *,
    compile: Compile = "none",
    kv_dtype: KvDtype | None = None,
    repeats: int = 3,
    guidance: float | None = None,
    seed: int = 0,
    extent: Extent = WHOLE,
    bandwidth: float | None = None,
    progress: bool = False,
) -> Iterator[Measurement | Refusal]:
    """Decode pictures under every configuration; a row comes as soon as it is measured.

    Configurations of one batch size, or of one memory, are a group. Caches of a group are held at the same
    time, if they fit: none is set up anew within a round.

    Every round brings a row of each configuration, about all rounds so far; the last one counts.

    Args:
        model: what draws; its own example prompts are used.
        wanted: in the order of the result.
        compile: how, for all but baselines.
        kv_dtype: how keys and values are stored, for all but baselines.
        repeats: rounds after the first, cold one; at least 1.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out, None takes the
            model's own.
        seed: of the prompts and of the first picture of a batch.
        extent: what part of every picture is decoded.
        bandwidth: of this machine, from `arkv.speed.roofline.copy_bandwidth`; None to measure it now.
        progress: show a bar, in steps.

    Raises:
        ArkvError: a policy does not fit the model or a value is out of range. Where memory is short, that
            configuration is refused and the others go on.
    """
    if repeats < 1:
        raise ArkvError(f"repeats is {repeats}: expected at least 1")
    sampling = _sampling(model, guidance)
    spans = extent.spans(model.spec.grid)
    contestants = [Contestant(model, one, compile, sampling.guided, kv_dtype) for one in wanted]
    return _measure_groups(model, contestants, sampling, extent, spans, repeats, seed, bandwidth, progress)


def _measure_groups(
    model: Model,
    contestants: Sequence[Contestant],
    sampling: Sampling,
    extent: Extent,
    spans: Sequence[range],
    repeats: int,
    seed: int,
    bandwidth: float | None,
    progress: bool,
) -> Iterator[Measurement | Refusal]:
    groups: dict[tuple[int | None, int | None], list[Contestant]] = {}
    for one in contestants:
        size, memory = one.wanted.batch_size, one.wanted.memory
        groups.setdefault((size if memory is None else None, memory), []).append(one)
    bandwidth = copy_bandwidth(model.device) if bandwidth is None else bandwidth
    weights = weight_bytes(model)
    batches = sum(repeats + one.engine.cold_batches for one in contestants)
    steps = batches * sum(map(len, spans))
    with tqdm(total=steps, unit="step", disable=not progress) as bar:
        for group in groups.values():
            turns = _fit_together(model, group, sampling.guided, seed)
            for party in [group] if turns else [[one] for one in group]:
                for one in _take_turns(model, party, sampling, spans, repeats, seed, bar):
                    yield one.refusal or summary(
                        model, one, sampling, extent, spans, turns, bandwidth, weights
                    )
                for one in party:
                    one.engine.release()


def _fit_together(model: Model, group: Sequence[Contestant], guided: bool, seed: int) -> bool:
    """Whether the caches of all can be held at once."""
    usable = usable_memory(model.device)
    if usable is None or len(group) == 1:
        return True
    length = _condition_length(model, max(one.wanted.batch_size for one in group), guided, seed)
    needed = [
        estimate(model, one.policy, one.wanted.batch_size, guided, length, kv_dtype=one.kv_dtype).batch
        for one in group
    ]
    return sum(needed) <= usable


def _take_turns(
    model: Model,
    party: Sequence[Contestant],
    sampling: Sampling,
    spans: Sequence[range],
    repeats: int,
    seed: int,
    bar: tqdm[Any],
) -> Iterator[Contestant]:
    """Cold batches of each, and then a batch of each in every round; each time that one has a row to show."""
    for round_ in range(repeats + 1):
        for one in party:
            if one.refusal is not None:
                continue
            bar.set_description(f"{one.wanted.policy} x {one.wanted.batch_size}")
            try:
                if round_ == 0:
                    _warm_up(model, one, sampling, spans, seed, bar)
                    continue
                one.traces.append(
                    decode(model, one.engine, one.wanted.batch_size, sampling, spans, seed, bar)
                )
            except (MemoryLimitError, torch.OutOfMemoryError) as error:
                one.refusal = _refused(model, one.wanted, error)
                one.engine.release()
            yield one


def _warm_up(
    model: Model, one: Contestant, sampling: Sampling, spans: Sequence[range], seed: int, bar: tqdm[Any]
) -> None:
    gauge, begun = PeakMemory(model.device), time.perf_counter()
    for number in range(one.engine.cold_batches):
        decode(model, one.engine, one.wanted.batch_size, sampling, spans, seed, bar)
        if number == 0:
            one.cold_seconds = time.perf_counter() - begun
    one.kv_bytes, one.slot_bytes = one.engine.kv_bytes, one.engine.slot_bytes
    one.peak_rise = gauge.rise()


def _sampling(model: Model, guidance: float | None) -> Sampling:
    """The model's own, as `arkv.Decoder` has it."""
    spec = model.spec
    guidance = spec.guidance if guidance is None else guidance
    sampling = Sampling(guidance, top_k=spec.top_k or None, guided_tokens=spec.guided_tokens)
    sampling.check(spec.vocabulary)
    return sampling


def _refused(model: Model, wanted: Configuration, error: Exception) -> Refusal:
    told = " ".join(str(error).split())
    return Refusal(model.spec.name, wanted.policy, wanted.batch_size, wanted.memory, told)


def _condition_length(model: Model, pictures: int, guided: bool, seed: int) -> int:
    """Condition tokens of a row, padding included."""
    with torch.inference_mode():
        return model.condition(model.example_prompts(pictures, seed), guided).mask.shape[1]
