"""What a process holds of a large job, and how long beginning and resuming take: a table of docs/scaling.md.

python docs/scaling_index.py --pictures 1000000

No picture is drawn: an index is written as a finished run leaves it, with files of two bytes, or with none.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from arkv.bulk.folder import Folder
from arkv.bulk.index import Made
from arkv.jobs.job import Job
from arkv.pictures.prompts import read_prompts

ACCOUNT = {"model": "none"}

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=1_000_000)
    parser.add_argument("--files", action="store_true", help="write the files, too, which takes longer")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        listed, out = Path(place) / "prompts.txt", Path(place) / "out"
        listed.write_text("".join(f"a picture of the number {n} in a row\n" for n in range(asked.pictures)))
        print(f"{asked.pictures:,} pictures, {'with' if asked.files else 'without'} their files\n")
        print("                              seconds   MB held")
        _, prompts = timed("prompts read", lambda: read_prompts(listed))
        job = timed("job: order and files", lambda: ordered(Job(prompts, "flat", 1)))
        out.mkdir()
        timed("begun", lambda: Folder(out, job, ACCOUNT, {}))
        finish(out, job, asked.files)
        size = (out / "index.jsonl").stat().st_size
        folder = timed("resumed: index read", lambda: Folder(out, job, ACCOUNT, {}))
        timed("resumed: what is missing", folder.missing)
        timed("digest of all pictures", folder.index.account)
        print(f"\nthe index has {size / asked.pictures:.0f} bytes a picture")


def ordered(job: Job) -> Job:
    """A job that has worked out what it needs."""
    job.position(0)
    return job


def finish(out: Path, job: Job, with_files: bool) -> None:
    """Write the rows of all pictures, and pictures if they are asked for."""
    content, digest = b"x" * 2, "00" * 32
    with (out / "index.jsonl").open("a") as index:
        for file in job.files:
            if with_files:
                (out / file.file).write_bytes(content)
            made = Made(file.file, content, {**job.row(file), "bytes": len(content), "sha256": digest})
            index.write(json.dumps(made.row) + "\n")


def timed(what: str, work: Callable[[], Result]) -> Result:
    """Do something, and print how long it took and what the process holds behind it."""
    begun = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - begun
    print(f"{what:28} {seconds:8.1f} {resident() / 1e6:9,.0f}", flush=True)
    return result


def resident() -> int:
    """Bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    main()
