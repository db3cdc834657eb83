"""JSON lines that are on the disk as soon as they are measured."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Rows:
    """A file of rows.

    Args:
        path: is added to.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)

    def have(self, **named: Any) -> bool:
        """Whether there is such a row from before, and of no error."""
        return any("error" not in row and named.items() <= row.items() for row in read(self._path))

    def add(self, **row: Any) -> None:
        """Write a row, and print it."""
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(*(f"{name}={short(value)}" for name, value in row.items()), flush=True)


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, if there is one; those that were cut are left out."""
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def parser(text: str | None) -> argparse.ArgumentParser:
    """What every script of this folder is asked."""
    made = argparse.ArgumentParser(description=text)
    made.add_argument("--json", type=Path, required=True)
    made.add_argument("--device", default="cuda", type=device_of)
    made.add_argument("--small", action="store_true", help="few and small cases, as a CPU can do them")
    return made


def device_of(text: str) -> torch.device:
    """With its number, as tensors have it."""
    return torch.device("cuda", torch.cuda.current_device()) if text == "cuda" else torch.device(text)
