"""Runs a job: prepares its folder, hands its parts to an engine, and says what came of it."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm

from arkv.bulk.description import Description
from arkv.bulk.folder import INDEX, LOG, Folder, InUse, check_folder, parts, units_with
from arkv.bulk.log import EventLog
from arkv.bulk.overlap import draw_into
from arkv.bulk.worker import Worker, refusal
from arkv.decoder import Decoder, Statistics, check_batch_size
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError, PromptError, Terminated
from arkv.jobs.job import Job
from arkv.jobs.loading import Dtype
from arkv.machine.description import describe_machine
from arkv.machine.energy import energy_used
from arkv.model import Model
from arkv.pictures.layouts import PictureFile
from arkv.pictures.prompts import Prompt


@dataclass(frozen=True)
class Summary:
    """What a run has done.

    Attributes:
        job: pictures of the whole job.
        pictures: those drawn by this run.
        tokens: visual tokens of those.
        seconds: from the beginning of the first batch, or of the engine's start, to the end.
        failed: why there is no picture, by number; of earlier runs, too.
        joules: used by the GPUs of this machine meanwhile; None where nobody can say.
        stats: of the decoding, where it was in this process and something was decoded.
    """

    job: int
    pictures: int
    tokens: int
    seconds: float
    failed: Mapping[int, str]
    joules: float | None = None
    stats: Statistics | None = None

    def __str__(self) -> str:
        if not self.pictures:
            text = f"{self.job - len(self.failed)} of {self.job} pictures were there"
        else:
            text = (
                f"{self.pictures} of {self.job} pictures in {self.seconds:.1f} s, "
                f"{self.pictures / self.seconds:.2f} pictures/s, {self.tokens / self.seconds:,.0f} tokens/s"
            )
            if self.joules is not None:
                text += f", {self.joules / self.pictures:.1f} J a picture"
        return text + (f"; {len(self.failed)} could not be drawn" if self.failed else "")


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to be drawn, the same in every process.

    Attributes:
        description: with a batch size that is a number.
        job: what is drawn.
        account: what two runs must have in common beside the job.
        sampling: how tokens are drawn.
        texts: for every file, beside prompt and seed.
        tokens: visual tokens of a picture.
    """

    description: Description
    job: Job
    account: dict[str, Any]
    sampling: dict[str, Any]
    texts: dict[str, str]
    tokens: int

    @property
    def out(self) -> Path:
        """The folder."""
        return Path(self.description.out)

    @property
    def batch_size(self) -> int:
        """Pictures decoded at a time."""
        size = self.description.batch_size
        assert isinstance(size, int)
        return size

    @cached_property
    def units(self) -> list[list[PictureFile]]:
        """The parts of the work."""
        return self.job.units(self.batch_size)

    def folder(self, part: int = 0, facts: Mapping[str, Any] | None = None) -> Folder:
        """The folder, to be written to under a part's number."""
        sizes = {"pictures": self.job.pictures, "batch_size": self.batch_size, "tokens": self.tokens}
        return Folder(self.out, self.job, self.account, {**sizes, **(facts or {})}, part)

    def worker(self, decoder: Decoder, log: EventLog) -> Worker:
        """Someone who draws."""
        return Worker(decoder, self.job, self.sampling, self.batch_size, log)


def prepare(description: Description, job: Job, model: Model, decoder: Decoder | None = None) -> Prepared:
    """Find out what is the same for all workers.

    Args:
        description: of the job.
        job: what is drawn.
        model: the job's; one on the meta device does.
        decoder: finds the largest batch, where that is asked for.

    Raises:
        ArkvError: a number is out of range.
    """
    recipe = description.recipe
    sampling = recipe.sampling(model)
    given = {name: value for name, value in sampling.items() if value is not None}
    checked = Sampling(**{**given, "top_k": given.get("top_k") or None})
    checked.check(model.spec.vocabulary)
    size = description.batch_size
    check_batch_size(size)
    if size == "auto":
        if decoder is None:
            raise ArkvError(
                f"batch_size is 'auto': the engine {description.engine} needs a number, the same for all "
                "workers; 'arkv estimate' says what a batch takes"
            )
        fine = [each.prompt for each in job.prompts if refusal(model, each) is None]
        size = decoder.batch_that_fits(fine * job.samples, checked.guided) if fine else 1
    return Prepared(
        replace(description, batch_size=size),
        job,
        recipe.account(model),
        sampling,
        recipe.texts(model),
        model.spec.grid.tokens,
    )


def run(
    description: Description,
    *,
    resume: bool = False,
    strict: bool = False,
    log: bool = True,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Summary:
    """Draw the pictures of a job that are not there yet.

    Args:
        description: of the job.
        resume: go on with what an earlier run has left, whose files are compared with their hashes; without,
            a folder that was begun is refused.
        strict: look at every prompt before the first picture is begun, and refuse to begin if one is bad;
            without, its pictures are listed as failed.
        log: keep `log.jsonl` in the folder.
        facts: what else the index says of the run that began it; ready for JSON.
        progress: show a bar.

    Raises:
        ArkvError: the folder holds something else, was begun with other settings, or is in use; a file cannot
            be written; or as `Decoder.generate`, but for what is wrong with single pictures.
        Terminated: the process was told to end by SIGTERM.
    """
    job, out = description.job(), Path(description.out)
    check_folder(out)
    if out.is_dir() and parts(out) and not resume:
        raise ArkvError(
            f"{out} has an {INDEX} of an earlier run: go on with --resume, or take another folder"
        )
    check_batch_size(description.batch_size)
    _check_engine(description)
    with InUse(out) as held, _terminable():
        events = EventLog(out / LOG if log else None)
        if description.engine == "in-process":
            return _in_process(description, job, events, facts or {}, strict, progress)
        from arkv.bulk import ray_data, torchrun

        draw = {"torchrun": torchrun.draw, "ray": ray_data.draw}[description.engine]
        recipe = description.recipe
        if recipe.dtype is None:
            # Shapes are looked at on the meta device, which would choose another.
            dtype: Dtype = "float32" if recipe.device == "cpu" else "bfloat16"
            description = replace(description, recipe=replace(recipe, dtype=dtype))
        model = description.recipe.load_model("meta")
        if strict:
            check_prompts(model, job.prompts)
        prepared = prepare(description, job, model)
        folder = _opened(prepared, events, facts or {})
        return _supervised(prepared, folder, events, progress, lambda: draw(prepared, folder, held))


def _in_process(
    description: Description,
    job: Job,
    events: EventLog,
    facts: Mapping[str, Any],
    strict: bool,
    progress: bool,
) -> Summary:
    decoder = description.recipe.load_decoder()
    if strict:
        check_prompts(decoder.model, job.prompts)
    prepared = prepare(description, job, decoder.model, decoder)
    folder = _opened(prepared, events, facts)
    worker = prepared.worker(decoder, events)

    def draw() -> Generator[int]:
        numbers = units_with(prepared.units, folder.missing())
        yield from draw_into(folder, prepared, decoder.model, worker, numbers)

    summary = _supervised(prepared, folder, events, progress, draw)
    return replace(summary, stats=total(worker.stats) if worker.stats else None)


def _check_engine(description: Description) -> None:
    """Raise `ArkvError` where workers and devices do not go together."""
    engine, workers, device = description.engine, description.workers, description.recipe.device
    if workers is not None and workers < 1:
        raise ArkvError(f"workers is {workers}: expected at least 1")
    if description.pixel_workers < 0:
        raise ArkvError(f"pixel_workers is {description.pixel_workers}: expected at least 0")
    if engine == "in-process":
        if workers not in (None, 1):
            raise ArkvError(
                f"workers is {workers}, and the engine in-process is one: take --engine torchrun or ray"
            )
    elif ":" in device:
        raise ArkvError(f"device is {device!r}: the engine {engine} deals out devices, so say 'cuda'")


def _opened(prepared: Prepared, events: EventLog, facts: Mapping[str, Any]) -> Folder:
    """The folder, without what is damaged, and with one index."""
    in_process = prepared.description.engine == "in-process"
    # Where others draw, this machine may have no such device.
    machine = describe_machine(torch.device(prepared.description.recipe.device if in_process else "cpu"))
    device = machine["device"] if in_process else prepared.description.recipe.device
    told = {"date": machine["date"], "commit": machine["commit"], "device": device}
    folder = prepared.folder(facts={**told, **facts})
    for name in folder.verify():
        events.write("damaged", file=name)
    folder.merge()
    return folder


def _supervised(
    prepared: Prepared,
    folder: Folder,
    events: EventLog,
    progress: bool,
    draw: Callable[[], Generator[int]],
) -> Summary:
    """Let an engine draw what is missing, and tell of it."""
    job, description = prepared.job, prepared.description
    missing = sum(len(file.pictures) for file in folder.missing())
    events.write(
        "begin",
        engine=description.engine,
        pictures=job.pictures,
        missing=missing,
        batch_size=prepared.batch_size,
    )
    failed_before, begun = set(folder.failures()), time.perf_counter()
    with (
        energy_used() as energy,
        tqdm(total=job.pictures, initial=job.pictures - missing, unit="picture", disable=not progress) as bar,
    ):
        try:
            with closing(draw()) as counts:
                for count in counts:
                    bar.update(count)
        except BaseException as error:
            events.write("stopped", kind=type(error).__name__, reason=str(error))
            raise
        seconds, joules = time.perf_counter() - begun, energy()
    folder.merge()
    folder.finish()
    failed = folder.failures()
    pictures = missing - len(failed.keys() - failed_before)
    tokens = pictures * prepared.tokens
    summary = Summary(job.pictures, pictures, tokens, seconds, failed, joules)
    events.write(
        "end",
        pictures=pictures,
        tokens=tokens,
        seconds=round(seconds, 3),
        joules=summary.joules,
        failed=len(failed),
    )
    return summary


def check_prompts(model: Model, prompts: Sequence[Prompt]) -> None:
    """Look at every prompt before the first picture is begun.

    Raises:
        PromptError: one is not one that the model can take; says where it stands.
    """
    for prompt in {each.prompt: each for each in reversed(prompts)}.values():
        if (error := refusal(model, prompt)) is not None:
            raise PromptError(f"{prompt.where}: {error}")


def total(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several calls as those of one."""
    return Statistics(
        pictures=sum(part.pictures for part in parts),
        tokens=sum(part.tokens for part in parts),
        steps=sum(part.steps for part in parts),
        seconds=sum(part.seconds for part in parts),
        kv_bytes=max(part.kv_bytes for part in parts),
        full_kv_bytes=max(part.full_kv_bytes for part in parts),
    )


@contextmanager
def _terminable() -> Iterator[None]:
    """Within, SIGTERM raises `Terminated`, so that what was begun is cleaned up."""

    def told(number: int, frame: FrameType | None) -> None:
        raise Terminated("SIGTERM")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, told)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
