"""`arkv sheet`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Le

from arkv.cli.outputs import check_sheet, is_dir
from arkv.cli.parser import Command
from arkv.cli.summary import write_sheet
from arkv.errors import ArkvError
from arkv.options import FilePath, OptionError, Plain, option, options


@options
class SheetOptions:
    """Options of `arkv sheet`."""

    folder: FilePath | None = option(
        default=None,
        metavar="FOLDER",
        kind="positional",
        help="with PNG files, also in folders below it; or the job.yaml that they were drawn from",
    )
    out: FilePath = option(default=Path("sheet.png"), metavar="FILE", help="PNG file")
    most: Annotated[int, Ge(1), Le(1024), Plain] = option(
        default=64, metavar="N", help="pictures at most, the first by their names"
    )

    def __post_init__(self) -> None:
        if self.folder is None:
            raise OptionError("which pictures? give their FOLDER")


def run(given: SheetOptions, typed: str) -> None:
    """Write a contact sheet."""
    folder = given.folder
    assert folder is not None
    if folder.suffix in (".yaml", ".yml") and folder.is_file():
        from arkv.bulk.description import read_description

        folder = Path(read_description(folder).out)
    check_sheet(given.out, folder)
    if not is_dir(folder):
        raise ArkvError(f"{folder} is no folder: give one with PNG files, or the job.yaml of a run")
    write_sheet(folder, given.out, given.most)


COMMAND = Command(SheetOptions, run, ("arkv sheet pictures --out sheet.png",))
