"""`arkv sheet`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from saying import arkv_says

from arkv.pictures.files import png


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    for number in range(5):
        path = folder / f"0000{number}/samples/00000.png"
        path.parent.mkdir(parents=True)
        path.write_bytes(
            png(Image.new("RGB", (48, 48), (40 * number, 0, 0)), {"prompt": f"picture {number}"})
        )
    (folder / ".hidden.png").touch()
    return folder


def test_a_folder_becomes_one_sheet(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert arkv_says(capsys, "sheet", pictures, "--out", out) == f"{out}: 5 of 5 pictures of {pictures}\n"
    whole = Image.open(out)
    assert whole.width > 3 * 192
    printed = arkv_says(capsys, "sheet", pictures, "--out", out, "--most", "2")
    assert printed == f"{out}: 2 of 5 pictures of {pictures}\n"
    assert Image.open(out).height < whole.height


def test_a_job_names_its_folder(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(f"prompts: p.txt\nout: {pictures}\n")
    assert "5 of 5" in arkv_says(capsys, "sheet", job, "--out", tmp_path / "sheet.png")


def test_what_has_no_pictures_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"no picture")
    out = tmp_path / "sheet.png"
    assert "has no PNG files" in arkv_says(capsys, "sheet", empty, "--out", out, status=1)
    assert "cannot read" in arkv_says(capsys, "sheet", broken, "--out", out, status=1)
    assert "is no folder" in arkv_says(capsys, "sheet", tmp_path / "nowhere", "--out", out, status=1)
    assert "ends in .png" in arkv_says(capsys, "sheet", broken, "--out", tmp_path / "x.jpg", status=1)
    assert not out.exists()
