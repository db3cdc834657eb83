"""`arkv demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from saying import arkv_says

from arkv.models.scenes.adapter import Scenes
from arkv.study.demo import CONTENDERS


def test_demo_writes_a_sheet_and_prints_scores(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.png"
    printed = arkv_says(capsys, "demo", "--judged", "0", "--out", out, "--quiet").splitlines()
    titles = [contender.title for contender in CONTENDERS]
    assert [line.split("  ")[0] for line in printed[1:5]] == titles
    assert all(line.endswith("of 8") for line in printed[1:5])
    assert Image.open(out).width > 8 * 192
