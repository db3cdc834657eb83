"""Who imports whom, held against the table in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"arkv": "arkv", "policies": "arkv/policies", "models": "arkv/models"}
PROGRAM = "from importlinter.cli import lint_imports_command as lint; lint()"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    """The package as it will be installed, beside the table."""
    for folder, place in PLACES.items():
        for file in (ROOT / folder).rglob("*.py"):
            copy = tmp_path / place / file.relative_to(ROOT / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def check(layout: Path) -> tuple[int, str]:
    """Status and report of the linter."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--no-logo", "--no-cache"],
        cwd=layout,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_imports_run_one_way_and_in_no_circle(layout: Path) -> None:
    status, report = check(layout)
    assert status == 0, report


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("attention/reference.py", "from arkv.store import Store", "arkv.attention is not allowed to import"),
        ("decoding/loop.py", "import arkv.decoder", "arkv.decoding is not allowed to import arkv.decoder"),
        ("decoding/step.py", "from arkv.decoding.loop import Loop", "No cycles are allowed in arkv.decoding"),
        ("policies/full.py", "from arkv.attention import operators", "Policies are written against"),
        ("estimate.py", "from arkv.policies.full import FullCache", "No policy is known by name"),
        ("store.py", "from arkv.models.vq import Decoder", "No model is known by name"),
    ],
)
def test_a_wrong_import_within_a_function_is_found(
    layout: Path, file: str, line: str, complaint: str
) -> None:
    with (layout / "arkv" / file).open("a") as source:
        source.write(f"\n\ndef _later() -> None:\n    {line}\n")
    status, report = check(layout)
    assert status == 1
    assert complaint in report, report
