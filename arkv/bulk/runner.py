"""Runs a job: prepares its folder, hands its parts to an engine, and says what came of it."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from tqdm.auto import tqdm

from arkv.bulk.description import Description
from arkv.bulk.earlier import LOG, check_folder, continued
from arkv.bulk.folder import Folder
from arkv.bulk.lock import InUse
from arkv.bulk.log import EventLog
from arkv.bulk.overlap import draw_into
from arkv.bulk.prepared import Prepared, check_prompts, prepare
from arkv.bulk.signs import delete_left
from arkv.bulk.verification import tell_differing, verify
from arkv.decoder import Decoder, Statistics, check_batch_size
from arkv.errors import ArkvError, Terminated, warn
from arkv.jobs.job import check_number
from arkv.jobs.loading import Dtype
from arkv.jobs.recipe import Recipe
from arkv.machine.description import describe_machine
from arkv.machine.energy import energy_used

MOST_WORKERS = 10_000

# What writing to the standard error raises that is closed, full, gone, or of another encoding.
NO_CONSOLE = (OSError, ValueError, AttributeError)


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
        unread: why files that were there could not be read, by name; they were left as they are.
        differing: names of files that were drawn again and are others than they were.
    """

    job: int
    pictures: int
    tokens: int
    seconds: float
    failed: Mapping[int, str]
    joules: float | None = None
    stats: Statistics | None = None
    unread: Mapping[str, str] = field(default_factory=dict)
    differing: Sequence[str] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every picture of the job is there and could be read."""
        return not self.failed and not self.unread

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
        if self.failed:
            text += f"; {len(self.failed)} could not be drawn"
        if self.unread:
            text += f"; {_files(self.unread)} could not be read, and left as found"
        if self.differing:
            text += f"; {_files(self.differing)} drawn again and not the same as before"
        return text


def _files(names: Sized) -> str:
    return f"{len(names)} file{'s' * (len(names) != 1)}"


def run(
    description: Description,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    strict: bool = False,
    log: bool = True,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
    decoder: Decoder | None = None,
) -> Summary:
    """Draw the pictures of a job that are not there yet.

    Args:
        description: of the job.
        resume: go on with what an earlier run has left, whose files are compared with their hashes; without,
            a folder that was begun is refused. Prompts that were added behind the others are drawn, too.
        retry_failed: try pictures once more that could not be drawn.
        strict: look at every prompt before the first picture is begun, and refuse to begin if one is bad;
            without, its pictures are listed as failed.
        log: keep `log.jsonl` in the folder.
        facts: what else the index says of the run that began it; ready for JSON.
        progress: show a bar.
        decoder: draws the pictures, in place of one that is loaded for the job; for the engine in-process.
            The recipe then says how tokens are drawn, and nothing of model, policy and arithmetic.

    Raises:
        ArkvError: the folder holds something else, was begun with other settings, or is in use; a file cannot
            be written; or as `Decoder.generate`, but for what is wrong with single pictures.
        Terminated: the process was told to end by SIGTERM.
    """
    job, out = description.job(), Path(description.out)
    check_folder(out, job, resume)
    check_batch_size(description.batch_size)
    _check_engine(description, decoder)
    with InUse(out) as held, _terminable():
        delete_left(out)
        job = continued(out, job)
        events = EventLog(out / LOG if log else None)
        opened = partial(_opened, events=events, facts=facts or {}, retry_failed=retry_failed)
        if description.engine == "in-process":
            loaded = description.recipe.load_decoder() if decoder is None else decoder
            if decoder is not None:
                description = replace(description, recipe=_recipe_of(decoder, description.recipe))
            if strict:
                check_prompts(loaded.model, job.prompts)
            prepared = prepare(
                description, job, loaded.model, loaded, None if decoder is None else decoder.policy
            )
            return _in_process(prepared, loaded, opened(prepared), events, progress)
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
        folder = opened(prepared)
        return _supervised(prepared, folder, events, progress, lambda: draw(prepared, folder, held))


def _in_process(
    prepared: Prepared, decoder: Decoder, folder: Folder, events: EventLog, progress: bool
) -> Summary:
    worker = prepared.worker(decoder, events)

    def draw() -> Generator[int]:
        numbers = prepared.units.holding(folder.missing())
        yield from draw_into(folder, prepared, decoder.model, worker, numbers)

    summary = _supervised(prepared, folder, events, progress, draw)
    return replace(summary, stats=total(worker.stats) if worker.stats else None)


def _check_engine(description: Description, decoder: Decoder | None) -> None:
    """Raise `ArkvError` where workers and devices do not go together."""
    engine, workers, device = description.engine, description.workers, description.recipe.device
    if workers is not None:
        check_number("workers", workers, 1, MOST_WORKERS)
    check_number("pixel_workers", description.pixel_workers, 0, MOST_WORKERS)
    if engine == "in-process":
        if workers not in (None, 1):
            raise ArkvError(
                f"workers is {workers}, and the engine in-process is one: take --engine torchrun or ray"
            )
    elif decoder is not None:
        raise ArkvError(f"the engine {engine} loads models of its own: leave out decoder, or take in-process")
    elif ":" in device:
        raise ArkvError(f"device is {device!r}: the engine {engine} deals out devices, so say 'cuda'")


def _recipe_of(decoder: Decoder, recipe: Recipe) -> Recipe:
    """The arithmetic of a decoder and the sampling of a recipe.

    Raises:
        ArkvError: the recipe says something that the decoder has decided.
    """
    sampling = {"guidance", "temperature", "top_k", "top_p", "guided_tokens", "window"}
    plain = Recipe()
    for name in Recipe.__dataclass_fields__:
        if name not in sampling and getattr(recipe, name) != getattr(plain, name):
            raise ArkvError(f"recipe.{name} is given, and so is a decoder, which has its own: leave it out")
    model = decoder.model
    return replace(
        recipe,
        dtype=cast(Dtype, str(model.dtype).removeprefix("torch.")),
        device=str(model.device),
        compile=decoder.compile,
        kv_dtype=decoder.kv_dtype,
    )


def _opened(prepared: Prepared, events: EventLog, facts: Mapping[str, Any], retry_failed: bool) -> Folder:
    """The folder, without what is damaged, and with one index."""
    in_process = prepared.description.engine == "in-process"
    # Where others draw, this machine may have no such device.
    machine = describe_machine(torch.device(prepared.description.recipe.device if in_process else "cpu"))
    device = machine["device"] if in_process else prepared.description.recipe.device
    told = {"date": machine["date"], "commit": machine["commit"], "device": device}
    folder = prepared.folder(facts={**told, **facts})
    found = verify(folder, prepared.texts)
    for event, names in (("damaged", found.damaged), ("adopted", found.adopted), ("renamed", found.renamed)):
        for name in names:
            events.write(event, file=name)
    for name, reason in found.unread.items():
        events.write("unread", file=name, reason=reason)
    for text in found.told(folder.path):
        warn(text)
    if retry_failed:
        folder.forget_failures()
    if folder.missing():
        for name in folder.archives():
            folder.drop_archive(name)
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
    missing = folder.missing_pictures()
    events.write(
        "begin",
        engine=description.engine,
        pictures=job.pictures,
        missing=missing,
        batch_size=prepared.batch_size,
    )
    failed_before, begun = set(folder.failures()), time.perf_counter()
    with energy_used() as energy, shown(job.pictures, job.pictures - missing, progress) as count_up:
        try:
            with closing(draw()) as counts:
                for count in counts:
                    count_up(count)
                    tell_differing(folder, events)
        except BaseException as error:
            events.write("stopped", kind=type(error).__name__, reason=str(error))
            raise
        seconds, joules = time.perf_counter() - begun, energy()
    folder.merge()
    folder.finish()
    failed = folder.failures()
    pictures = missing - len(failed.keys() - failed_before)
    tokens = pictures * prepared.tokens
    differing = tuple(folder.differing)
    summary = Summary(
        job.pictures, pictures, tokens, seconds, failed, joules, None, dict(folder.unread), differing
    )
    events.write(
        "end",
        pictures=pictures,
        tokens=tokens,
        seconds=round(seconds, 3),
        joules=summary.joules,
        failed=len(failed),
    )
    if differing:
        warn(
            f"{folder.path}: {_files(differing)} drawn again and not the same as before ({differing[0]}): "
            "was that on another machine, or with another library?"
        )
    return summary


@contextmanager
def shown(total: int, there: int, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar, and how to move it; no harm is done where nothing can be shown."""
    bar: Any = None
    with suppress(*NO_CONSOLE):
        bar = tqdm(total=total, initial=there, unit="picture", disable=not progress or sys.stderr is None)

    def count_up(count: int) -> None:
        with suppress(*NO_CONSOLE):
            if bar is not None:
                bar.update(count)

    try:
        yield count_up
    finally:
        with suppress(*NO_CONSOLE):
            if bar is not None:
                bar.close()


def total(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several calls as those of one."""
    return Statistics(
        pictures=sum(part.pictures for part in parts),
        tokens=sum(part.tokens for part in parts),
        steps=sum(part.steps for part in parts),
        seconds=sum(part.seconds for part in parts),
        kv_bytes=max(part.kv_bytes for part in parts),
        full_kv_bytes=max(part.full_kv_bytes for part in parts),
        passes=sum(part.passes for part in parts),
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
