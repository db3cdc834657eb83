"""What a run of a job has come to."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arkv.bulk import Summary
    from arkv.pictures.sheet import Cell

FAILURES_TOLD = 10
NOT_DRAWN = 3
"""Exit status of a run that is at its end and lacks a picture."""


def print_summary(summary: Summary, out: Path) -> int:
    """Say which pictures could not be drawn; the exit status."""
    if summary.is_complete:
        return 0
    for number, reason in itertools.islice(sorted(summary.failed.items()), FAILURES_TOLD):
        print(f"picture {number}: {' '.join(str(reason).split())}")
    if len(summary.failed) > FAILURES_TOLD:
        print(f"and {len(summary.failed) - FAILURES_TOLD} more, in {out / 'index.jsonl'}")
    sys.stdout.flush()
    told = f"{len(summary.failed)} of {summary.job} pictures could not be drawn"
    if not summary.failed:
        told = f"{len(summary.unread)} files could not be read, and were left as found"
    print(f"arkv: error: {told}", file=sys.stderr)
    return NOT_DRAWN


def write_sheet(folder: Path, sheet: Path | None, most: int = 64) -> None:
    """Write a contact sheet of the first pictures of a folder, if one is asked for.

    Raises:
        ArkvError: there is no picture, or it cannot be read or written.
    """
    if sheet is None:
        return
    import arkv
    from arkv.pictures.files import png, write_whole
    from arkv.pictures.sheet import contact_sheet, in_rows

    cells, there = cells_of(folder, most)
    note = f"{len(cells)} of {there} pictures" if there > len(cells) else ""
    write_whole(
        {sheet: png(contact_sheet(in_rows(cells), note=note), {"Software": f"arkv {arkv.__version__}"})}
    )
    print(f"{sheet}: {len(cells)} of {there} pictures of {folder}")


def cells_of(folder: Path, most: int) -> tuple[list[Cell], int]:
    """The first pictures of a folder with their prompts, and how many there are.

    Raises:
        ArkvError: there is none, or one cannot be read.
    """
    from PIL import Image

    from arkv.errors import ArkvError
    from arkv.pictures.sheet import Cell

    try:
        paths = sorted(path for path in folder.rglob("[!.]*.png") if path.is_file())
    except OSError as error:
        raise ArkvError(f"cannot read {folder}: {error.strerror}") from None
    if not paths:
        raise ArkvError(f"{folder} has no PNG files in it")
    cells = []
    for path in paths[:most]:
        try:
            with Image.open(path) as image:
                image.load()
                caption = getattr(image, "text", {}).get("prompt") or path.stem
                cells.append(Cell(image.convert("RGB"), str(caption)))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            told = getattr(error, "strerror", None) or "it is damaged, or no picture"
            raise ArkvError(f"cannot read {path}: {told}") from None
    return cells, len(paths)
