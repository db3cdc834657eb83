"""`arkv demo`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from saying import arkv_says

from arkv.models.scenes.adapter import Scenes


def test_demo_writes_a_sheet_and_prints_scores(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.png"
    printed = arkv_says(capsys, "demo", "--judged", "0", "--out", out, "--quiet").splitlines()
    assert [line.split("  ")[0] for line in printed[1:4]] == ["full cache", "LineAR 1/6", "StreamingLLM 1/6"]
    assert all(line.endswith("of 8") for line in printed[1:4])
    assert Image.open(out).width > 8 * 192
