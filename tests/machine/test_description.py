"""What is said of the machine and of the code that ran."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv.machine import description
from arkv.machine.description import describe_machine


def test_without_a_checkout_the_commit_is_what_the_build_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_git(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", no_git)
    monkeypatch.setattr(description, "BUILT_FROM", tmp_path / "_commit.txt")
    assert describe_machine(torch.device("cpu"))["commit"] is None
    (tmp_path / "_commit.txt").write_text("abc-dirty\n")
    assert describe_machine(torch.device("cpu"))["commit"] == "abc-dirty"
