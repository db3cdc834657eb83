"""How fast policies decode on this machine, and how much they hold.

The configurations take turns, one picture batch each, round after round: a machine that is slow for a
minute is slow for all of them, and a speed-up is a median over rounds, not the luck of one.
"""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from arkv.decoder import Decoder
from arkv.errors import ArkvError
from arkv.loop import Compile
from arkv.model import Model
from arkv.registry import load_class, load_policy


@dataclass(frozen=True)
class Configuration:
    """What is measured.

    Attributes:
        policy: with its parameters, as `arkv.registry.load_policy` takes it.
        batch_size: pictures decoded at a time.
    """

    policy: str
    batch_size: int


@dataclass(frozen=True)
class Measurement:
    """What a configuration took.

    Attributes:
        policy: with its parameters, such as "linear:ratio=1/6".
        ratio: budget by the visual tokens of a picture, `B / N`; 1 keeps everything.
        batch_size: pictures decoded at a time.
        compile: "none" or "inductor".
        guided: whether every picture had an unconditional row too.
        tokens_per_second: visual tokens, median of the rounds; guidance rows are not counted twice.
        pictures_per_second: from the same median.
        milliseconds_per_step: from the same median; a step is one token of every picture of the batch.
        speedup: times as fast as the full cache at the same batch size, median over rounds; None if no
            configuration of the run keeps everything.
        kv_bytes: keys and values allocated.
        full_kv_bytes: what the full cache takes for the batch.
        cold_seconds: wall time of the first batch, compilation included. Graphs that an earlier
            configuration of the run has left are not compiled again.
        seconds: wall time of every later batch, in order of the rounds.
    """

    policy: str
    ratio: float
    batch_size: int
    compile: str
    guided: bool
    tokens_per_second: float
    pictures_per_second: float
    milliseconds_per_step: float
    speedup: float | None
    kv_bytes: int
    full_kv_bytes: int
    cold_seconds: float
    seconds: list[float]


def configurations(
    policies: Sequence[str], ratios: Sequence[str], batch_sizes: Sequence[int]
) -> list[Configuration]:
    """Every policy at every ratio and every batch size.

    Args:
        policies: names, with parameters if any. One that has no ratio, or is given its budget here, is
            taken once as it stands.
        ratios: such as "1/6".
        batch_sizes: pictures decoded at a time.

    Raises:
        UnknownNameError: there is no such policy.
    """
    complete: dict[str, None] = {}  # an ordered set
    for text in policies:
        name, _, given = text.partition(":")
        known = {field.name for field in dataclasses.fields(load_class("policy", name))}
        fixed = {part.partition("=")[0].strip() for part in given.split(",")} & {"budget", "ratio"}
        if "ratio" not in known or fixed:
            complete[text] = None
        else:
            complete |= {f"{text}{',' if given else ':'}ratio={ratio}": None for ratio in ratios}
    return [Configuration(policy, size) for size in batch_sizes for policy in complete]


def measure(
    model: Model,
    wanted: Sequence[Configuration],
    *,
    compile: Compile = "none",
    repeats: int = 3,
    guidance: float | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Measurement]:
    """Decode whole pictures under every configuration.

    The stores of all configurations are held at the same time: none is set up anew within a round.

    Args:
        model: what draws; its own example prompts are used.
        wanted: in the order of the result.
        compile: "none" or "inductor".
        repeats: rounds after the first, cold one; at least 1.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out, None takes the
            model's own.
        seed: of the prompts and of the first picture of a batch.
        progress: show a bar.

    Raises:
        ArkvError: a policy does not fit the model, a value is out of range, or memory is short.
    """
    if repeats < 1:
        raise ArkvError(f"repeats is {repeats}: expected at least 1")
    decoders = [Decoder(model, load_policy(one.policy), compile) for one in wanted]
    prompts = model.example_prompts(max(one.batch_size for one in wanted), seed)
    guidance = model.spec.guidance if guidance is None else guidance
    seconds: list[list[float]] = [[] for _ in wanted]
    cold, held, full = [0.0] * len(wanted), [0] * len(wanted), [0] * len(wanted)
    with tqdm(total=len(wanted) * (repeats + 1), unit="batch", disable=not progress) as bar:
        for round_ in range(repeats + 1):
            for i, (one, decoder) in enumerate(zip(wanted, decoders, strict=True)):
                bar.set_description(f"{one.policy} x {one.batch_size}")
                begun = time.perf_counter()
                batch = prompts[: one.batch_size]
                stats = decoder.generate(
                    batch, seeds=range(seed, seed + one.batch_size), guidance=guidance
                ).stats
                if round_ == 0:
                    cold[i] = time.perf_counter() - begun
                    held[i], full[i] = stats.kv_bytes, stats.full_kv_bytes
                else:
                    seconds[i].append(stats.seconds)
                bar.update()

    total = model.spec.grid.tokens
    ratios = [decoder.plan.mean_budget(model.spec) / total for decoder in decoders]
    reference = {one.batch_size: i for i, one in reversed(list(enumerate(wanted))) if ratios[i] >= 1}
    rows = []
    for i, one in enumerate(wanted):
        median = statistics.median(seconds[i])
        base = reference.get(one.batch_size)
        faster = None if base is None else [b / s for b, s in zip(seconds[base], seconds[i], strict=True)]
        rows.append(
            Measurement(
                policy=one.policy,
                ratio=ratios[i],
                batch_size=one.batch_size,
                compile=compile,
                guided=guidance != 1,
                tokens_per_second=one.batch_size * total / median,
                pictures_per_second=one.batch_size / median,
                milliseconds_per_step=1000 * median / total,
                speedup=None if faster is None else statistics.median(faster),
                kv_bytes=held[i],
                full_kv_bytes=full[i],
                cold_seconds=cold[i],
                seconds=seconds[i],
            )
        )
    return rows


def describe_run(model: Model, seed: int, guidance: float | None) -> dict[str, Any]:
    """What has to be known to compare measurements: versions, machine and settings, ready for JSON."""
    device = model.device
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arkv": version("arkv"),
        "commit": _commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "model": model.spec.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "guidance": model.spec.guidance if guidance is None else guidance,
        "seed": seed,
        "peak_process_bytes": _peak_process_bytes(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this file runs from, "-dirty" behind it if changed; None elsewhere."""
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    try:
        # An installed copy may lie inside somebody else's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _peak_process_bytes() -> int | None:
    """The most memory that this process ever had resident, or None where nobody can say."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
