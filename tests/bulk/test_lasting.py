"""What a run leaves can be taken up again, whatever happened: nothing is lost and nothing stale is left."""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import numpy
import pytest
import torch
from letters import install
from PIL import Image

from arkv import load_policy
from arkv.bulk import Description, run, signs, status, torchrun
from arkv.bulk.folder import Folder
from arkv.decoder import Decoder
from arkv.errors import ArkvError, ArkvWarning, NumericalError, Terminated
from arkv.jobs.job import MOST_PICTURES, picture_seed
from arkv.jobs.recipe import Recipe
from arkv.pictures import files as files_module

RECIPE = Recipe(model="letters", policy="window:ratio=1/2")


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site").split(os.pathsep)[0])


@pytest.fixture
def described(tmp_path: Path) -> Description:
    (tmp_path / "prompts.txt").write_text("a b\nc\nd e\nf g h\n")
    return Description(
        prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "out"), recipe=RECIPE, batch_size=3
    )


def changed(described: Description, **changes: Any) -> Description:
    return Description.from_values({**described.values(), **changes})


def contents(out: Path) -> dict[str, bytes]:
    """All files but the log, hidden ones too; when the index was begun is left out."""
    return {
        path.relative_to(out).as_posix(): re.sub(rb'"date": "[^"]*", ', b"", path.read_bytes(), count=1)
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name != "log.jsonl"
    }


def pictures(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(out).items() if not name.startswith("index")}


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Seeds that are drawn from now on."""
    generate, seen = Decoder.generate, list[int]()

    def noted(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        seen.extend(seeds)
        return generate(self, prompts, seeds=seeds, **named)

    monkeypatch.setattr(Decoder, "generate", noted)
    return seen


class TestIndex:
    """Lines of the index that cannot be read, and an index that is gone."""

    BAD: ClassVar = {
        "text": b"dear diary\n",
        "half a line in the middle": b'{"file": "000001.png", "pict\n',
        "zeros, as a power cut leaves them": b"\0" * 200 + b"\n",
        "no UTF-8": b'{"file": "\xff\xfe"}\n',
        "a list": b"[1]\n",
        "brackets without end": b"[" * 100_000 + b"\n",
        "a number of many digits": b'{"file": 1' + b"0" * 5000 + b"}\n",
    }

    @pytest.mark.parametrize("line", BAD.values(), ids=BAD)
    def test_a_line_that_cannot_be_read_is_set_aside_and_the_run_goes_on(
        self, line: bytes, described: Description
    ) -> None:
        out = Path(described.out)
        run(described)
        whole = contents(out)
        lines = whole["index.jsonl"].splitlines(keepends=True)
        (out / "index.jsonl").write_bytes(b"".join([*lines[:2], line, *lines[3:]]))
        with pytest.warns(
            ArkvWarning, match=r"1 line \(3\) cannot be read and is now in index.jsonl.set-aside"
        ):
            assert run(described, resume=True).pictures == 0, "the picture of the lost line is there"
        assert contents(out) == {**whole, "index.jsonl.set-aside": line}

    def test_half_a_last_line_is_normal(self, described: Description, recwarn: Any) -> None:
        out = Path(described.out)
        run(described)
        whole = contents(out)
        (out / "index.jsonl").write_bytes(whole["index.jsonl"][:-20])
        run(described, resume=True)
        assert contents(out) == whole
        assert not [each for each in recwarn if each.category is ArkvWarning]

    @pytest.mark.parametrize("layout", ["flat", "npz", "webdataset", "parquet", "dpg", "geneval"])
    @pytest.mark.parametrize(
        "header", [None, b"", b"\0\0\0\n", b'{"run": 3}\n'], ids=["gone", "empty", "0", "3"]
    )
    @pytest.mark.filterwarnings("ignore::arkv.errors.ArkvWarning")
    def test_without_an_index_pictures_are_taken_up_by_what_they_say_of_themselves(
        self, header: bytes | None, layout: str, described: Description, tmp_path: Path, drawn: list[int]
    ) -> None:
        if layout != "flat" and header is not None:
            pytest.skip("one layout shows it")
        if layout == "dpg":
            described = changed(described, prompts=str(folder_of_prompts(tmp_path)))
        if layout == "geneval":
            listed = tmp_path / "metadata.jsonl"
            listed.write_text("".join(json.dumps({"tag": "t", "prompt": text}) + "\n" for text in "abc"))
            described = changed(described, prompts=str(listed))
        out, described = Path(described.out), changed(described, layout=layout)
        run(described)
        whole = contents(out)
        rows = whole["index.jsonl"].splitlines(keepends=True)[1:]
        (out / "index.jsonl").unlink()
        if header is not None:
            (out / "index.jsonl").write_bytes(b"".join([header, *rows]) if header else b"")
        drawn.clear()
        assert run(described, resume=True).pictures == 0
        assert not drawn
        assert {**contents(out), "index.jsonl.set-aside": b""} == {**whole, "index.jsonl.set-aside": b""}

    def test_without_an_index_what_is_damaged_is_drawn_again_and_what_is_another_is_kept(
        self, described: Description
    ) -> None:
        out = Path(described.out)
        run(described)
        whole = contents(out)
        other = changed(described, out=f"{out}2", guidance=2.0)
        run(other)
        foreign = (Path(other.out) / "000001.png").read_bytes()
        (out / "index.jsonl").unlink()
        (out / "000000.png").write_bytes(whole["000000.png"][:-20])
        (out / "000001.png").write_bytes(foreign)
        (out / "000002.png").write_bytes(b"")
        with pytest.warns(ArkvWarning, match=r"1 file, such as 000001.png: each is not of this job"):
            assert run(described, resume=True).pictures == 3
        assert contents(out) == {**whole, ".000001.png.1.aside": foreign}

    def test_no_message_tells_anybody_to_delete_what_they_have(self) -> None:
        import arkv

        told = [
            path
            for path in Path(arkv.__file__).parent.rglob("*.py")
            if re.search(r"delete (the|this|that) (file|folder|index)", path.read_text())
        ]
        assert not told


def folder_of_prompts(tmp_path: Path) -> Path:
    folder = tmp_path / "prompts"
    folder.mkdir()
    for number, text in enumerate(("a b", "c", "d e")):
        (folder / f"{number}.txt").write_text(text)
    return folder


class TestArchive:
    """Whatever is made of all pictures is verified like them, and made again when one of them changes."""

    DAMAGE: ClassVar[dict[str, Callable[[bytes], bytes]]] = {
        "cut": lambda content: content[:-7],
        "empty": lambda content: b"",
        "zeros": lambda content: bytes(len(content)),
        "another byte": lambda content: content[:-100] + b"x" + content[-99:],
        "longer": lambda content: content + b"x",
    }

    @pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
    def test_is_verified(self, damage: Callable[[bytes], bytes], described: Description) -> None:
        described = changed(described, layout="npz")
        out = Path(described.out)
        run(described)
        whole = contents(out)
        (out / "samples.npz").write_bytes(damage(whole["samples.npz"]))
        run(described, resume=True)
        assert contents(out) == whole

    def test_is_made_again_after_a_picture_that_had_failed_is_there(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        described = changed(described, layout="npz")
        out = Path(described.out)
        with monkeypatch.context() as patch:
            fail(patch, picture_seed(0, 2))
            assert run(described).failed == {2: "not finite"}
        run(changed(described, npz_side=8), resume=True)
        assert len(numpy.load(out / "samples.npz")["arr_0"]) == 3
        assert not run(described, resume=True, retry_failed=True).failed
        assert not list(out.glob("samples-8.npz")) or len(numpy.load(out / "samples-8.npz")["arr_0"]) == 4
        stacked = numpy.stack([numpy.asarray(Image.open(out / f"{n:06d}.png")) for n in range(4)])
        numpy.testing.assert_array_equal(numpy.load(out / "samples.npz")["arr_0"], stacked)

    @pytest.mark.parametrize("content", [b"", b"{}", None], ids=["empty", "another", "gone"])
    def test_records_of_geneval_are_verified(
        self, content: bytes | None, described: Description, tmp_path: Path
    ) -> None:
        listed = tmp_path / "metadata.jsonl"
        listed.write_text("".join(json.dumps({"tag": "t", "prompt": text}) + "\n" for text in "ab"))
        described = changed(described, prompts=str(listed))
        out = Path(described.out)
        run(described)
        whole = contents(out)
        record = out / "00001/metadata.jsonl"
        record.unlink() if content is None else record.write_bytes(content)
        run(described, resume=True)
        assert contents(out) == whole


def fail(patch: pytest.MonkeyPatch, *bad: int) -> None:
    """Have pictures of some seeds fail."""
    generate = Decoder.generate

    def broken(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        if set(bad) & set(seeds):
            raise NumericalError("not finite")
        return generate(self, prompts, seeds=seeds, **named)

    patch.setattr(Decoder, "generate", broken)


class TestAccount:
    """What decides on a picture is compared by content, not by name."""

    def test_other_weights_under_the_same_name_are_refused(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run(described)
        before = contents(Path(described.out))
        load = Recipe.load_model

        def another(self: Recipe, device: str | None = None) -> Any:
            model = load(self, device)
            with torch.no_grad():
                next(model.parameters()).add_(1e-3)
            return model

        monkeypatch.setattr(Recipe, "load_model", another)
        with pytest.raises(ArkvError, match="begun with other settings: weights is"):
            run(described, resume=True)
        assert contents(Path(described.out)) == before

    def test_a_plug_in_that_was_changed_is_refused(self, described: Description, tmp_path: Path) -> None:
        source = plug_in(tmp_path / "site")
        described = changed(described, policy="mine:ratio=1/2")
        run(described)
        source.with_name("helpers.py").write_text("KEPT = 2\n")
        with pytest.raises(ArkvError, match="begun with other settings: policy_code is"):
            run(described, resume=True)

    def test_a_file_that_a_policy_reads_is_compared_by_content(self, tmp_path: Path) -> None:
        from arkv.jobs.fingerprint import code_and_files

        profile = tmp_path / "heads.npz"
        told = []
        for content in (b"one", b"two", b"one"):
            profile.write_bytes(content)
            told.append(code_and_files(load_policy("ssd", ratio="1/2", profile=str(profile))))
        assert told[0] == told[2] != told[1]

    def test_a_picture_that_is_another_when_drawn_again_is_told(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = Path(described.out)
        run(described)
        (out / "000001.png").unlink()
        (out / "000002.png").unlink()
        generate, other = Decoder.generate, picture_seed(0, 2)

        def unlike(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
            return generate(self, prompts, seeds=[s + (s == other) for s in seeds], **named)

        monkeypatch.setattr(Decoder, "generate", unlike)
        with pytest.warns(ArkvWarning, match=r"1 file drawn again and not the same as before \(000002.png\)"):
            summary = run(described, resume=True)
        assert summary.differing == ("000002.png",)
        assert [event["file"] for event in events(out, "differs")] == ["000002.png"]

    @pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
    def test_a_picture_that_cannot_be_read_is_left_and_told(
        self, number: int, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, opened = Path(described.out), os.open
        run(described)
        whole = contents(out)

        def broken(path: Any, *arguments: Any, **named: Any) -> int:
            if str(path).endswith("000001.png"):
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", broken)
            with pytest.warns(ArkvWarning, match=r"000001.png: each could not be read and was left as it is"):
                summary = run(described, resume=True)
        assert summary.unread == {"000001.png": os.strerror(number)}
        assert not summary.is_complete
        assert contents(out) == whole


def plug_in(site: Path) -> Path:
    """A package with a policy of its own; its source."""
    package, about = site / "mine", site / "mine-1.0.dist-info"
    package.mkdir()
    about.mkdir()
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text("KEPT = 1\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[arkv.policies]\nmine = mine.policy:Mine\n")
    (package / "policy.py").write_text(
        "from dataclasses import dataclass\n\nfrom arkv.policies.window import SlidingWindow\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Mine(SlidingWindow):\n    '''Mine.'''\n"
    )
    return package / "policy.py"


class TestExtension:
    """More prompts behind those of a job."""

    @pytest.mark.parametrize(("layout", "samples"), [("flat", 1), ("flat", 2), ("npz", 2), ("webdataset", 2)])
    def test_what_is_there_stays_and_what_is_new_is_drawn(
        self, layout: str, samples: int, described: Description, drawn: list[int]
    ) -> None:
        described = changed(described, layout=layout, samples=samples)
        out, listed = Path(described.out), Path(described.prompts)
        run(described)
        before = {name: content for name, content in pictures(out).items() if name != "samples.npz"}
        drawn.clear()
        listed.write_text(listed.read_text() + "a\na b c d e f\n")
        summary = run(described, resume=True)
        assert (summary.job, summary.pictures) == (6 * samples, 2 * samples)
        assert set(drawn) == {picture_seed(0, number) for number in range(4 * samples, 6 * samples)}
        assert before.items() <= pictures(out).items()
        if layout == "npz":
            assert len(numpy.load(out / "samples.npz")["arr_0"]) == 6 * samples
        assert str(status(out)).startswith(f"{6 * samples} of {6 * samples} pictures (100%)")
        listed.write_text(listed.read_text() + "h\n")
        assert run(described, resume=True).pictures == samples
        assert run(described, resume=True).pictures == 0
        assert before.items() <= pictures(out).items()

    @pytest.mark.parametrize(
        "lines", ["a b\nc\nx\nf g h\nnew\n", "a b\nc\nx\nf g h\n"], ids=["more", "as many"]
    )
    def test_a_changed_line_is_told(self, lines: str, described: Description) -> None:
        out, listed = Path(described.out), Path(described.prompts)
        run(described)
        before = contents(out)
        listed.write_text(lines)
        with pytest.raises(ArkvError, match=r"prompts.txt, line 3 was 'd e' and is 'x'; take another folder"):
            run(described, resume=True)
        assert contents(out) == before

    def test_a_line_that_is_gone_is_told(self, described: Description) -> None:
        run(described)
        Path(described.prompts).write_text("a b\nc\nd e\n")
        with pytest.raises(ArkvError, match=r"prompt 4 was 'f g h' and is gone"):
            run(described, resume=True)


class TestRun:
    """What else a run has to survive."""

    def test_failed_pictures_are_tried_again_if_asked_for(
        self, described: Description, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        undisturbed = changed(described, out=str(tmp_path / "undisturbed"))
        run(undisturbed)
        with monkeypatch.context() as patch:
            fail(patch, picture_seed(0, 1), picture_seed(0, 3))
            assert set(run(described).failed) == {1, 3}
        assert set(run(described, resume=True).failed) == {1, 3}
        summary = run(described, resume=True, retry_failed=True)
        assert (summary.pictures, summary.failed, summary.is_complete) == (2, {}, True)
        assert pictures(Path(described.out)) == pictures(Path(undisturbed.out))

    def test_a_decoder_that_is_loaded_draws_a_job(self, described: Description, tmp_path: Path) -> None:
        run(described)
        decoder = RECIPE.load_decoder()
        own = Description(prompts=described.prompts, out=str(tmp_path / "own"), batch_size=3)
        assert run(own, decoder=decoder).pictures == 4
        for number in range(4):
            mine, theirs = (Image.open(Path(each.out) / f"{number:06d}.png") for each in (own, described))
            assert mine.tobytes() == theirs.tobytes()
            assert mine.text["policy"] == theirs.text["policy"]
        with pytest.raises(ArkvError, match="recipe.model is given, and so is a decoder"):
            run(described, decoder=decoder, resume=True)
        with pytest.raises(ArkvError, match="the engine torchrun loads models of its own"):
            run(changed(own, engine="torchrun"), decoder=decoder, resume=True)

    @pytest.mark.parametrize(
        "values",
        [{"samples": 10**12}, {"samples": 10**400}, {"samples": MOST_PICTURES // 4 + 1}, {"seed": 2**64}],
        ids=str,
    )
    def test_numbers_beyond_all_bounds_are_refused_at_once(
        self, values: dict[str, int], described: Description
    ) -> None:
        with pytest.raises(ArkvError, match=r"room for 100000000|a whole number from") as caught:
            run(changed(described, **values))
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("count", ["1000000000000", "9" * 6000])
    def test_a_line_with_a_count_beyond_all_bounds_is_refused_at_once(
        self, count: str, described: Description
    ) -> None:
        Path(described.prompts).write_text(f"a\t{count}\n")
        with pytest.raises(ArkvError, match=r"line 1 .* at most 100,000,000") as caught:
            described.job()
        assert len(str(caught.value)) < 300

    def test_no_thread_to_be_had_is_no_obstacle(
        self, described: Description, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        run(changed(described, out=str(tmp_path / "undisturbed")))

        def start(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", start)
        monkeypatch.setattr("arkv.bulk.overlap.OVERLAPPING", frozenset({"cpu"}))
        run(described)
        assert pictures(Path(described.out)) == pictures(tmp_path / "undisturbed")

    @pytest.mark.parametrize("kind", ["none", "closed", "full", "gone"])
    def test_a_bar_that_cannot_be_shown_stops_nothing(
        self, kind: str, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken:
            encoding = "ascii"

            def write(self, text: str) -> int:
                raise OSError(errno.ENOSPC if kind == "full" else errno.EPIPE, "x")

            def flush(self) -> None:
                raise OSError(errno.EIO, "x")

        if kind == "none":
            monkeypatch.setattr(sys, "stderr", None)
        elif kind == "closed":
            stream = open(os.devnull, "w")  # noqa: SIM115
            stream.close()
            monkeypatch.setattr(sys, "stderr", stream)
        else:
            monkeypatch.setattr(sys, "stderr", Broken())
        assert run(described, progress=True).pictures == 4

    def test_names_of_a_written_folder_are_on_the_disk_too(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        if not Path("/proc/self/fd").exists():
            pytest.skip("looks there")
        monkeypatch.setattr(os, "fsync", noted)
        files_module.write_whole({tmp_path / "new" / "file": b"x"})
        part = str(tmp_path / "new" / ".file.part")
        assert synced.index(part) < synced.index(str(tmp_path / "new"))
        assert str(tmp_path) in synced, "the folder's own name"


class TestStatus:
    """Seen from outside, and whatever is there."""

    def test_deleted_pictures_are_not_done(self, described: Description) -> None:
        out = Path(described.out)
        run(described)
        (out / "000001.png").unlink()
        assert (status(out).done, status(out).pictures) == (3, 4)

    LOGS: ClassVar = {
        "a list": b"[1]\n",
        "no event": b"{}\n",
        "a time that is none": b'{"event": "begin", "time": "now"}\n',
        "a time that is a number": b'{"event": "batch", "time": 3, "pictures": 1}\n',
        "a time without a zone": b'{"event": "batch", "time": "2026-01-01T00:00:00", "pictures": 1}\n',
        "pictures that are a text": b'{"event": "batch", "time": "2026-01-01T00:00:00Z", "pictures": "x"}\n',
        "bytes": b"\xff\0\n",
        "brackets without end": b"[" * 100_000 + b"\n",
    }

    @pytest.mark.parametrize("where", ["before", "behind"])
    def test_garbage_in_the_log_is_passed_over(self, where: str, described: Description) -> None:
        out = Path(described.out)
        run(described)
        log = (out / "log.jsonl").read_bytes()
        for garbage in self.LOGS.values():
            (out / "log.jsonl").write_bytes(garbage + log if where == "before" else log + garbage)
            assert status(out).done == 4
            assert status(out).rate is not None

    def test_nothing_is_changed_and_nothing_has_to_be_writable(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, opened = Path(described.out), os.open
        run(described)
        before = contents(out)

        def read_only(path: Any, flags: int, *arguments: Any, **named: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                raise OSError(errno.EROFS, "Read-only file system", str(path))
            return opened(path, flags, *arguments, **named)

        monkeypatch.setattr(os, "open", read_only)
        assert (status(out).done, status(out).running) == (4, False)
        assert contents(out) == before

    def test_a_row_of_a_foreign_file_is_nobodys_picture(self, described: Description) -> None:
        out = Path(described.out)
        run(described)
        with (out / "index.jsonl").open("a") as index:
            for name in ("/etc/passwd", "../x", "x\0y", "x" * 10_000, "\ud800"):
                index.write(json.dumps({"file": name, "pictures": [7], "bytes": 1}) + "\n")
            index.write('{"file": 1}\n3\n')
        assert (status(out).done, status(out).failed) == (4, 0)


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes there")
class TestWorkers:
    """Processes that torchrun has started, in trouble."""

    @pytest.fixture
    def many(self, described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Description:
        monkeypatch.setenv("PYTHONPATH", install(tmp_path / "site2"))
        monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
        (tmp_path / "tmp").mkdir()
        Path(described.prompts).write_text("".join(f"{a} {b}\n" for a in "abcdef" for b in "ghij"))
        return changed(described, engine="torchrun", workers=2, batch_size=1)

    def test_the_folder_for_temporary_files_may_be_emptied(
        self, many: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, refresh, emptied = Path(many.out), Folder.refresh, []

        def emptying(self: Folder, others: Any) -> int:
            if not emptied and list(out.glob("*.png")):
                emptied.append(True)
                for path in (tmp_path / "tmp").iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                first = next(iter(workers_of(out)))
                os.kill(first, signal.SIGKILL)  # and is started again from what is left
            return refresh(self, others)

        monkeypatch.setattr(Folder, "refresh", emptying)
        run(many)
        assert emptied
        assert len(list(out.glob("*.png"))) == 24
        assert not [path for path in out.iterdir() if path.name.startswith(".")]

    @pytest.mark.slow
    def test_a_worker_that_is_stopped_is_noticed_and_replaced(
        self, many: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, refresh, stopped = Path(many.out), Folder.refresh, []
        monkeypatch.setattr(signs, "SILENCE", 6.0)

        def stopping(self: Folder, others: Any) -> int:
            if not stopped and list(out.glob("*.png")):
                stopped.extend(itertools.islice(workers_of(out), 1))
                os.kill(stopped[0], signal.SIGSTOP)
            return refresh(self, others)

        monkeypatch.setattr(Folder, "refresh", stopping)
        with pytest.warns(ArkvWarning, match="gave no sign of life"):
            run(many)
        assert len(list(out.glob("*.png"))) == 24

    def test_sigterm_acts_within_seconds_even_if_a_worker_is_stopped(
        self, many: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, refresh, told = Path(many.out), Folder.refresh, list[float]()

        def ending(self: Folder, others: Any) -> int:
            if not told and list(out.glob("*.png")):
                os.kill(next(iter(workers_of(out))), signal.SIGSTOP)
                told.append(time.monotonic())
                os.kill(os.getpid(), signal.SIGTERM)
            return refresh(self, others)

        monkeypatch.setattr(Folder, "refresh", ending)
        with pytest.raises(Terminated):
            run(many)
        assert time.monotonic() - told[0] < 15
        assert not list(workers_of(out))


def workers_of(out: Path) -> Iterator[int]:
    """Processes that torchrun has started for a folder."""
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):
            command = (process / "cmdline").read_bytes().split(b"\0")
            if b"torch.distributed.run" not in command and os.fsencode(out / torchrun.JOB) in command:
                yield int(process.name)
