"""Tables: whole in a pipe, fitted to a terminal."""

from __future__ import annotations

import io
import re
import sys

import pytest

from arkv.cli.tables import print_table


def test_a_pipe_gets_a_row_a_line_however_long(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("a" * 200, 1), ("[bold]b[/bold] :smile:", 22)]
    print_table(("name", "count"), rows, right={1})
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "name" + " " * 196 + "  count",
        "a" * 200 + "      1",
        "[bold]b[/bold] :smile:" + " " * 178 + "     22",
    ]


def test_wide_characters_count_twice(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("a", "b"), [("三", 1), ("xx", 2)])
    assert capsys.readouterr().out.splitlines() == ["a   b", "三  1", "xx  2"]


def test_a_terminal_gets_lines_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    print_table(("name", "about"), [("x", "word " * 30)])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40
