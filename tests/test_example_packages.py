"""The example packages of the documentation, installed as a stranger would, apart from everything else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "docs/extending"
PACKAGES = ("example-policy", "example-model")

# One example a property: that they run here is what matters, the suite has tests of its own.
FEW_EXAMPLES = """
from hypothesis import settings

settings.register_profile("few", max_examples=6, deadline=None, derandomize=True)
settings.load_profile("few")
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command, shows all that it said if it fails, and gives what it printed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of the packages: to build one leaves litter."""
    place = tmp_path_factory.mktemp("examples")
    for name in PACKAGES:
        shutil.copytree(EXAMPLES / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    (place / "conftest.py").write_text(FEW_EXAMPLES)
    return place


@pytest.fixture(scope="module")
def python(place: Path) -> Path:
    """An interpreter with both packages, which finds their dependencies here: nothing is fetched."""
    here = Path(sysconfig.get_path("purelib"))
    before = sorted(path.name for path in here.iterdir())
    environment = place / "environment"
    venv.create(environment, with_pip=False)
    (folder,) = [*environment.glob("lib/python*/site-packages"), *environment.glob("Lib/site-packages")]
    # `addsitedir` and not the path alone, for the sake of an editable install of arkv.
    (folder / "outer.pth").write_text(f"import site; site.addsitedir({str(here)!r})\n")
    (python,) = [*environment.glob("bin/python"), *environment.glob("Scripts/python.exe")]
    install = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    )
    run(*install, *(place / name for name in PACKAGES), cwd=place)
    assert sorted(path.name for path in here.iterdir()) == before, "this environment was written to"
    return python


@pytest.mark.parametrize(
    ("command", "name", "origin"),
    [("policies", "fading", "arkv-fading 0.1.0"), ("models", "squares", "arkv-squares 0.1.0")],
)
def test_they_are_found_by_name(python: Path, command: str, name: str, origin: str, tmp_path: Path) -> None:
    lines = run(python, "-m", "arkv.cli", command, cwd=tmp_path).splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name} ")]
    assert origin in line
    assert "broken" not in line


def test_they_draw(python: Path, tmp_path: Path) -> None:
    generate = (python, "-m", "arkv.cli", "generate", "--quiet", "--prompt", "a picture", "--out", "one.png")
    printed = run(
        *generate, "--model", "squares", "--policy", "fading:recent=6", "--ratio", "1/6", cwd=tmp_path
    )
    assert "36 steps" in printed
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size == (48, 48)
        assert picture.text["policy"].startswith("fading:ratio=1/6")


def test_they_pass_their_own_tests(python: Path, place: Path) -> None:
    tests = [place / package / "tests" for package in PACKAGES]
    said = run(
        python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", *tests, cwd=place
    )
    assert " passed" in said
    assert "failed" not in said
