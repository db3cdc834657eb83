"""The command line as somebody sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from arkv.cli import main

PROMPTS = ("three red circles", "a blue square above a cyan circle")


def arkv_says(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 0) -> str:
    """Runs the command; gives its standard output, or the one line of its complaint."""
    assert main([str(argument) for argument in arguments]) == status
    out, err = capsys.readouterr()
    if status == 0:
        return out
    assert not out
    assert err.startswith("arkv: error: ")
    assert err.count("\n") == 1, err
    return err


def usage_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """What is said of arguments that cannot be read."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("usage: arkv")
    assert err.count("\n") == 3, err
    return err


def picture_of(*names: str) -> list[str]:
    """Flags that ask for pictures."""
    return [part for name in names for part in ("--prompt", name)]
