"""Every Python block of the README and the guides runs, in order, as a reader would type it."""

from __future__ import annotations

import re
import sys
import textwrap
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/index.md", "docs/extending/policy.md"]


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", text, re.M | re.S)]
    assert blocks
    # A policy that is not installed under a name of its own can be shown, not loaded.
    code = "\n".join(block for block in blocks if 'load_policy("mine"' not in block)
    module = types.ModuleType(f"docs_{Path(page).stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where dataclasses look up annotations
    exec(compile(code, page, "exec"), module.__dict__)
