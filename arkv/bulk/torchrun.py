"""A job on all GPUs of a machine: a process each, under torchrun, which starts those again that die.

Every worker draws the units whose number, divided by the number of workers, leaves its own: nobody has to
hand out work, and what a worker that died has left undone is found missing by its successor.

On several machines with a file system in common, start the workers on each of them yourself:
`torchrun --nnodes 2 --nproc-per-node 8 ... -m arkv.bulk.torchrun job.yaml`; afterwards
`arkv run job.yaml --resume` makes one index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from arkv.bulk.folder import Folder, InUse
    from arkv.bulk.runner import Prepared

RESTARTS = 3
LOOK_EVERY = 0.5  # seconds
LAST_WORDS = 2000  # characters
DRIVER = "ARKV_DRIVER"
"""Environment variable with the file that a driver holds as long as it lives."""


def draw(prepared: Prepared, folder: Folder, held: InUse) -> Generator[int]:
    """Start the workers and watch them.

    Args:
        prepared: what to draw.
        folder: where to, held for ourselves.
        held: is shared with the workers meanwhile.

    Yields:
        Numbers of pictures that are done.

    Raises:
        ArkvError: there are fewer GPUs than workers, or the workers could not finish; says what one said.
    """
    import yaml

    if not folder.missing():
        return
    description = prepared.description
    workers = _workers(description.workers, description.recipe.device)
    with tempfile.TemporaryDirectory() as place:
        job, alive, said = (Path(place) / name for name in ("job.yaml", "driver", "said"))
        job.write_text(yaml.safe_dump(description.values()), encoding="utf-8")
        launch = ["--standalone", "--nproc-per-node", str(workers), "--max-restarts", str(RESTARTS)]
        module = ["-m", "arkv.bulk.torchrun", str(job)]
        command = [sys.executable, "-m", "torch.distributed.run", *launch, *module]
        with alive.open("w") as living, said.open("w") as log:
            _lock(living.fileno())
            held.hold(shared=True)
            environment = {**os.environ, DRIVER: str(alive)}
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
            try:
                while process.poll() is None:
                    time.sleep(LOOK_EVERY)
                    yield folder.refresh(range(1, workers + 1))
            finally:
                process.terminate()  # torchrun ends its workers
                process.wait()
        yield folder.refresh(range(1, workers + 1))
        words = said.read_text(errors="replace")
    held.hold(shared=False)
    if missing := folder.missing():
        reasons = [line for line in words.splitlines() if "arkv: error: " in line]
        told = reasons[-1].partition("arkv: error: ")[2] if reasons else " ".join(words.split())[-LAST_WORDS:]
        raise ArkvError(
            f"the workers ended, and {len(missing)} of {len(prepared.job.files)} files are missing: {told}"
        )


def _workers(wanted: int | None, device: str) -> int:
    """How many, one a GPU."""
    import torch

    if device != "cuda":
        return wanted or 1
    there = torch.cuda.device_count()
    if (wanted or 1) > there:
        raise ArkvError(f"workers is {wanted or 1}, and this machine has {there} GPUs")
    return wanted or there


def _lock(descriptor: int) -> bool:
    """Hold an open file, until it is closed or the process ends; whether nobody else did."""
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _end_with_driver() -> None:
    """End this process as soon as its driver or torchrun's agent is gone, even if they were killed."""
    parent, alive = os.getppid(), os.environ.get(DRIVER)

    def is_gone() -> bool:
        if os.getppid() != parent:
            return True
        if alive is None:  # torchrun was started by hand
            return False
        try:
            with open(alive, "r+") as driver:
                return _lock(driver.fileno())
        except OSError:
            return True

    def watch() -> None:
        while not is_gone():
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    """Be a worker, in an environment that torchrun has made."""
    _end_with_driver()
    import torch

    from arkv.bulk.description import read_description
    from arkv.bulk.folder import LOG, InUse, units_with
    from arkv.bulk.log import EventLog
    from arkv.bulk.overlap import draw_into
    from arkv.bulk.runner import prepare

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    description = read_description(Path(sys.argv[1]))
    events = EventLog(Path(description.out) / LOG, rank + 1)
    try:
        if description.recipe.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        job = description.job()
        with InUse(Path(description.out), shared=True):
            decoder = description.recipe.load_decoder()
            prepared = prepare(description, job, decoder.model)
            folder = prepared.folder(rank + 1)
            worker = prepared.worker(decoder, events)
            missing = units_with(prepared.units, folder.missing())
            mine = [number for number in missing if number % world == rank]
            for _ in draw_into(folder, prepared, decoder.model, worker, mine):
                pass
    except ArkvError as error:
        events.write("stopped", kind=type(error).__name__, reason=str(error))
        sys.stderr.write(f"arkv: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
