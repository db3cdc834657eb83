"""Every code block of every page is tried: Python runs, commands parse, data is read."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import json
import pkgutil
import re
import shlex
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import arkv
from arkv.cli.parser import parse
from arkv.registry import names
from arkv.testing import Tiny

ROOT = Path(__file__).parents[1]
PAGES = [
    path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
]
PACKAGES = {
    "arkv-fading": ROOT / "docs/extending/example-policy",
    "arkv-squares": ROOT / "docs/extending/example-model",
}


class Block(NamedTuple):
    page: str
    language: str
    options: str
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, indented ones too, with the files that they include."""
    fence = r"^(?P<indent> *)```(?P<language>\w*)(?P<options>[^\n]*)\n(?P<text>.*?)^(?P=indent)```$"
    found = re.finditer(fence, (ROOT / page).read_text(), re.M | re.S)
    return [
        Block(page, m["language"], m["options"].strip(), with_snippets(textwrap.dedent(m["text"])))
        for m in found
    ]


def with_snippets(text: str) -> str:
    # In Python blocks the form of three lines: the other one is a comparison, which a formatter would format.
    snippet = r'^--8<--(?: "(.+)"|\n(.+)\n--8<--)\n'
    return re.sub(snippet, lambda m: (ROOT / "docs" / (m[1] or m[2])).read_text(), text, flags=re.M)


def blocks_in(*languages: str) -> list[Block]:
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


@pytest.fixture
def example_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The example packages as if they were installed: importable, and found by their entry points."""
    for name, folder in PACKAGES.items():
        facts = read_toml((folder / "pyproject.toml").read_text())["project"]
        metadata = tmp_path / f"{name.replace('-', '_')}-{facts['version']}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Name: {name}\nVersion: {facts['version']}\n")
        points = [
            f"[{group}]\n" + "".join(f"{point} = {target}\n" for point, target in entries.items())
            for group, entries in facts["entry-points"].items()
        ]
        (metadata / "entry_points.txt").write_text("\n".join(points))
        monkeypatch.syspath_prepend(folder / "src")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield
    for module in set(sys.modules) - before:
        if module.startswith(("arkv_fading", "arkv_squares")):
            del sys.modules[module]


def read_toml(text: str) -> dict:
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    return tomllib.loads(text)


def pages_with_code() -> list[str]:
    """One page of those with the very same code."""
    code = {page: "".join(b.text for b in blocks_of(page) if b.language == "python") for page in PAGES}
    return sorted({text: page for page, text in code.items() if text}.values())


@pytest.mark.usefixtures("example_packages")
@pytest.mark.parametrize("page", pages_with_code())
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In order, as a reader would type it; what the page says that a block prints, it prints."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"docs_{Path(page).stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up annotations
    printed = ""
    for block in blocks_of(page):
        if block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(block.text, page, "exec"), module.__dict__)
            printed = output.getvalue()
        elif block.options == 'title="prints"':
            assert block.text in printed


def commands_of(page: str) -> list[str]:
    """The lines of a page's shell blocks, and the commands with flags in its sentences."""
    blocks = [block for block in blocks_of(page) if block.language in ("bash", "sh", "console")]
    lines = [line for block in blocks for line in block.text.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`((?:arkv|python -m) [^`|]*--[^`|]*)`", (ROOT / page).read_text())
    return [command for command in lines + inline if command.strip()]


COMMANDS = [(page, command) for page in PAGES for command in commands_of(page)]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_of_a_page_can_be_typed(page: str, command: str) -> None:
    """Its flags exist and its values are read; so do the modules and targets that it names."""
    words = shlex.split(command, comments=True)
    if words and words[0] == "arkv":
        try:
            parse(words[1:])
        except SystemExit as stop:
            if stop.code != 0:  # what is wrong is on the standard error
                pytest.fail(f"{page}: {command}")
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2])
    elif words and words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[:2] == ["pip", "install"]:
        for target in words[2:]:
            folder = target.partition("[")[0]
            assert (ROOT / folder / "pyproject.toml").is_file() or folder == "arkv"
    else:
        assert not words or words[0] in {"python", "pytest"}, "a command that no test knows"


@pytest.mark.parametrize("block", blocks_in("toml", "json"), ids=lambda block: block.page)
def test_data_of_a_page_can_be_read(block: Block) -> None:
    if block.language == "toml":
        read_toml(block.text)
    else:
        json.loads(block.text)


def test_every_policy_is_on_the_page_of_policies() -> None:
    page = (ROOT / "docs/guide/policies.md").read_text()
    own = [entry.name for entry in names("policy") if entry.origin.startswith("arkv ")]
    assert own
    rows = re.findall(r"^\| `(\w+)`", page, re.M)
    assert sorted(rows) == sorted(own)
    paragraphs = re.findall(r"^### .*`(\w+)`", page, re.M)
    assert sorted(paragraphs) == sorted(own)


def test_every_module_is_in_the_reference() -> None:
    """By itself, or in a room whose page has all of its modules; but for the command, which has a guide."""
    pages = "".join(path.read_text() for path in ROOT.glob("docs/reference/*.md"))
    documented = set(re.findall(r"^::: (\S+)", pages, re.M))
    whole = re.findall(r"^::: (\S+)\n    options:\n      show_submodules", pages, re.M)
    rooms = tuple(f"{room}." for room in whole)
    assert rooms
    for name in documented:
        pkgutil.resolve_name(name)
    places = {"arkv": "arkv", "policies": "arkv.policies", "models": "arkv.models"}
    modules = {
        ".".join((place, *path.relative_to(ROOT / folder).with_suffix("").parts))
        for folder, place in places.items()
        for path in (ROOT / folder).rglob("[!_]*.py")
    }
    missing = {name for name in modules - documented if not name.startswith((*rooms, *UNDOCUMENTED))}
    assert not missing


# The command has a guide; of the suite a page shows what its users need.
UNDOCUMENTED = ("arkv.cli", "arkv.testing.")


@pytest.mark.usefixtures("example_packages")
def test_the_tutorial_ends_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the steps build is what the package has: the same methods, the same plan, the same pictures."""
    page = ROOT / "docs/extending/policy.md"
    steps = [
        block.text for block in blocks_of(page.relative_to(ROOT).as_posix()) if block.language == "python"
    ]
    package = (PACKAGES["arkv-fading"] / "src/arkv_fading/policy.py").read_text()
    steps = steps[: steps.index(package)]
    (built,) = [node for node in ast.parse(package).body if isinstance(node, ast.ClassDef)]
    shown = {
        name: source
        for block in steps
        for node in ast.parse(block).body
        if isinstance(node, ast.ClassDef)
        for name, source in members(node).items()
    }
    final = members(built)
    # Checks and the source are the package's own; the steps' plans call each other, the package has one.
    apart = {"__post_init__", "source", "plan"}
    assert {name: source for name, source in shown.items() if name not in apart} == {
        name: source for name, source in final.items() if name not in apart
    }

    module = types.ModuleType("docs_steps")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with contextlib.redirect_stdout(io.StringIO()):
        for block in steps:
            exec(compile(block, "steps", "exec"), module.__dict__)
    packaged = importlib.import_module("arkv_fading.policy").Fading
    last = [kind for kind in vars(module).values() if isinstance(kind, type)][-1]
    assert dataclasses.is_dataclass(last)
    model = Tiny(arkv.Grid(5, 6), layers=3)
    one, other = (kind(ratio="1/2", half_life=4, recent=6) for kind in (last, packaged))
    assert one.plan(model.spec.grid, model.spec) == other.plan(model.spec.grid, model.spec)
    drawn = [arkv.Decoder(model, policy).generate([(1, 2)]).tokens for policy in (one, other)]
    assert torch.equal(*drawn)


def members(node: ast.ClassDef) -> dict[str, str]:
    """Source of methods and fields by name, without comments."""
    found = {}
    for member in node.body:
        if isinstance(member, ast.FunctionDef):
            found[member.name] = ast.unparse(member)
        elif isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name):
            found[member.target.id] = ast.unparse(member)
    return found


def test_tables_of_options_are_those_there_are() -> None:
    """`python docs/option_tables.py` writes them."""
    spec = importlib.util.spec_from_file_location("option_tables", ROOT / "docs/option_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    marked = set()
    for page in tables.PAGES:
        text = (ROOT / "docs" / page).read_text()
        assert tables.with_tables(text) == text
        marked |= {name for _, name, _ in tables.MARKED.findall(text)}
    from arkv.cli.parser import COMMANDS

    assert marked == {*COMMANDS, "job.yaml"} - {"policies", "models", "completion"}
