"""Finding out before a long computation that its result cannot be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from arkv.errors import ArkvError
from arkv.pictures.names import shortened


def check_outputs(**outputs: Path | None) -> None:
    """Find out whether files can be written; folders may be missing.

    Args:
        outputs: paths by the names of their flags; None for one that is not asked for.

    Raises:
        ArkvError: one cannot be, or two are the same file.
    """
    there: dict[str, str] = {}
    for name, path in outputs.items():
        if path is None:
            continue
        same = os.path.normcase(os.path.realpath(path))
        if same in there:
            raise ArkvError(f"--{there[same]} and --{name} are both {path}: give each a file of its own")
        there[same] = name
        check_writable(path)


def check_sheet(sheet: Path | None, folder: Path) -> None:
    """Find out whether a contact sheet of the pictures of a folder can be written, and harms none of them.

    Args:
        sheet: its path; None for none.
        folder: of the pictures.

    Raises:
        ArkvError: it cannot, has another suffix, or would take the place of a picture.
    """
    if sheet is None:
        return
    check_outputs(sheet=sheet)
    if sheet.suffix != ".png":
        raise ArkvError(f"cannot write {sheet}: expected a name that ends in .png")
    if Path(os.path.realpath(folder)) in Path(os.path.realpath(sheet)).parents:
        raise ArkvError(
            f"cannot write {sheet}: it would lie among the pictures of {folder}; give a name outside of it"
        )


def check_writable(path: Path) -> None:
    """Find out whether a file can be written; folders may be missing.

    Raises:
        ArkvError: it cannot, or is a device or a pipe, which a file would replace.
    """
    if is_dir(path):
        raise ArkvError(f"cannot write {path}: it is a folder")
    try:
        if path.exists() and not path.is_file():
            raise ArkvError(f"cannot write {path}: it is no file but a device or a pipe; take another name")
        folder = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {error.strerror}") from None
    try:
        # Permissions lie, to root and on read-only file systems; an attempt does not.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {folder}: {error.strerror}") from None


def is_dir(path: Path) -> bool:
    """Whether there is a folder at a path.

    Raises:
        ArkvError: nobody can say: the path is too long, for instance, or leads where one may not look.
    """
    try:
        return path.is_dir()
    except OSError as error:
        raise ArkvError(f"cannot write {shortened(str(path))}: {error.strerror}") from None


def check_figure(path: Path | None, suffix: str) -> None:
    """Find out whether a figure can be drawn; None is none.

    Raises:
        ArkvError: it cannot, or its name ends in something else.
    """
    if path is None:
        return
    if path.suffix != suffix:
        raise ArkvError(f"cannot write {path}: expected a name that ends in {suffix}")
    from arkv.pictures.figure import new_figure

    new_figure(1, 1)
