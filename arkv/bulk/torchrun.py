"""A job on all GPUs of a machine: a process each, under torchrun, which starts those again that die.

Every worker draws the units whose number, divided by the number of workers, leaves its own: nobody has to
hand out work, and what a worker that died has left undone is found missing by its successor. A worker that
gives no sign of life any more is ended, as if it had died.

On several machines with a file system in common, start the workers on each of them yourself:
`torchrun --nnodes 2 --nproc-per-node 8 ... -m arkv.bulk.torchrun job.yaml`; afterwards
`arkv run job.yaml --resume` makes one index.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from arkv.bulk.signs import DRIVER, GROUP, JOB, Signs, Watched, identity, sign_of
from arkv.errors import ArkvError, warn

if TYPE_CHECKING:
    from arkv.bulk.folder import Folder
    from arkv.bulk.lock import InUse
    from arkv.bulk.prepared import Prepared

RESTARTS = 3
LOOK_EVERY = 0.5  # seconds
LAST_WORDS = 2000  # characters
LAST_SECONDS = 3.0  # that workers have to end when they are told to


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

    from arkv.pictures.files import delete, write_whole

    if not folder.missing():
        return
    description = prepared.description
    workers = _workers(description.workers, description.recipe.device)
    # Beside the pictures, because somebody may empty the folder for temporary files meanwhile.
    job, group = prepared.out / JOB, uuid.uuid4().hex
    write_whole({job: yaml.safe_dump(description.values()).encode()}, prepared.out)
    launch = ["--standalone", "--nproc-per-node", str(workers), "--max-restarts", str(RESTARTS)]
    command = [sys.executable, "-m", "torch.distributed.run", *launch, "-m", "arkv.bulk.torchrun", str(job)]
    signs = [sign_of(prepared.out, rank + 1) for rank in range(workers)]
    watched = Watched(signs)
    with tempfile.TemporaryFile(dir=prepared.out) as said:
        held.hold(group)
        environment = {**os.environ, DRIVER: identity(os.getpid()), GROUP: group}
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        try:
            while process.poll() is None:
                time.sleep(LOOK_EVERY)
                yield folder.refresh(range(1, workers + 1))
                for worker, seconds in watched.end_the_silent():
                    warn(f"worker {worker} gave no sign of life for {seconds:.0f} s and was ended")
        finally:
            _end(process, watched)
            for file in (job, *signs):
                delete(file)
        yield folder.refresh(range(1, workers + 1))
        words = _words(said)
    held.hold()
    if missing := folder.missing():
        reasons = [line for line in words.splitlines() if "arkv: error: " in line]
        told = reasons[-1].partition("arkv: error: ")[2] if reasons else " ".join(words.split())[-LAST_WORDS:]
        silent = f"torchrun ended with status {process.returncode} and said nothing; go on with --resume"
        raise ArkvError(
            f"the workers ended, and {len(missing)} of {len(prepared.job.files)} files are missing: "
            f"{told or silent}"
        )


def _end(process: subprocess.Popen[bytes], watched: Watched) -> None:
    """End torchrun and its workers, in a few seconds even if some of them do not listen."""
    if process.poll() is not None:
        return
    process.terminate()  # torchrun ends its workers
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_SECONDS)
        return
    watched.end_all()
    with suppress(subprocess.TimeoutExpired):
        process.wait(LAST_SECONDS)
        return
    process.kill()
    process.wait()


def _words(said: IO[bytes]) -> str:
    """The end of what torchrun and the workers have printed."""
    said.seek(max(0, said.seek(0, os.SEEK_END) - 100 * LAST_WORDS))
    return said.read().decode(errors="replace")


def _workers(wanted: int | None, device: str) -> int:
    """How many, one a GPU."""
    import torch

    if device != "cuda":
        return wanted or 1
    there = torch.cuda.device_count()
    if (wanted or 1) > there:
        raise ArkvError(f"workers is {wanted or 1}, and this machine has {there} GPUs")
    return wanted or there


def _group() -> str:
    """What the workers of this group have in common, and no others."""
    identifier = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    return os.environ.get(GROUP) or (place if identifier == "none" else identifier)


def main() -> int:
    """Be a worker, in an environment that torchrun has made."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    signs = Signs(rank + 1)
    import torch

    from arkv.bulk.description import read_description
    from arkv.bulk.earlier import LOG, continued
    from arkv.bulk.lock import InUse
    from arkv.bulk.log import EventLog
    from arkv.bulk.overlap import draw_into
    from arkv.bulk.prepared import prepare
    from arkv.bulk.verification import tell_differing

    events = EventLog(None, rank + 1)
    try:
        description = read_description(Path(sys.argv[1]))
        out = Path(description.out)
        events = EventLog(out / LOG, rank + 1)
        if description.recipe.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        job = description.job()
        with InUse(out, _group()), signs.given_in(out):
            job = continued(out, job)
            decoder = description.recipe.load_decoder()
            prepared = prepare(description, job, decoder.model)
            folder = prepared.folder(rank + 1)
            worker = prepared.worker(decoder, events)
            mine = [number for number in prepared.units.holding(folder.missing()) if number % world == rank]
            for _ in draw_into(folder, prepared, decoder.model, worker, mine):
                signs.progress()
                if DRIVER not in os.environ:
                    tell_differing(folder, events)
    except ArkvError as error:
        events.write("stopped", kind=type(error).__name__, reason=str(error))
        with suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"arkv: error: {' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
