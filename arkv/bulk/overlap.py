"""Draws units one after the other, and makes the files of one while the next is being drawn."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import torch

from arkv.bulk.worker import Drawn, Worker, develop
from arkv.errors import is_out_of_memory
from arkv.model import Model
from arkv.pictures.files import is_out_of_threads
from arkv.pictures.layout import PictureFile

if TYPE_CHECKING:
    from arkv.bulk.folder import Folder
    from arkv.bulk.prepared import Prepared

OVERLAPPING = frozenset({"cuda"})
"""Types of devices that decode while files are made; on a CPU both would want the same cores."""

Arguments = ParamSpec("Arguments")
First = TypeVar("First")
Last = TypeVar("Last")


def draw_into(
    folder: Folder, prepared: Prepared, model: Model, worker: Worker, numbers: Iterable[int]
) -> Generator[int]:
    """Draw units and write their files.

    On a GPU files are made meanwhile: otherwise it would wait for a processor that compresses pictures.

    Args:
        folder: where to.
        prepared: the job.
        model: makes pixels of tokens.
        worker: draws tokens.
        numbers: of the units.

    Yields:
        Pictures that are done, unit by unit.
    """
    units = prepared.units

    def write(drawn: tuple[Sequence[PictureFile], Drawn]) -> int:
        return folder.write(develop(model, prepared.job, prepared.texts, *drawn))

    device = model.device
    drawn = ((units[number], worker.draw(units[number])) for number in numbers)
    if device.type in OVERLAPPING:
        yield from overlapped(drawn, on_stream(device, write))
    else:
        yield from map(write, drawn)


def on_stream(device: torch.device, work: Callable[Arguments, Last]) -> Callable[Arguments, Last]:
    """Work in the queue of a CUDA stream of its own, whichever thread does it; elsewhere, just the work."""
    if device.type != "cuda":
        return work
    # A thread begins on the stream that decoding uses, where each would wait for the other.
    stream = torch.cuda.Stream(device)

    def beside(*arguments: Arguments.args, **keywords: Arguments.kwargs) -> Last:
        with torch.cuda.stream(stream):
            return work(*arguments, **keywords)

    return beside


def overlapped(items: Iterable[First], work: Callable[[First], Last]) -> Generator[Last]:
    """Do something with each item in a thread, while the next item is being made in this one.

    At most one item waits: who makes them faster than they are worked off is held back. Whatever ends this
    early, work that was begun is completed. Work for which the memory did not suffice is done once more while
    nothing else is. Where the system has no thread to give, items are made and worked off in turns.

    Args:
        items: made as they are asked for.
        work: to be done with each, in their order.

    Yields:
        What the work returns, in order.

    Raises:
        Exception: what making an item or working on it has raised.
    """

    def attempt(item: First) -> list[Last]:
        try:
            return [work(item)]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        return []

    def outcome(item: First, attempted: Future[list[Last]]) -> Last:
        done = attempted.result()
        return done[0] if done else work(item)

    with ThreadPoolExecutor(1) as pool:
        begun: tuple[First, Future[list[Last]]] | None = None
        for item in (waiting := iter(items)):
            if begun is not None:
                yield outcome(*begun)
            try:
                begun = item, pool.submit(attempt, item)
            except RuntimeError as error:
                if not is_out_of_threads(error):
                    raise
                pool.shutdown(cancel_futures=True)
                yield work(item)
                yield from map(work, waiting)
                return
        if begun is not None:
            yield outcome(*begun)
