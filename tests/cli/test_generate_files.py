"""`arkv generate --prompts-file`: what is drawn, and that no interrupt leaves a trace in the result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from letters import Letters
from PIL import Image

import arkv
from arkv import registry
from arkv.cli import main
from arkv.cli.parser import parse
from arkv.decoder import Decoder
from arkv.errors import NumericalError
from arkv.jobs.job import picture_seed
from arkv.pictures.layouts import LAYOUTS

RECORDS = [{"tag": "t", "prompt": text} for text in ("a b c", "d", "e f", "d", "g h a b")]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Letters:
    made = Letters()
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: made)
    return made


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def command(listed: Path, out: Path, *more: str | int) -> list[str]:
    usual = ["generate", "--policy", "window:ratio=1/2", "--samples", "2", "--batch-size", "3", "--quiet"]
    return [*usual, "--prompts-file", str(listed), "--out", str(out), *map(str, more)]


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()]


def contents(out: Path) -> dict[str, bytes]:
    """Everything but the index, hidden files too."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "index.jsonl"
    }


def state(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """Files and the rows of the index, which may have been finished in another order."""
    return contents(out), sorted(lines_of(out)[1:], key=lambda row: row["file"])


def test_every_prompt_is_drawn_with_its_record_and_its_seed(
    model: Letters, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(listed, out, "--seed", 5)) == 0
    assert capsys.readouterr().out.startswith(f"{out}: 10 pictures, ")
    header, *rows = lines_of(out)
    assert [row["file"] for row in rows] == [
        f"0000{p}/samples/0000{s}.png" for p in range(5) for s in range(2)
    ]
    assert [row["pictures"] for row in rows] == [[number] for number in range(10)]
    assert len({row["seeds"][0] for row in rows}) == 10, "a prompt that stands twice is drawn twice"
    for number, row in enumerate(rows):
        assert row["seeds"] == [picture_seed(5, number)]
        image = Image.open(out / row["file"])
        assert image.text["prompt"] == row["prompt"] == RECORDS[number // 2]["prompt"]
        assert image.text["seed"] == str(row["seeds"][0])
        assert (out / row["file"]).stat().st_size == row["bytes"]
    for index, record in enumerate(RECORDS):
        assert json.loads((out / f"0000{index}/metadata.jsonl").read_text()) == record
    told = {"model": "tiny", "layout": "geneval", "samples": 2, "seed": 5, "guidance": 1.5, "batch_size": 3}
    assert told.items() <= header["run"].items()
    assert header["run"]["command"].startswith("arkv generate --policy window:ratio=1/2")


def test_a_picture_is_the_one_that_its_seed_draws_alone(model: Letters, listed: Path, tmp_path: Path) -> None:
    out, alone = tmp_path / "out", tmp_path / "alone.png"
    assert main(command(listed, out)) == 0
    row = lines_of(out)[8]
    again = ["generate", "--policy", "window:ratio=1/2", "--quiet", "--prompt", row["prompt"]]
    assert main([*again, "--seed", str(row["seeds"][0]), "--out", str(alone)]) == 0
    assert Image.open(alone).tobytes() == Image.open(out / row["file"]).tobytes()


def test_seeds_depend_on_job_and_number_alone() -> None:
    seeds = {picture_seed(job, number) for job in range(20) for number in range(500)}
    assert len(seeds) == 20 * 500, "not on their sum, for instance"
    assert all(0 <= seed < 2**48 for seed in seeds)
    # Whoever takes up an old run has to get these.
    fixed = [picture_seed(0, 0), picture_seed(0, 1), picture_seed(1, 0)]
    assert fixed == [72805836995272, 221829069981388, 220992594255487]


@pytest.mark.parametrize("layout", ["dpg", "flat", "npz", "geneval"])
def test_pictures_do_not_depend_on_the_batch_size(
    layout: str, model: Letters, listed: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / f"out{size}" for size in (1, 3, 100)]
    for out, size in zip(outs, (1, 3, 100), strict=True):
        assert main(command(listed, out, "--batch-size", size, "--layout", layout)) == 0
    first, *others = map(state, outs)
    assert all(other == first for other in others)


def snapshots_of(run: Callable[[], object], out: Path, kept: Path) -> list[Path]:
    """What lies in a folder whenever the disk is about to be told something, or was just told it.

    A process can be killed at each of these moments, and at any byte of a write between two of them.
    """
    found: list[Path] = []

    def keep() -> None:
        target = kept / str(len(found))
        shutil.copytree(out, target) if out.exists() else target.mkdir(parents=True)
        found.append(target)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "fsync"):
            real = getattr(os, name)

            def told(*arguments: Any, real: Any = real) -> None:
                keep()
                real(*arguments)
                keep()

            patch.setattr(os, name, told)
        run()
    return found


@pytest.mark.parametrize("layout", ["geneval", "dpg", "npz"])
def test_a_run_that_is_killed_anywhere_ends_the_same(
    layout: str, model: Letters, listed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    listed.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[:3]))
    run = command(listed, out, "--layout", layout)
    snapshots = snapshots_of(lambda: main(run), out, tmp_path / "kept")
    whole = state(out)
    assert len(whole[1]) == (3 if layout == "dpg" else 6)
    seen = set()
    for snapshot in snapshots:
        was = repr(sorted((path, len(content)) for path, content in contents(snapshot).items()))
        index = snapshot / "index.jsonl"
        was += index.read_text().partition("\n")[2] if index.exists() else ""
        if was in seen:
            continue
        seen.add(was)
        for name, content in contents(snapshot).items():
            if not Path(name).name.startswith("."):
                assert content == whole[0][name], "no half file has its name"
        shutil.rmtree(out)
        shutil.move(snapshot, out)
        assert main(run) == 0
        assert state(out) == whole
    assert len(seen) > 2 * len(whole[1])


@pytest.mark.parametrize("call", [1, 2, 7, 8, 20])
def test_a_disk_that_fills_up_is_one_line_and_no_loss(
    call: int,
    model: Letters,
    listed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    fsync, calls = os.fsync, []

    def full_disk(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == call:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        assert main(command(listed, out)) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"arkv: error: cannot write {out}")
    assert told.endswith("No space left on device\n")
    assert not list(out.rglob(".*"))
    assert main(command(listed, out)) == 0
    assert main(command(listed, whole)) == 0
    assert state(out) == state(whole)


def test_a_line_of_the_index_that_is_cut_anywhere_is_drawn_again(
    model: Letters, listed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(command(listed, out)) == 0
    whole, index = state(out), (out / "index.jsonl").read_bytes()
    last = index[:-1].rfind(b"\n") + 1
    for cut in range(last, len(index), 40):
        (out / "index.jsonl").write_bytes(index[:cut])
        assert main(command(listed, out)) == 0
        assert state(out) == whole
        assert (out / "index.jsonl").read_bytes() == index


def test_nothing_is_drawn_twice(
    model: Letters, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, generate, drawn = tmp_path / "out", Decoder.generate, []

    def noted(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        if len(drawn) == 2:
            drawn.append([])
            raise KeyboardInterrupt
        drawn.append(list(seeds))
        return generate(self, prompts, seeds=seeds, **named)

    monkeypatch.setattr(Decoder, "generate", noted)
    assert main(command(listed, out)) == 130
    assert len(lines_of(out)) == 1 + 6
    assert main(command(listed, out)) == 0
    seeds = [seed for batch in drawn for seed in batch]
    assert sorted(seeds) == sorted(picture_seed(0, number) for number in range(10))
    drawn[:] = []
    before = state(out)
    assert main(command(listed, out)) == 0
    assert not drawn
    assert state(out) == before


def test_what_was_deleted_or_cut_short_is_drawn_again(model: Letters, listed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(command(listed, out)) == 0
    whole, index = state(out), (out / "index.jsonl").read_bytes()
    (out / "00001/samples/00000.png").unlink()
    (out / "00003/metadata.jsonl").unlink()
    cut = out / "00004/samples/00001.png"
    cut.write_bytes(cut.read_bytes()[:30])
    assert main(command(listed, out)) == 0
    assert state(out) == whole
    assert (out / "index.jsonl").read_bytes() == index


CHILD = """
import sys
import letters
from arkv import registry
from arkv.cli import main
registry.load_model = lambda *_, **__: letters.Letters()
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_process_that_is_killed_is_taken_up_again(model: Letters, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{a} {b}\n" for a in "abcdefgh" for b in "abcdefgh"))
    out, whole = tmp_path / "out", tmp_path / "whole"
    run = command(listed, out, "--batch-size", 2)
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *run],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "helpers")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (out / "index.jsonl").exists() and len((out / "index.jsonl").read_bytes().splitlines()) > 3:
            break
        time.sleep(0.005)
    process.kill()
    assert process.stderr is not None
    told = process.stderr.read().decode()
    assert process.wait() == -signal.SIGKILL, told
    assert 3 < len(lines_of(out)) < 129
    assert main(run) == 0
    assert main(command(listed, whole, "--batch-size", 2)) == 0
    assert state(out) == state(whole)


def test_another_configuration_is_refused_with_what_differs(
    model: Letters, listed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(listed, out)) == 0
    before = state(out)
    capsys.readouterr()
    unlike = ["--guidance", "2", "--samples", "3", "--policy", "full", "--seed", "1", "--top-k", "3"]
    unlike += ["--guided-tokens", "4", "--source", "elsewhere"]
    assert main(command(listed, out, *unlike)) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    for difference in (
        "guidance is 1.5 there and 2.0 here",
        "samples is 2 there and 3 here",
        'there and "full" here',
        "seed is 0 there and 1 here",
        "top_k is null there and 3 here",
        "guided_tokens is null there and 4 here",
        'loading is null there and {"source": "elsewhere"} here',
    ):
        assert difference in told
    assert "temperature" not in told
    listed.write_text(json.dumps(RECORDS[0]))
    assert main(command(listed, out)) == 1
    assert 'prompts is "5 with sha256 ' in capsys.readouterr().err
    assert state(out) == before


BAD = {
    "a prompt that the model does not take": ("a b\nA b\n", [], "list.txt, line 2: the prompt is 'A b'"),
    "no list": (None, [], "cannot read "),
    "layout without records": ("a\n", ["--layout", "geneval"], "line 1 has no record of GenEval"),
    "guidance that is no number": ("a\n", ["--guidance", "nan"], "guidance is nan"),
    "top-k above the vocabulary": ("a\n", ["--top-k", "99"], "top_k is 99"),
    "side without an archive": ("a\n", ["--npz-side", "8"], "npz_side is for the layout npz"),
    "seed below zero": ("a\n", ["--seed=-1"], "seed is -1"),
    "a file as the place": ("a\n", ["--out", "list.txt"], "expected a folder, and it is a file"),
    "a picture as the place": ("a\n", ["--out", "out.png"], "expected a folder"),
    "an archive as the place": ("a\n", ["--out", "out.npz"], "expected a folder"),
    "a folder of something else": ("a\n", ["--out", "full"], "is not empty and has no index.jsonl"),
}


@pytest.mark.parametrize(("content", "more", "complaint"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_begins_nothing(
    content: str | None,
    more: list[str],
    complaint: str,
    model: Letters,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/000000.png").touch()
    if content is not None:
        (tmp_path / "list.txt").write_text(content)
    before = sorted(tmp_path.rglob("*"))
    flags = ["generate", "--policy", "window:ratio=1/2", "--prompts-file", "list.txt", "--out", "out", *more]
    assert main([*flags, "--quiet"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("arkv: error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("flag", ["--samples=2", "--layout=flat", "--npz-side=8"])
def test_flags_of_a_list_need_one(
    flag: str, model: Letters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "--prompt", "a", flag, "--out", str(tmp_path / "out.png")]) == 1
    assert f"{flag.partition('=')[0]} is for the prompts of a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "files"),
    [
        ("m.jsonl", json.dumps(RECORDS[0]), [f"00000/samples/0000{sample}.png" for sample in range(4)]),
        ("p.txt", "a\nb\n", ["000000.png", "000001.png"]),
        ("c.csv", "image_id,caption\n9,a\n", ["000000.png"]),
        ("folder", "a", ["story7.png"]),
    ],
)
def test_samples_and_layout_follow_the_file(
    name: str, content: str, files: list[str], model: Letters, tmp_path: Path
) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    (path / "story7.txt" if path.is_dir() else path).write_text(content)
    out = tmp_path / "out"
    flags = ["--policy", "window:ratio=1/2", "--quiet", "--prompts-file", str(path), "--out", str(out)]
    assert main(["generate", *flags]) == 0
    assert [row["file"] for row in lines_of(out)[1:]] == files
    assert Image.open(out / files[0]).size == ((24, 24) if name == "folder" else (12, 12))


def test_classes_become_an_archive_that_shows_all_of_them_in_every_part(
    model: Letters, tmp_path: Path
) -> None:
    listed, out = tmp_path / "classes.txt", tmp_path / "out"
    listed.write_text("0\n5\n3\n")
    run = command(listed, out, "--layout", "npz", "--samples", 4)
    assert main(run) == 0
    rows = lines_of(out)[1:]
    assert [row["prompt"] for row in rows] == ["0", "5", "3"] * 4
    pictures = numpy.load(out / "samples.npz")["arr_0"]
    assert pictures.shape == (12, 12, 12, 3)
    for row, found in zip(rows, pictures, strict=True):
        numpy.testing.assert_array_equal(found, numpy.asarray(Image.open(out / row["file"])))
    before = contents(out)
    assert main([*run, "--npz-side", "8"]) == 0
    assert numpy.load(out / "samples-8.npz")["arr_0"].shape == (12, 8, 8, 3)
    assert contents(out).keys() - before.keys() == {"samples-8.npz"}, "nothing else is another job's"


def test_a_short_last_batch_has_the_shape_of_the_others_when_compiled(
    model: Letters, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes, loop_for = [], Decoder._loop_for

    def noted(self: Decoder, condition: Any, pictures: int, *others: Any) -> Any:
        shapes.append(pictures)
        return loop_for(self, condition, pictures, *others)

    monkeypatch.setattr(Decoder, "_loop_for", noted)
    for part in ("step", "window"):
        monkeypatch.setattr(f"arkv.decoding.{part}.compiled", lambda function, mode: function)
    assert main(command(listed, tmp_path / "out", "--compile", "inductor")) == 0
    assert shapes == [3, 3, 3, 3]
    assert len(lines_of(tmp_path / "out")) == 1 + 10


def test_layouts_of_the_command_are_those_there_are() -> None:
    for layout in LAYOUTS:
        parse(["generate", "--prompts-file", "x", "--out", "x", "--layout", layout])
    with pytest.raises(SystemExit):
        parse(["generate", "--prompts-file", "x", "--out", "x", "--layout", "round"])


def test_a_picture_that_could_not_be_drawn_is_told_and_no_success(
    model: Letters, listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    generate, bad = Decoder.generate, picture_seed(0, 4)

    def broken(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        if bad in seeds:
            raise NumericalError("not finite")
        return generate(self, prompts, seeds=seeds, **named)

    monkeypatch.setattr(Decoder, "generate", broken)
    assert main(command(listed, tmp_path / "out")) == 3
    out, err = capsys.readouterr()
    assert out.endswith("picture 4: not finite\n")
    assert err == "arkv: error: 1 of 10 pictures could not be drawn\n"
    assert len(list((tmp_path / "out").rglob("*.png"))) == 9


def test_a_list_and_a_prompt_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["generate", "--prompts-file", "x", "--prompt", "y", "--out", "x"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_list_ends_in_a_sheet_if_one_is_asked_for(model: Letters, listed: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    assert main(command(listed, tmp_path / "out", "--sheet", sheet)) == 0
    assert Image.open(sheet).width > 3 * 192


def test_guided_tokens_reach_the_decoder(model: Letters, tmp_path: Path) -> None:
    flags = ["generate", "--policy", "full", "--guidance", "3", "--prompt", "a b", "--quiet"]
    for name, more in {"all": [], "none": ["--guided-tokens", "0"]}.items():
        assert main([*flags, *more, "--out", str(tmp_path / f"{name}.png")]) == 0
    plain = arkv.Decoder(model, arkv.load_policy("full")).generate(["a b"], seeds=[0], guidance=1.0)
    unguided = Image.open(tmp_path / "none.png")
    assert unguided.tobytes() == plain.images[0].tobytes()
    assert unguided.tobytes() != Image.open(tmp_path / "all.png").tobytes()
    assert json.loads(unguided.text["settings"])["guided_tokens"] == 0
