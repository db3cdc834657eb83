"""What `make gpu` asks, and the page that it writes."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).parents[2] / "docs/results/gpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(GPU))
    found = {name: importlib.import_module(name) for name in ("steps", "page", "rows", "layout")}
    spec = importlib.util.spec_from_file_location("make_gpu", GPU / "__main__.py")
    assert spec is not None
    assert spec.loader is not None
    found["main"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found["main"])
    return found


def test_every_step_is_at_most_eight_minutes_and_no_name_comes_twice(scripts: dict[str, ModuleType]) -> None:
    steps = scripts["steps"]
    assert all(step.seconds <= steps.LONGEST == 480 for step in steps.STEPS)
    names = [part.name for step in steps.STEPS for part in step.parts]
    assert len(set(names)) == len(names)
    assert steps.GPU.keys() == steps.DRY.keys()


def test_without_rows_the_page_says_that_nothing_was_measured(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    text = scripts["page"].page(tmp_path, scripts["steps"].STEPS)
    assert "Nothing has been measured on a GPU so far" in text
    written = (GPU.parent / "gpu.md").read_text()
    assert written == text or "a large copy moves" in written, "python docs/results/gpu/page.py writes it"


def test_rows_become_tables_by_kind_and_a_row_that_was_cut_is_left_out(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    machine = {
        "kind": "machine",
        "device": "a card",
        "torch": "2",
        "date": "2030-01-01T",
        "commit": "abc",
        "copy_bytes_per_s": 4e12,
    }
    rows = [machine, {"kind": "attention", "name": "x|y", "error": 0.5, "good": False}]
    (tmp_path / "smoke.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"kind": "att')
    text = scripts["page"].page(tmp_path, scripts["steps"].STEPS)
    assert "a card, torch 2, 2030-01-01, commit abc; a large copy moves 4,000 GB/s" in text
    assert "| name | error | good |\n|---|---|---|\n| x/y | 0.5 | **no** |" in text
    assert "Nothing has been measured" not in text


def test_of_rows_about_the_same_the_later_one_is_shown(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    rows = scripts["rows"].Rows(tmp_path / "attention.jsonl")
    rows.add(kind="attention", name="a", rows=2, error="out of memory")
    assert not rows.have(kind="attention", name="a", rows=2)
    rows.add(kind="attention", name="a", rows=2, microseconds=7.0)
    with (tmp_path / "attention.jsonl").open("a") as file:
        file.write('{"kind": "attention", "na')
    assert rows.have(kind="attention", name="a", rows=2)
    assert not rows.have(kind="attention", name="a", rows=4)
    (row,) = scripts["page"]._read(tmp_path / "attention.jsonl")
    assert row["microseconds"] == 7


def test_a_part_that_fails_stops_no_other_and_is_told_at_the_end(
    scripts: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is run again the next time, the others not."""
    steps, main = scripts["steps"], scripts["main"]
    ran: list[str] = []
    broken = [True]

    def run(part: object, out: Path, *_: object) -> float | None:
        ran.append(part.name)  # type: ignore[attr-defined]
        (out / f"{part.name}.log").write_text("a line\nthe reason\n")  # type: ignore[attr-defined]
        return None if part.name == "first" and broken[0] else 1.0  # type: ignore[attr-defined]

    parts = [steps.Part(name, "smoke.py", 5) for name in ("first", "second", "third")]
    asked = (steps.Step("one?", tuple(parts[:2])), steps.Step("two?", tuple(parts[2:])))
    machine = {
        "kind": "machine",
        "device": "card",
        "torch": "2",
        "date": "2030-01-01T",
        "commit": "a",
        "copy_bytes_per_s": 1e12,
    }
    (tmp_path / "smoke.jsonl").write_text(json.dumps(machine) + "\n")
    monkeypatch.setattr(main, "STEPS", asked)
    monkeypatch.setattr(main, "_run_part", run)
    monkeypatch.setattr("sys.argv", ["gpu", "--dry", "--out", str(tmp_path)])
    assert main.main() == 1
    assert ran == ["first", "second", "third"]
    assert (tmp_path / "first.log").exists()
    assert not (tmp_path / "first.done").exists()
    broken.clear()
    broken.append(False)
    assert main.main() == 0
    assert ran[3:] == ["first"]


def test_the_page_says_which_part_did_not_end_well(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    steps = scripts["steps"]
    part = steps.Part("tests", "pytest", 5, writes=False)
    (tmp_path / "tests.log").write_text("x\n==== 1 failed, 3 passed in 2s ====\n\n")
    assert scripts["page"]._end_of_log(tmp_path, part) == [
        "**`tests` did not end well**: 1 failed, 3 passed in 2s\n"
    ]
    (tmp_path / "tests.done").write_text("{}")
    assert scripts["page"]._end_of_log(tmp_path, part) == ["`tests`: 1 failed, 3 passed in 2s\n"]


def test_what_is_measured_is_this_tree_whatever_else_is_installed(
    scripts: dict[str, ModuleType], tmp_path: Path
) -> None:
    place = scripts["layout"].lay_out(tmp_path / "path")
    code = (
        "from importlib.util import find_spec as f; print(f('arkv').origin, f('arkv.policies.linear').origin)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(place)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert told[:2] == [f"{place}/arkv/__init__.py", f"{place}/arkv/policies/linear.py"]
    assert scripts["layout"].missing() == []
