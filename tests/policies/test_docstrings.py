"""The algorithm boxes of policies reach a reader of the site as boxes."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

POLICIES = sorted((Path(__file__).parents[2] / "policies").glob("*.py"))


@pytest.mark.parametrize("path", POLICIES, ids=lambda path: path.stem)
def test_what_is_set_in_columns_is_preformatted(path: Path) -> None:
    """Indented, or between fences, once the indentation that all lines share is gone."""
    text = inspect.cleandoc(ast.get_docstring(ast.parse(path.read_text()), clean=False) or "")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    columns = [line for line in prose.splitlines() if re.search(r"\S {2,}\S", line)]
    assert all(line.startswith("    ") for line in columns), columns
