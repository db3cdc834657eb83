"""`arkv run`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from arkv.bulk.description import EngineName
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_sheet
from arkv.cli.parser import Command
from arkv.cli.summary import print_summary, write_sheet
from arkv.options import FilePath, Filled, OptionError, Positive, option, options


@options
class RunOptions(QuietOption):
    """Options of `arkv run`."""

    job: FilePath | None = option(
        default=None,
        metavar="FILE",
        kind="positional",
        help="YAML with the names of the flags of 'arkv generate', with _ for -",
    )
    resume: bool = option(
        default=False,
        help="go on with what is there, after comparing it with its hashes; else a folder that was begun is "
        "refused",
    )
    retry_failed: bool = option(
        default=False, help="with --resume, try pictures once more that could not be drawn"
    )
    status: bool = option(default=False, help="say how far it is, and draw nothing")
    schema: bool = option(
        default=False, help="print the JSON schema of the file, by which editors complete and check it"
    )
    sheet: FilePath | None = option(
        default=None, metavar="PNG", help="in the end, also write a contact sheet of the first pictures"
    )
    engine: EngineName | None = option(default=None, help="who draws (default: what the file says)")
    workers: Positive | None = option(
        default=None, metavar="N", help="processes (default: what the file says, or one a GPU)"
    )
    address: Filled | None = option(
        default=None, metavar="HOST:PORT", help="of a Ray cluster (default: Ray is started here)"
    )

    def __post_init__(self) -> None:
        if self.resume and self.status:
            raise OptionError("--status is not allowed with --resume: give one of them")
        if self.retry_failed and not self.resume:
            raise OptionError("--retry-failed goes on with a folder that was begun: give --resume with it")
        if self.job is None and not self.schema:
            raise OptionError("which job? give its FILE, such as job.yaml")


def run(given: RunOptions, typed: str) -> int | None:
    """Draw a job, or say something about it."""
    from arkv.bulk.description import read_description, schema

    if given.schema:
        print(json.dumps(schema(), indent=2))
        return None
    assert given.job is not None
    description = read_description(given.job)
    out = Path(description.out)
    if given.status:
        from arkv.bulk import status

        print(f"{out}: {status(out)}")
        return None
    changes = {name: getattr(given, name) for name in ("engine", "workers", "address")}
    description = dataclasses.replace(
        description, **{name: value for name, value in changes.items() if value is not None}
    )
    check_sheet(given.sheet, out)
    description.check()
    from arkv.bulk import run as run_job

    summary = run_job(
        description,
        resume=given.resume,
        retry_failed=given.retry_failed,
        facts={"command": typed},
        progress=not given.quiet,
    )
    print(f"{out}: {summary}")
    write_sheet(out, given.sheet)
    return print_summary(summary, out)


COMMAND = Command(
    RunOptions,
    run,
    (
        "arkv run job.yaml",
        "arkv run job.yaml --resume",
        "arkv run job.yaml --resume --retry-failed",
        "arkv run job.yaml --status",
        "arkv run job.yaml --engine torchrun --workers 8",
        "arkv run --schema > job.schema.json",
    ),
)
