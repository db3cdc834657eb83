"""arkv as it would be installed, laid out by links: what a machine needs where nothing can be installed."""

from __future__ import annotations

import os
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[3]


def missing() -> list[str]:
    """The distributions that arkv needs and this Python does not have."""
    found = []
    for requirement in _project()["dependencies"]:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        try:
            version(name)
        except PackageNotFoundError:
            found.append(name)
    return found


def lay_out(place: Path) -> Path:
    """Link the package's folders together and write its entry points.

    Args:
        place: where; emptied before.

    Returns:
        What to put on Python's path.
    """
    project = _project()
    shutil.rmtree(place, ignore_errors=True)
    package = place / "arkv"
    package.mkdir(parents=True)
    for part in [*(ROOT / "arkv").iterdir(), ROOT / "policies", ROOT / "models"]:
        if part.name != "__pycache__":
            (package / part.name).symlink_to(part)
    if commit := os.environ.get("ARKV_COMMIT"):  # a copy of the tree without .git does not know its own
        (package / "_commit.txt").unlink(missing_ok=True)
        (package / "_commit.txt").write_text(commit)
    about = place / f"arkv-{project['version']}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: arkv\nVersion: {project['version']}\n")
    groups = [
        f"[{group}]\n" + "".join(f"{name} = {target}\n" for name, target in entries.items())
        for group, entries in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(groups))
    return place


def _project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]  # type: ignore[no-any-return]
