"""A job on all GPUs of a machine: a process each, under torchrun, which starts those again that die.

Every worker draws the units whose number, divided by the number of workers, leaves its own: nobody has to
hand out work, and what a worker that died has left undone is found missing by its successor.

On several machines with a file system in common, start the workers on each of them yourself:
`torchrun --nnodes 2 --nproc-per-node 8 ... -m arkv.bulk.torchrun job.yaml`; afterwards
`arkv run job.yaml --resume` makes one index.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from arkv.bulk.folder import Folder, InUse
    from arkv.bulk.run import Prepared

RESTARTS = 3
LOOK_EVERY = 0.2  # seconds
LAST_WORDS = 2000  # characters


def draw(prepared: Prepared, folder: Folder, held: InUse) -> Iterator[int]:
    """Start the workers and watch them.

    Args:
        prepared: what to draw.
        folder: where to, held for ourselves.
        held: is shared with the workers meanwhile.

    Yields:
        Numbers of pictures that are done.

    Raises:
        ArkvError: the workers could not finish; says what the last one said.
    """
    if not folder.missing():
        return
    description = prepared.description
    workers = description.workers or _gpus()
    with tempfile.TemporaryDirectory() as place:
        job = Path(place) / "job.yaml"
        job.write_text(json.dumps(description.values()))  # JSON is YAML
        held.hold(shared=True)
        launch = ["--standalone", "--nproc-per-node", str(workers), "--max-restarts", str(RESTARTS)]
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *launch,
            "-m",
            "arkv.bulk.torchrun",
            str(job),
        ]
        with (Path(place) / "said").open("w+") as said:
            process = subprocess.Popen(command, stdout=said, stderr=said)
            try:
                while process.poll() is None:
                    time.sleep(LOOK_EVERY)
                    yield folder.refresh()
            finally:
                process.terminate()  # torchrun ends its workers
                process.wait()
            yield folder.refresh()
            said.seek(0)
            words = said.read()[-LAST_WORDS:]
    held.hold(shared=False)
    if missing := folder.missing():
        reasons = [line for line in words.splitlines() if "arkv: error: " in line]
        told = reasons[-1].partition("arkv: error: ")[2] if reasons else words.strip()
        raise ArkvError(
            f"the workers ended, and {len(missing)} of {len(prepared.job.files)} files are missing: {told}"
        )


def _gpus() -> int:
    import torch

    return max(1, torch.cuda.device_count())


def _end_with(parent: int) -> None:
    """End this process as soon as the one that started it is gone, even if that was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Be a worker, in an environment that torchrun has made."""
    _end_with(os.getppid())
    from arkv.bulk.description import read_description
    from arkv.bulk.folder import InUse, units_with
    from arkv.bulk.run import prepare
    from arkv.bulk.worker import develop

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        description = read_description(Path(sys.argv[1]))
        recipe = description.recipe
        if recipe.device == "cuda":
            recipe = replace(recipe, device=f"cuda:{os.environ['LOCAL_RANK']}")
        job = description.job()
        with InUse(Path(description.out), shared=True):
            decoder = recipe.load_decoder()
            prepared = prepare(replace(description, recipe=recipe), job, decoder.model)
            folder = prepared.folder(rank + 1)
            worker = prepared.worker(decoder, rank + 1)
            units = prepared.units()
            for number in units_with(units, folder.missing()):
                if number % world == rank:
                    drawn = worker.draw(units[number])
                    folder.write(develop(decoder.model, job, prepared.texts, units[number], drawn))
    except ArkvError as error:
        sys.stderr.write(f"arkv: error: {error}\n")
        return 0  # what one worker says so would be said again after a restart
    return 0


if __name__ == "__main__":
    sys.exit(main())
