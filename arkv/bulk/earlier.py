"""What an earlier run has left in a folder, seen before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError
from arkv.jobs.job import ChangedPromptsError, Job, prompt_of
from arkv.jobs.journal import Lines, NoHeader
from arkv.pictures.files import opened, size_of, told

INDEX = "index.jsonl"
LOG = "log.jsonl"
PART = r"index(-\d{5})?\.jsonl"
LOOKED_AT = 100  # files by which a folder without an index is known
LINES_TOLD = 3


def part_name(part: int) -> str:
    """Name of the index that a worker writes."""
    return INDEX if part == 0 else f"index-{part:05d}.jsonl"


def parts(path: Path) -> list[Path]:
    """The indexes of a folder that are there."""
    return sorted(found for found in path.glob("index*.jsonl") if re.fullmatch(PART, found.name))


def check_folder(path: Path, job: Job, resume: bool) -> None:
    """Find out whether a folder can hold a job, before anything is loaded.

    Args:
        path: of the folder.
        job: what would be drawn.
        resume: whether to go on with what an earlier run has left.

    Raises:
        ArkvError: it is a file, or holds what no job has written, which an evaluator would count as well; or
            it was begun, and is not to be gone on with.
    """
    if path.exists() and not path.is_dir():
        raise ArkvError(f"cannot write {path}: expected a folder, and it is a file")
    if not path.is_dir():
        return
    try:
        # In this order, because another worker may just be beginning.
        is_empty = not any(found.name[0] != "." for found in path.iterdir())
    except OSError as error:
        raise ArkvError(f"cannot read {path}: {told(error)}") from None
    if parts(path):
        if not resume:
            raise ArkvError(
                f"{path} has an {INDEX} of an earlier run: go on with --resume, or take another folder"
            )
    elif not is_empty and not (resume and is_known(path, job)):
        raise ArkvError(
            f"{path} is not empty and has no {INDEX} of an earlier run: take another folder; if "
            "pictures of this very job are in it, --resume takes them up"
        )


def is_known(path: Path, job: Job) -> bool:
    """Whether one of the first files says of itself that it shows what this job would show there."""
    looked = 0
    for file in job.files:
        with suppress(OSError):
            if not size_of(path / file.file):
                continue
            looked += 1
            texts = job.placing.texts_of(read(path / file.file))
            said, wanted = set(map(str, texts.values())), job.wanted(file)[0]
            if str(texts.get("Software", "")).startswith("arkv ") and (
                str(wanted.prompt.prompt) in said or job.placing.takes_some
            ):
                return True
        if looked == LOOKED_AT:
            break
    return False


def changed_prompts(path: Path, run: Mapping[str, Any], job: Job) -> list[str]:
    """The first lines of a list that are others than an index was begun with, as far as its rows tell."""
    said, earlier = str(run.get("prompts")).partition(" ")[0], run.get("extended", [])
    if not said.isdecimal() or not isinstance(earlier, list) or run.get("samples") != job.samples:
        return []
    if run.get("layout") != job.layout:
        return []
    starts, changed = [0, *earlier, int(said)], dict[int, str]()
    with suppress(OSError, ArkvError):
        for _, _, row in Lines(path).rows():
            pictures = row.get("pictures")
            if "prompt" not in row or not isinstance(pictures, list) or not pictures:
                continue
            with suppress(TypeError, ValueError, IndexError):
                place = prompt_of(pictures[0], starts, job.samples, job.placing)
                if place >= len(job.prompts):
                    changed[place] = f"prompt {place + 1} was {row['prompt']!r} and is gone"
                elif job.prompts[place].prompt != row["prompt"]:
                    prompt = job.prompts[place]
                    changed[place] = f"{prompt.where} was {row['prompt']!r} and is {prompt.prompt!r}"
            if len(changed) > LINES_TOLD:
                break
    lines = [changed[place] for place in sorted(changed)]
    return [*lines[:LINES_TOLD], "and more"] if len(lines) > LINES_TOLD else lines


def all_lines(path: Path) -> dict[int, bytes]:
    """The lines of a file by number.

    Raises:
        OSError: it cannot be read.
    """
    return dict(enumerate(read(path).splitlines(keepends=True), start=1))


def read(path: Path) -> bytes:
    """A file of a folder, itself and not what a link leads to.

    Raises:
        OSError: it cannot be read.
    """
    with opened(path) as file:
        return file.read()


def continued(path: Path, job: Job) -> Job:
    """A job as it goes on with what an earlier run has left: prompts that were added since come behind.

    Where the lists differ otherwise, or there is nothing, the job as it is; whoever opens the index compares.
    """
    for part in parts(path):
        runs: list[dict[str, Any]] = []
        with suppress(OSError, NoHeader, ChangedPromptsError):
            if size_of(part):
                next(Lines(part).rows(runs.append), None)
        with suppress(ChangedPromptsError):
            if runs:
                return job.continuing(runs[0])
    return job
