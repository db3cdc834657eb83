"""A job on a cluster: Ray Data moves units from actors that draw to those that make files, and retries.

The driver writes the files, so the workers need no file system in common. Ray starts actors again that die,
and holds back those that draw faster than the files are written.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy
import torch

from arkv.bulk import overlap, signs
from arkv.bulk.earlier import LOG
from arkv.bulk.folder import WEIGHTS
from arkv.bulk.index import Made
from arkv.bulk.log import EventList, EventLog
from arkv.bulk.watchdog import Watchdog
from arkv.bulk.worker import Drawn, Worker, develop
from arkv.decoder import Decoder
from arkv.errors import ArkvError, is_out_of_memory, warn

if TYPE_CHECKING:
    from arkv.bulk.folder import Folder
    from arkv.bulk.lock import InUse
    from arkv.bulk.prepared import Prepared
    from arkv.model import PictureDecoder

OLDEST = (2, 60)
"""Version of Ray whose actors can be told how many calls to take at a time."""

BLOCKS = 2000
"""Parts at most that Ray deals out; a part is drawn again if its actor dies."""

Batch = dict[str, Any]
"""Columns by name, as Ray hands rows over: an array or a list each."""


def draw(prepared: Prepared, folder: Folder, held: InUse) -> Generator[int]:
    """Draw what is missing on a cluster.

    Args:
        prepared: what to draw.
        folder: where to.
        held: stays with the driver, which alone writes.

    Yields:
        Numbers of pictures that are done.

    Raises:
        ArkvError: Ray is not installed, or a worker failed again and again.
    """
    try:
        import ray
    except ImportError:
        raise ArkvError("the engine ray needs Ray: pip install 'arkv[ray]'") from None
    if tuple(map(int, ray.__version__.split(".")[:2])) < OLDEST:
        raise ArkvError(
            f"the engine ray needs Ray {'.'.join(map(str, OLDEST))} or newer, and this is {ray.__version__}: "
            "pip install --upgrade 'arkv[ray]', on all machines of the cluster"
        )
    description = prepared.description
    wanted = prepared.units.holding(folder.missing())
    if not wanted:
        return
    log = EventLog(prepared.out / LOG)
    device = torch.device(description.recipe.device)
    gpus = 0 if device.type == "cpu" else 1
    # A second call draws while the first makes its files.
    overlaps = device.type in overlap.OVERLAPPING and description.pixel_workers == 0
    was_there = ray.is_initialized()
    if not was_there:
        handler = signal.getsignal(signal.SIGTERM)
        # By default workers run at a lower priority than Ray and the driver: on a machine
        # that is there for the job alone, decoding would wait for them.
        ours = {} if description.address else {"_system_config": {"worker_niceness": 0}}
        ray.init(address=description.address or "local", log_to_driver=False, configure_logging=False, **ours)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray's own would end this process at once
    found = int(ray.cluster_resources().get("GPU" if gpus else "CPU", 1))
    spare = max(1, found - description.pixel_workers)
    workers = description.workers or (found if gpus else spare)
    ray.data.DataContext.get_current().enable_progress_bars = False  # there is one of our own
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        units = ray.data.from_items(
            [{"unit": number} for number in wanted], override_num_blocks=min(len(wanted), BLOCKS)
        )
        files_of = units.map_batches(
            DrawActor,
            fn_constructor_args=(prepared, description.pixel_workers == 0, signs.SILENCE),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=min(workers, len(wanted)),
                max_concurrent_calls_per_actor=2 if overlaps else 1,
                enable_true_multi_threading=overlaps,
            ),
            num_gpus=gpus,
            num_cpus=1 if gpus else max(1, spare // workers),  # as many threads has an actor
        )
        if description.pixel_workers:
            files_of = files_of.map_batches(
                DevelopActor,
                fn_constructor_args=(prepared, signs.SILENCE),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=description.pixel_workers),
                num_cpus=1,
            )
        actors: set[int] = set()
        for block in files_of.iter_batches(batch_size=None):  # as they come, a unit or some
            for weights in set(block["weights"]):
                folder.learn(str(weights))
            for events in map(json.loads, block["events"]):
                log.add(events)
                new = {event["worker"] for event in events} - actors
                actors |= new
                if new and len(actors) > workers:
                    warn("a worker died, or gave no sign of life and was ended: Ray has started another")
            made = zip(block["content"], map(json.loads, block["row"]), strict=True)
            yield folder.write(
                Made(row["file"], content if "sha256" in row else None, row) for content, row in made
            )
    except ray.exceptions.RayError as error:
        raise ArkvError(f"Ray gave up: {' '.join(str(error).split())[-500:]}") from error
    finally:
        if not was_there:
            ray.shutdown()


class DrawActor:
    """Holds a decoder and draws one unit after the other.

    Args:
        prepared: the job.
        develops: whether it also makes the files.
        silence: seconds after which an actor is ended that hangs.
    """

    def __init__(self, prepared: Prepared, develops: bool, silence: float = signs.SILENCE) -> None:
        self._given, self._develops = prepared, develops
        self._watchdog = Watchdog(silence)
        self._events, self._turn = EventList(), threading.Lock()

    @cached_property
    def _decoder(self) -> Decoder:
        # Not when the actor begins: a thread of its own makes the calls, and OpenMP keeps a team for every
        # thread that has computed. With more threads in teams than cores, all sleep where they used to spin.
        return self._given.description.recipe.load_decoder()

    @cached_property
    def _prepared(self) -> Prepared:
        return self._given.with_weights_of(self._decoder.model)

    @cached_property
    def _worker(self) -> Worker:
        return self._prepared.worker(self._decoder, self._events)

    def __call__(self, batch: Batch) -> Batch:
        """A unit's number to its tokens, or to its files."""
        (number,) = batch["unit"].tolist()
        with self._turn, self._watchdog.unit():
            drawn, events = self._worker.draw(self._prepared.units[number]), self._events.take()
            weights = self._prepared.texts[WEIGHTS]
        if self._develops:
            return self._files(number, drawn, events)
        told = {"numbers": list(drawn.tokens), "failed": drawn.failed, "events": events, WEIGHTS: weights}
        tokens = [each.numpy().tobytes() for each in drawn.tokens.values()]
        return {"unit": [number], "tokens": [b"".join(tokens)], "told": [json.dumps(told)]}

    def _files(self, number: int, drawn: Drawn, events: list[Any]) -> Batch:
        try:
            return self._make_files(number, drawn, events)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        with self._turn:  # while nothing is drawn, there is more memory
            return self._make_files(number, drawn, events)

    @cached_property
    def _make_files(self) -> Callable[[int, Drawn, list[Any]], Batch]:
        model = self._decoder.model
        return overlap.on_stream(model.device, partial(_files, self._prepared, model))


class DevelopActor:
    """Makes files of tokens, where there may be no GPU.

    Args:
        prepared: the job.
        silence: seconds after which an actor is ended that hangs.
    """

    def __init__(self, prepared: Prepared, silence: float = signs.SILENCE) -> None:
        self._prepared, self._watchdog = prepared, Watchdog(silence)
        self._model = self._prepared.description.recipe.load_picture_decoder("cpu")

    def __call__(self, batch: Batch) -> Batch:
        """A unit's tokens to its files."""
        (number,), (tokens,), (text,) = batch["unit"].tolist(), batch["tokens"], batch["told"]
        told = json.loads(text)
        rows = torch.from_numpy(numpy.frombuffer(tokens, numpy.int64).copy()).view(-1, self._prepared.tokens)
        by_number = dict(zip(told["numbers"], rows, strict=True))
        failed = {int(picture): reason for picture, reason in told["failed"].items()}
        texts = {**self._prepared.texts, WEIGHTS: told[WEIGHTS]}
        prepared = replace(self._prepared, texts=texts)
        with self._watchdog.unit():
            return _files(prepared, self._model, number, Drawn(by_number, failed), told["events"])


def _files(prepared: Prepared, model: PictureDecoder, number: int, drawn: Drawn, events: list[Any]) -> Batch:
    unit = prepared.units[number]
    made = develop(model, prepared.job, prepared.texts, unit, drawn)
    return {
        "file": [each.file for each in made],
        "content": [each.content or b"" for each in made],
        "row": [json.dumps(each.row) for each in made],
        "events": [json.dumps(events if place == 0 else []) for place in range(len(made))],
        "weights": [prepared.texts[WEIGHTS]] * len(made),
    }
