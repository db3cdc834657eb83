"""What a user installs: the wheel's content, its imports, and a command that starts at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Folder of the repository -> place in the wheel.
LAYOUT = {"arkv": "arkv", "policies": "arkv/policies", "models": "arkv/models"}

WEIGHTS = ("scenes.safetensors", "scenes.json", "MODEL_CARD.md")
LARGEST_WEIGHTS = 20 * 2**20


def run(*command: str | Path, cwd: Path) -> str:
    """Runs a command, shows all that it said if it fails, and gives what it printed."""
    done = subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy: a build in place leaves litter and packs what is left of it."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for folder in LAYOUT:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("ARKV_COMMIT", "abc123")  # the copy is no checkout
        run(*build, "--wheel-dir", place, source, cwd=place)
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    install = (
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--no-index",
        "--target",
        target,
    )
    run(*install, wheel, cwd=target)
    return target


def names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def run_installed(code: str, installed: Path, cwd: Path) -> str:
    """Runs code that can import the installed wheel and the dependencies, but not the repository.

    Without `site`, so that the .pth file of an editable install cannot help out.
    """
    dependencies = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    path = [str(installed), *dependencies]
    program = f"import sys; sys.path += {path!r}\n{code}"
    return run(sys.executable, "-I", "-S", "-c", program, cwd=cwd)


def test_wheel_has_arkv_alone_at_top_level(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in names(wheel)}
    (metadata,) = tops - {"arkv"}
    assert metadata.startswith("arkv-")
    assert metadata.endswith(".dist-info")


@pytest.mark.parametrize("folder", LAYOUT)
def test_wheel_has_every_module(wheel: Path, folder: str) -> None:
    expected = {
        f"{LAYOUT[folder]}/{file.relative_to(ROOT / folder).as_posix()}"
        for file in (ROOT / folder).rglob("*.py")
    }
    assert expected
    missing = expected - names(wheel)
    assert not missing, f"list the package in pyproject.toml: {sorted(missing)}"


def test_wheel_has_types_licence_and_the_source_of_the_kernel(wheel: Path) -> None:
    assert "arkv/py.typed" in names(wheel)
    assert "arkv/attention/cpu_kernels.cpp" in names(wheel)  # built where it is needed
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names(wheel))


def test_the_description_on_an_index_has_no_link_that_breaks_there(installed: Path) -> None:
    """Nothing but absolute addresses, all that README.md says in words, and no mark of how it was cut."""
    (metadata,) = installed.glob("arkv-*.dist-info")
    description = PathDistribution(metadata).metadata.get_payload()
    targets = re.findall(r"\]\(([^)]*)\)", description)
    assert targets
    assert all(target.startswith("https://") for target in targets)
    assert "make demo" in description
    assert "All policies beside each other" in description
    assert "<!--" not in description


def test_wheel_knows_the_commit_that_it_was_built_from(wheel: Path) -> None:
    assert zipfile.ZipFile(wheel).read("arkv/_commit.txt") == b"abc123"


def test_wheel_has_the_embedded_model(wheel: Path) -> None:
    folder = "arkv/models/scenes/weights/"
    assert {folder + name for name in WEIGHTS} <= names(wheel)
    assert zipfile.ZipFile(wheel).getinfo(folder + WEIGHTS[0]).file_size <= LARGEST_WEIGHTS


def test_installed_package_imports(installed: Path, tmp_path: Path) -> None:
    code = "import arkv.policies.full, arkv.models.scenes; print(arkv.policies.full.__file__)"
    assert Path(run_installed(code, installed, tmp_path).strip()).is_relative_to(installed)


@pytest.mark.parametrize("name", ["policies", "models"])
def test_folders_are_not_importable_by_themselves(installed: Path, tmp_path: Path, name: str) -> None:
    code = f"""
try:
    import {name}
except ModuleNotFoundError as error:
    print(error.name)
"""
    assert run_installed(code, installed, tmp_path).strip() == name


def test_every_entry_point_of_the_wheel_loads(installed: Path, tmp_path: Path) -> None:
    (metadata,) = installed.glob("arkv-*.dist-info")
    points = PathDistribution(metadata).entry_points
    assert {point.group for point in points} == {"console_scripts", "arkv.policies", "arkv.models"}
    targets = sorted({point.value for point in points})
    code = f"""
from importlib import import_module
for target in {targets!r}:
    module, _, name = target.partition(":")
    print(target, callable(getattr(import_module(module), name)))
"""
    printed = run_installed(code, installed, tmp_path).splitlines()
    assert printed == [f"{target} True" for target in targets]


def test_version_is_that_of_the_metadata(installed: Path, tmp_path: Path) -> None:
    (metadata,) = installed.glob("arkv-*.dist-info")
    printed = run_installed("import arkv; print(arkv.__version__)", installed, tmp_path)
    assert printed.strip() == PathDistribution(metadata).version


# Each of these takes longer to import than the command has before it seems slow.
HEAVY = ("torch", "tensordict", "transformers", "scipy")


@pytest.mark.parametrize("command", [[], ["generate"], ["estimate"]])
def test_help_imports_nothing_heavy(command: list[str], installed: Path, tmp_path: Path) -> None:
    code = f"""
import arkv.cli
sys.argv = ["arkv", *{command!r}, "--help"]
try:
    status = arkv.cli.main()
except SystemExit as stop:
    status = stop.code
print("status", status or 0, "heavy", [name for name in {HEAVY!r} if name in sys.modules])
"""
    printed = run_installed(code, installed, tmp_path)
    assert "usage: arkv" in printed
    assert printed.splitlines()[-1] == "status 0 heavy []"


def test_lower_bounds_are_the_versions_that_tests_run_with() -> None:
    """A lower bound that `make test-oldest` does not run is not claimed."""
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    text = (ROOT / "pyproject.toml").read_text()
    claimed = dict(re.findall(r'^\s*"?(?:\w+ = \[)?"([\w-]+)(?:\[\w+\])?>=([\d.]+)', text, re.M))
    assert {"torch", "triton", "transformers", "matplotlib", "pyarrow", "pytest"} <= claimed.keys()
    for name, bound in claimed.items():
        if name == "ray":  # the engine asks for that version itself
            continue
        wanted = [*map(int, bound.split(".")), 0, 0, 0][:3]
        have = [*map(int, re.findall(r"\d+", pinned[name])), 0, 0, 0][:3]
        assert have == wanted, f"{name}>={bound} is claimed and {pinned[name]} is tested"
