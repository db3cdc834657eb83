"""Files that appear whole or not at all, and never in place of what is no file."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from arkv.decoder import Result, Statistics
from arkv.errors import ArkvError
from arkv.pictures.files import part_of, write_whole

KINDS: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo if hasattr(os, "mkfifo") else Path.mkdir,
    "a symbolic link": lambda path: path.symlink_to(path.with_name("elsewhere")),
}


@pytest.mark.skipif(sys.platform == "win32", reason="has links that anybody can make")
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_plain_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "out.json")
    (tmp_path / "first.json").write_text("before")
    with pytest.raises(ArkvError, match=f"cannot write .*out.json: it is {kind}, and only a plain file"):
        write_whole({tmp_path / "first.json": b"after", tmp_path / "out.json": b"after"})
    assert (tmp_path / "first.json").read_text() == "before", "of one result, none is written"
    assert sorted(os.listdir(tmp_path)) == ["first.json", "out.json"]


@pytest.mark.skipif(not Path("/dev/null").is_char_device(), reason="has no such device")
def test_a_device_is_not_replaced() -> None:
    with pytest.raises(ArkvError, match="cannot write /dev/null: it is a device"):
        write_whole({Path("/dev/null"): b"x"})
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["x\0y.png", "x" * 300, "\ud800.png"], ids=["NUL", "long", "surrogate"])
def test_a_name_that_no_file_can_have_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArkvError, match="cannot write ") as caught:
        write_whole({tmp_path / name: b"x"})
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_was_planted_where_a_file_is_made_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    part_of(tmp_path / "out.png").symlink_to(tmp_path / "precious")
    write_whole({tmp_path / "out.png": b"x"})
    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "out.png").read_bytes() == b"x"
    assert not (tmp_path / "out.png").is_symlink()


def test_a_result_is_saved_whole_and_replaces_nothing(tmp_path: Path) -> None:
    images = [Image.new("RGB", (2, 2), (value, 0, 0)) for value in range(2)]
    result = Result(images, torch.zeros(2, 4, dtype=torch.long), Statistics(2, 8, 4, 1.0, 1, 1, 4))
    paths = result.save(tmp_path / "new" / "folder")
    assert [Image.open(path).tobytes() for path in paths] == [image.tobytes() for image in images]
    paths[0].unlink()
    with pytest.raises(ArkvError, match=r"000001.png is there already"):
        result.save(str(tmp_path / "new" / "folder"))
    assert not paths[0].exists()
    with pytest.raises(ArkvError, match="no pictures to save"):
        Result([], result.tokens, result.stats).save(tmp_path)
