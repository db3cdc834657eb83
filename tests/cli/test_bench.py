"""`arkv bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from saying import arkv_says

from arkv.models.scenes.adapter import Scenes
from arkv.speed import bench, published


def test_bench_prints_a_table_and_writes_json_lines(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    flags = ("--policies", "full,linear:anchors=2,recent=24", "--batch-sizes", "1", "--repeats", "1")
    printed = arkv_says(capsys, "bench", *flags, "--json", out, "--quiet").splitlines()
    assert printed[1].split()[:3] == ["policy", "batch", "tokens/s"]
    assert [line.split()[0] for line in printed[2:]] == ["full", "linear:anchors=2,recent=24,ratio=1/6"]
    head, *rows = map(json.loads, out.read_text().splitlines())
    for field in ("date", "arkv", "commit", "torch", "cpu", "threads", "device", "dtype", "seed"):
        assert field in head["run"]
    assert [row["policy"] for row in rows] == ["full", "linear:anchors=2,recent=24,ratio=1/6"]
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["cold_seconds"] > 0
    assert rows[0]["kv_bytes"] == rows[0]["full_kv_bytes"] == rows[1]["full_kv_bytes"]
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]


def test_bench_goes_on_where_it_was_stopped(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    flags = ["bench", "--policies", "full,window", "--tokens", "24", "--repeats", "1", "--quiet"]
    arkv_says(capsys, *flags, "--batch-sizes", "1", "--json", out)
    before = out.read_text()
    head, *_ = map(json.loads, before.splitlines())
    assert head["run"]["tokens"] == 24
    assert head["run"]["command"].startswith("arkv bench --policies full,window")
    measured: list[int] = []
    measure = bench.measure

    def counted(model: Scenes, wanted: list[bench.Configuration], **settings: Any) -> Any:
        measured.append(len(wanted))
        return measure(model, wanted, **settings)

    monkeypatch.setattr(bench, "measure", counted)
    printed = arkv_says(capsys, *flags, "--batch-sizes", "1,2", "--json", out, "--plot", tmp_path / "b.png")
    assert measured == [2]
    assert out.read_text().startswith(before)
    assert len(out.read_text().splitlines()) == 1 + 4
    assert [line.split()[1] for line in printed.splitlines()[2:6]] == ["1", "1", "2", "2"]
    assert Image.open(tmp_path / "b.png").width > 1000
    complaint = arkv_says(capsys, *flags, "--batch-sizes", "1", "--seed", "7", "--json", out, status=1)
    assert "seed is 0 there and 7 here" in complaint


def test_bench_walks_the_rows_of_a_table(
    tiny: Scenes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        published.Published("a table", "scenes", method, policy, 2, speed, gigabytes, "a card", note)
        for method, policy, speed, gigabytes, note in (
            ("full cache", "full", 0.5, 8.0, ""),
            ("small", "window:ratio=1/6", 2.0, 3.0, "inferred"),
            ("tiny", "linear:ratio=1/100", 3.0, 2.0, ""),
        )
    ]
    monkeypatch.setitem(published.PRESETS, "linear-table", tuple(rows))
    flags = ["--preset", "linear-table", "--lines", "0,23", "--repeats", "1", "--quiet"]
    title, _, *lines = arkv_says(capsys, "bench", *flags).splitlines()
    assert "lines 0, 23 timed" in title
    assert [line.split()[:2] for line in lines[:2]] == [["full", "2"], ["window:ratio=1/6", "2"]]
    assert lines[2].startswith("linear:ratio=1/100 x 2 is left out: ")
    assert lines[4] == "published, on other hardware:"
    assert [line.split()[0] for line in lines[6:9]] == ["full", "small", "tiny"]
    assert " 4.00x " in lines[7]
    assert lines[7].endswith("3 GB  a table")
    assert lines[9:] == ["a card", "inferred"]
    complaint = arkv_says(capsys, "bench", "--preset", "linear-table", "--model", "lumina", status=1)
    assert "no rows of lumina" in complaint


def test_bench_leaves_out_a_baseline_that_there_is_not(
    tiny: Scenes, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--policies", "window,transformers-dynamic", "--memory", "0.005", "--tokens", "2"]
    *_, row, note = arkv_says(capsys, "bench", *flags, "--repeats", "1", "--quiet").splitlines()
    assert row.startswith("window:ratio=1/6")
    assert 1 < int(row.split()[1]) < 1000  # gigabytes are turned into bytes once
    assert "is left out: transformers has no scenes" in note
