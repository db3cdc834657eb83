"""What `make gpu` asks, and the page that it writes."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

GPU = Path(__file__).parents[2] / "docs/results/gpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(str(GPU))
    return {name: importlib.import_module(name) for name in ("steps", "page")}


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
