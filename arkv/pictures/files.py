"""Files that appear whole or not at all, and PNG files that say how they were made."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from PIL import Image

THREADS = 8
"""Files that are made or read at a time: compressing, hashing and the disk leave the interpreter alone."""

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_threads(work: Callable[[Item], Made], items: Iterable[Item]) -> list[Made]:
    """What some work that the interpreter has little part in makes of each item, in order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name; the next attempt uses the same place.

    The name is hidden and ends in none of the suffixes that evaluators look for.
    """
    return path.with_name(f".{path.name}.part")


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Write files so that each of them appears complete or not at all, whenever the machine stops.

    Args:
        files: contents by path, of one result: none appears before all of them are on the disk. Folders that
            are missing are made.

    Raises:
        ArkvError: one cannot be written.
    """
    begun: list[Path] = []
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            begun.append(part_of(path))
            with begun[-1].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in files:
            os.replace(part_of(path), path)
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {error.strerror}") from None
    finally:
        for part in begun:
            with contextlib.suppress(OSError):
                part.unlink()


def png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A PNG file with text chunks: for the same picture and texts, the same bytes."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()
