"""`arkv bench`."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from saying import arkv_says

from arkv.cli import main
from arkv.jobs.journal import read_journal
from arkv.models.scenes.adapter import Scenes
from arkv.speed import bench, machine_code, published


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


def test_bench_that_is_killed_keeps_the_rows_that_it_has_measured(
    tiny: Scenes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a group that takes turns, too: a row is there after its first round."""
    out = tmp_path / "bench.jsonl"
    flags = [
        "--policies",
        "full,window",
        "--tokens",
        "2",
        "--batch-sizes",
        "1",
        "--quiet",
        "--json",
        str(out),
    ]
    child = os.fork()
    if not child:
        main(["bench", *flags, "--repeats", "1000000"])
        os._exit(0)
    try:
        until = time.monotonic() + 60
        while not out.exists() or out.read_bytes().count(b"\n") < 4:
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    _, rows, _ = read_journal(out, key="case")
    assert [row["policy"] for row in rows.values()] == ["full", "window:ratio=1/6"]
    assert all(row["seconds"] for row in rows.values())
    head, *rest = out.read_text().splitlines()
    out.write_text("\n".join([head.replace("1000000", "2"), *rest]) + "\n")
    flags.remove("--quiet")
    cut = replace_seconds(out, 1)
    arkv_says(capsys, "bench", *flags, "--repeats", "2", status=0)
    assert cut == 2
    _, rows, _ = read_journal(out, key="case")
    assert [len(row["seconds"]) for row in rows.values()] == [2, 2]
    assert len(out.read_text().splitlines()) == 1 + 2, "of rounds that are over one row is left"


def replace_seconds(path: Path, rounds: int) -> int:
    """As if a run had been killed after some rounds; how many rows there are."""
    head, *lines = path.read_text().splitlines()
    rows = {row["case"]: row for row in map(json.loads, lines)}.values()
    lines = [json.dumps(row | {"seconds": row["seconds"][:rounds]}) for row in rows]
    path.write_text("\n".join([head, *lines]) + "\n")
    return len(lines)


def test_bench_measures_again_what_other_code_has_measured(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.jsonl"
    flags = ["bench", "--policies", "full,window", "--tokens", "2", "--batch-sizes", "1", "--repeats", "1"]
    arkv_says(capsys, *flags, "--json", out, "--quiet")
    head, full, window = out.read_text().splitlines()
    facts = json.loads(full)["decided_by"]
    assert facts["policy"]["package"].startswith("arkv ")
    assert {"source", "weights"} <= facts["model"].keys()
    changed = json.loads(full)
    changed["decided_by"]["policy"]["source"] = "another"
    out.write_text("\n".join([head, json.dumps(changed), window]) + "\n")
    assert main([*flags, "--json", str(out)]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "measured again" in line]
    assert len(said) == 1
    assert "the row of scenes: full x 1 is stale and is measured again: policy source was another" in said[0]
    head, *rows = out.read_text().splitlines()
    assert window in rows, "what stands is left as it is"
    assert json.loads(rows[0])["decided_by"] == facts


def test_bench_takes_some_policies_of_a_preset(
    tiny: Scenes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tuple(
        published.Published("a table", "scenes", policy, policy, 1, 1.0, 1.0)
        for policy in ("full", "window:ratio=1/6", "window:ratio=1/4")
    )
    monkeypatch.setitem(published.PRESETS, "linear-table", rows)
    flags = ["bench", "--preset", "linear-table", "--tokens", "1", "--repeats", "1", "--quiet", "--policies"]

    def measured(policies: str) -> list[str]:
        _, _, *lines = arkv_says(capsys, *flags, policies).partition("\n\n")[0].splitlines()
        return [line.split()[0] for line in lines]

    assert measured("window") == ["window:ratio=1/6", "window:ratio=1/4"]
    assert measured("window:ratio=1/4,full") == ["full", "window:ratio=1/4"]
    complaint = arkv_says(capsys, *flags, "linear", status=1)
    assert "linear-table has no linear: it has full, window, window:ratio=1/6" in complaint


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


def test_bench_prints_what_kernels_are_compiled_to(
    tiny: Scenes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = machine_code.Code("_attend_slots", 4, 96, 0, 0, 900, {128: 16}, 16, 16)
    monkeypatch.setattr(machine_code, "machine_code", lambda call, architecture: [code])
    lines = arkv_says(capsys, "bench", "--kernels").splitlines()
    assert lines[0].endswith("| sm_80 | sm_90 | sm_100 |")
    assert all("| 96, 16 of 16 loads ahead, 128 bits |" in line for line in lines[2:])
    assert {line.split()[1] for line in lines[2:]} == {"1", "16"}
