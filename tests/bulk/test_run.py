"""`arkv run`: what a job's file may say, what goes wrong in a run, and that no trace of it is left."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from letters import install

from arkv.bulk import Description, overlap, read_description, run, signs, status
from arkv.bulk.lock import InUse
from arkv.bulk.signs import identity, is_alive
from arkv.cli import main
from arkv.decoder import Decoder
from arkv.errors import ArkvError, NumericalError, Terminated
from arkv.jobs.job import picture_seed
from arkv.jobs.recipe import Recipe

ARKV = "import sys; from arkv.cli import main; sys.exit(main())"
RECIPE = Recipe(model="letters", policy="window:ratio=1/2")
PROMPTS = [f"{a} {b}" for a in "abcde" for b in "fgh"] + ["a b c", "d"]


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model `letters`, here and in processes that are started from here."""
    path = install(tmp_path / "site")
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.syspath_prepend(path.split(os.pathsep)[0])


@pytest.fixture
def described(tmp_path: Path) -> Description:
    (tmp_path / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    return Description(
        prompts=str(tmp_path / "prompts.txt"),
        out=str(tmp_path / "out"),
        recipe=RECIPE,
        samples=2,
        batch_size=4,
    )


def write(described: Description, path: Path, **more: Any) -> Path:
    values = {**described.values(), **more}
    path.write_text("".join(f"{name}: {json.dumps(v)}\n" for name, v in values.items() if v is not None))
    return path


def pictures(out: Path) -> dict[str, bytes]:
    """Everything that was drawn."""
    return {
        path.relative_to(out).as_posix(): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.suffix != ".jsonl"
    }


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "index.jsonl").read_text().splitlines()][1:]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


@pytest.fixture
def whole(described: Description, tmp_path: Path) -> dict[str, bytes]:
    """What a run draws that nothing disturbs."""
    run(replaced(described, out=str(tmp_path / "undisturbed")))
    return pictures(tmp_path / "undisturbed")


def replaced(described: Description, **changes: Any) -> Description:
    return Description.from_values({**described.values(), **changes})


def test_a_job_draws_its_pictures_and_tells_of_it(
    described: Description, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, job = tmp_path / "out", write(described, tmp_path / "job.yaml")
    assert main(["run", str(job), "--quiet"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{out}: 34 of 34 pictures in ")
    assert [row["pictures"] for row in rows(out)] == [[number] for number in range(34)]
    for row in rows(out):
        content = (out / row["file"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (row["bytes"], row["sha256"])
    assert sum(batch["pictures"] for batch in events(out, "batch")) == 34
    (end,) = events(out, "end")
    assert (end["pictures"], end["tokens"], end["failed"]) == (34, 34 * 24, 0)
    assert main(["run", str(job), "--status"]) == 0
    assert "34 of 34 pictures (100%)" in capsys.readouterr().out


def test_pictures_depend_neither_on_the_batch_size_nor_on_the_layout(
    described: Description, whole: dict[str, bytes], tmp_path: Path
) -> None:
    run(replaced(described, batch_size=7))
    assert pictures(tmp_path / "out") == whole
    other = tmp_path / "tar"
    run(replaced(described, out=str(other), layout="webdataset"))
    subprocess.run(["tar", "xf", other / "000000.tar", "-C", tmp_path], check=True)
    from PIL import Image

    for name in whole:
        there = Image.open(tmp_path / f"000{name}")
        assert there.tobytes() == Image.open(tmp_path / "undisturbed" / name).tobytes()


def test_a_folder_that_was_begun_is_not_overwritten(described: Description, tmp_path: Path) -> None:
    run(described)
    with pytest.raises(ArkvError, match="go on with --resume"):
        run(described)
    assert run(described, resume=True).pictures == 0
    with pytest.raises(ArkvError, match=r"guidance is 1\.5 there and 3\.0 here"):
        run(replaced(described, guidance=3.0), resume=True)


def test_what_was_damaged_deleted_or_cut_is_drawn_again(
    described: Description, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(described)
    index = (out / "index.jsonl").read_bytes()
    (out / "000003.png").unlink()
    (out / "000007.png").write_bytes(b"x" * len(whole["000007.png"]))
    (out / "000020.png").write_bytes(whole["000020.png"][:-1])
    assert run(described, resume=True).pictures == 3
    assert pictures(out) == whole
    assert (out / "index.jsonl").read_bytes() == index
    assert {line["file"] for line in events(out, "damaged")} == {"000003.png", "000007.png", "000020.png"}


def test_what_a_group_that_was_killed_has_left_is_deleted_by_the_next_run(
    described: Description, whole: dict[str, bytes], tmp_path: Path
) -> None:
    """Whatever the next run has to draw, and whichever engine draws it; nothing else goes."""
    out = tmp_path / "out"
    run(described)
    left = (out / signs.JOB, signs.sign_of(out, 1), signs.sign_of(out, 12), out / ".worker-mine")
    for file in left:
        file.write_text("left")
    assert run(described, resume=True).pictures == 0
    assert pictures(out) == whole | {".worker-mine": b"left"}


@pytest.mark.parametrize("layout", ["flat", "dpg", "webdataset"])
def test_a_bad_prompt_is_listed_and_the_others_are_drawn(
    layout: str, described: Description, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = [*PROMPTS[:5], "A", *PROMPTS[5:], "b B"]
    if layout == "dpg":
        (tmp_path / "prompts").mkdir()
        for number, prompt in enumerate(bad):
            (tmp_path / f"prompts/{number:02d}.txt").write_text(prompt)
        described = replaced(described, prompts=str(tmp_path / "prompts"))
    else:
        Path(described.prompts).write_text("".join(f"{prompt}\n" for prompt in bad))
    out, job = tmp_path / "out", write(described, tmp_path / "job.yaml", layout=layout)
    assert main(["run", str(job), "--quiet"]) == 3
    told = capsys.readouterr().out
    assert "34 of 38 pictures in " in told
    assert "; 4 could not be drawn\n" in told
    assert "the prompt is 'A': expected letters" in told
    failed = {int(number) for row in rows(out) for number in row.get("failed", {})}
    assert failed == ({10, 11, 36, 37} if layout == "dpg" else {5, 24, 18, 37})
    assert {line["picture"] for line in events(out, "failed")} == failed
    assert len(pictures(out)) == {"flat": 34, "dpg": 17, "webdataset": 1}[layout]
    state = pictures(out)
    assert run(read_description(job), resume=True).pictures == 0, "nothing is tried again"
    assert pictures(out) == state


def test_a_picture_whose_numbers_fail_is_found_in_its_batch(
    described: Description, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = Decoder.generate

    def broken(self: Decoder, prompts: Any, **named: Any) -> Any:
        if "c g" in prompts:
            raise NumericalError("not finite")
        return generate(self, prompts, **named)

    monkeypatch.setattr(Decoder, "generate", broken)
    summary = run(described)
    lost = [number for number in range(34) if PROMPTS[number % 17] == "c g"]
    assert summary.failed == dict.fromkeys(lost, "not finite")
    assert pictures(tmp_path / "out") == {
        name: content for name, content in whole.items() if int(name[:6]) not in lost
    }


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
)
def test_a_batch_that_does_not_fit_is_halved_for_good(
    error: Exception,
    described: Description,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generate, tried = Decoder.generate, []

    def short(self: Decoder, prompts: Any, **named: Any) -> Any:
        tried.append(len(prompts))
        if len(prompts) > 3:
            raise error
        return generate(self, prompts, **named)

    monkeypatch.setattr(Decoder, "generate", short)
    run(replaced(described, batch_size=8))
    assert pictures(tmp_path / "out") == whole
    assert tried[:3] == [8, 4, 2]
    assert max(tried[3:]) == 2
    assert [line["batch_size"] for line in events(tmp_path / "out", "out of memory")] == [4, 2]


def test_one_picture_that_does_not_fit_ends_the_run(
    described: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(self: Decoder, prompts: Any, **named: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(Decoder, "generate", short)
    with pytest.raises(MemoryError):
        run(described)


def test_two_runs_do_not_share_a_folder(described: Description, tmp_path: Path) -> None:
    with InUse(tmp_path / "out"), pytest.raises(ArkvError, match="another run is drawing into"):
        run(described)
    assert not (tmp_path / "out").exists()
    run(described)


def test_a_file_of_several_pictures_that_lacks_one_is_not_written(
    described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, seed = Decoder.generate, picture_seed(0, 5)

    def broken(self: Decoder, prompts: Any, *, seeds: Any, **named: Any) -> Any:
        if seed in seeds:
            raise NumericalError("not finite")
        return generate(self, prompts, seeds=seeds, **named)

    (tmp_path / "prompts").mkdir()
    for number in range(4):
        (tmp_path / f"prompts/{number}.txt").write_text("a b")
    described = replaced(described, prompts=str(tmp_path / "prompts"), layout="dpg")
    run(described)
    (tmp_path / "out/2.png").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", broken)
        summary = run(described, resume=True)
    assert summary.failed == {4: "another picture of its file could not be drawn", 5: "not finite"}
    assert (summary.pictures, sorted(pictures(tmp_path / "out"))) == (0, ["0.png", "1.png", "3.png"])
    assert str(summary) == "6 of 8 pictures were there; 2 could not be drawn"
    assert (status(tmp_path / "out").done, status(tmp_path / "out").failed) == (6, 2)


def test_energy_is_what_the_gpus_used_meanwhile(
    described: Description, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended, used = [], [], iter([1000, 2000, 61000, 4000])
    fake = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: begun.append(1),
        nvmlShutdown=lambda: ended.append(1),
        nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda _: next(used) if not ended else pytest.fail("too late"),
    )
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    summary = run(described)
    assert summary.joules == 62.0
    assert "1.8 J a picture" in str(summary)
    assert begun == ended == [1]
    assert events(tmp_path / "out", "end")[0]["joules"] == 62.0


ENGINES = {
    "more workers than one": ({"workers": 8}, "the engine in-process is one"),
    "no workers": ({"workers": 0, "engine": "torchrun"}, "workers is 0"),
    "one device for all": ({"device": "cuda:1", "engine": "torchrun"}, "deals out devices"),
    "automatic batches": ({"batch_size": "auto", "engine": "torchrun"}, "the same for all workers"),
    "too few GPUs": (
        {"workers": 9, "engine": "torchrun", "device": "cuda"},
        "workers is 9, and this machine has",
    ),
}


@pytest.mark.parametrize(("changes", "complaint"), ENGINES.values(), ids=ENGINES)
def test_what_an_engine_cannot_do_is_refused(
    changes: dict[str, Any], complaint: str, described: Description, tmp_path: Path
) -> None:
    with pytest.raises(ArkvError, match=complaint):
        run(replaced(described, **changes))


def test_automatic_batches_pass_over_what_cannot_be_drawn(described: Description, tmp_path: Path) -> None:
    Path(described.prompts).write_text("a b\nA b c d e\n")
    summary = run(replaced(described, batch_size="auto", samples=3))
    assert (summary.pictures, len(summary.failed)) == (3, 3)
    (batch,) = events(tmp_path / "out", "batch")
    assert batch["pictures"] == 3, "samples of a prompt share a batch"


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals")
def test_sigterm_ends_a_run_that_goes_on_later(
    described: Description, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate, calls = Decoder.generate, []

    def told_to_end(self: Decoder, prompts: Any, **named: Any) -> Any:
        calls.append(len(prompts))
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, prompts, **named)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "generate", told_to_end)
        with pytest.raises(Terminated):
            run(described)
    assert signal.getsignal(signal.SIGTERM) is before
    out = tmp_path / "out"
    (stopped,) = events(out, "stopped")
    assert stopped["kind"] == "Terminated"
    now = status(out)
    assert (now.done, now.pictures, now.running) == (8, 34, False)
    assert "8 of 34 pictures (24%)" in str(now)
    assert "go on with --resume" in str(now)
    assert run(described, resume=True).pictures == 26
    assert pictures(out) == whole


BAD = {
    "no prompts": ("out: x", "lacks 'prompts'"),
    "no folder": ("prompts: x", "lacks 'out'"),
    "unknown": ("prompts: x\nout: y\npolcy: full", "unknown name in .* 'polcy'; did you mean policy"),
    "a text for a number": (
        "prompts: x\nout: y\nsamples: four",
        "samples is 'four' in .*: expected a whole number",
    ),
    "a size": ("prompts: x\nout: y\nsize: 512", "size is 512"),
    "half a size": ("prompts: x\nout: y\nsize: 512x", "size is .512x. .* a width and a height"),
    "an engine": ("prompts: x\nout: y\nengine: rey", "engine is 'rey' .* 'in-process', 'torchrun' or 'ray'"),
    "no YAML": ("prompts: [", "is not YAML"),
    "a list": ("- prompts", "no names with values"),
}


@pytest.mark.parametrize(("content", "complaint"), BAD.values(), ids=BAD)
def test_a_bad_job_is_one_line(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(content)
    with pytest.raises(ArkvError, match=complaint) as caught:
        read_description(path)
    assert "\n" not in str(caught.value)


def test_a_job_says_what_the_flags_of_generate_say(described: Description, tmp_path: Path) -> None:
    """The same job from both sides fits into one folder."""
    flags = ["--model", "letters", "--policy", "window:ratio=1/2", "--samples", "2", "--batch-size", "4"]
    out = tmp_path / "out"
    command = ["generate", *flags, "--prompts-file", described.prompts, "--out", str(out), "--quiet"]
    assert main(command) == 0
    assert not (out / "log.jsonl").exists()
    assert run(described, resume=True).pictures == 0


def test_two_workers_draw_what_one_does(
    described: Description, whole: dict[str, bytes], tmp_path: Path
) -> None:
    summary = run(replaced(described, engine="torchrun", workers=2))
    out = tmp_path / "out"
    assert pictures(out) == whole
    assert summary.pictures == 34
    assert [path.name for path in out.glob("index*")] == ["index.jsonl"]
    assert {line["worker"] for line in events(out, "batch")} == {1, 2}
    assert rows(out) == rows(tmp_path / "undisturbed")
    # Of deleted files the index has the lines already, and workers have to be heard of all the same.
    for name in ("000003.png", "000020.png", "000033.png"):
        (out / name).unlink()
    assert run(replaced(described, engine="torchrun", workers=2), resume=True).pictures == 3
    assert pictures(out) == whole
    assert rows(out) == rows(tmp_path / "undisturbed")


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes there")
def test_workers_end_with_their_driver_and_a_resumed_run_ends_well(
    described: Description, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    job = write(described, tmp_path / "job.yaml", engine="torchrun", workers=1, batch_size=1)
    command = [sys.executable, "-c", ARKV, "run", str(job), "--quiet"]
    process = subprocess.Popen(command)
    assert gone_within(120, lambda: out.exists() and len(list(out.glob("*.png"))) > 2)
    process.kill()
    process.wait()
    assert gone_within(10, lambda: not list(workers_of(tmp_path)))
    drawn = len(list(out.glob("*.png")))
    assert drawn < 34
    # The last one may have been written without its row.
    assert status(out).done in (drawn - 1, drawn)
    subprocess.run([*command, "--resume"], check=True)
    assert pictures(out) == whole
    assert rows(out) == rows(tmp_path / "undisturbed")


def test_what_the_workers_cannot_do_is_said(described: Description, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    values = {"engine": "torchrun", "workers": 1, "layout": "flat", "model": "letters"}
    job = replaced(described, **values)
    path = tmp_path / "site/letters-1.0.dist-info/entry_points.txt"
    with pytest.MonkeyPatch.context() as patch:
        # The launcher finds its model, the workers do not.
        patch.setenv("PYTHONPATH", str(Path(path).parents[3] / "nowhere"))
        with pytest.raises(ArkvError, match="34 of 34 files are missing: unknown model 'letters'"):
            run(job)
    reasons = [line["reason"] for line in events(tmp_path / "out", "stopped")]
    assert any("unknown model 'letters'" in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("ray", "told"),
    [
        (None, r"needs Ray: pip install 'arkv\[ray\]'"),
        (types.SimpleNamespace(__version__="2.9.3"), r"needs Ray 2\.60 or newer, and this is 2\.9\.3: pip"),
    ],
    ids=["none", "old"],
)
def test_without_ray_or_with_an_old_one_it_is_said_what_to_install(
    ray: object, told: str, described: Description, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ArkvError, match=told):
        run(replaced(described, engine="ray"))


@pytest.mark.slow
@pytest.mark.parametrize(("pixel_workers", "overlaps"), [(0, False), (0, True), (1, False)])
def test_actors_draw_what_one_process_does(
    pixel_workers: int,
    overlaps: bool,
    described: Description,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without an actor that is killed, and with one."""
    ray = pytest.importorskip("ray")
    if overlaps:
        monkeypatch.setattr(overlap, "OVERLAPPING", frozenset({"cpu"}))
    described = replaced(described, engine="ray", workers=2, pixel_workers=pixel_workers, batch_size=2)
    out = tmp_path / "out"
    assert run(described).pictures == 34
    assert pictures(out) == whole
    assert rows(out) == rows(tmp_path / "undisturbed")
    assert sum(line["pictures"] for line in events(out, "batch")) == 34
    for name in list(whole)[::2]:
        (out / name).unlink()
    killed: list[int] = []
    last_stage = b"MapBatches(DevelopActor" if pixel_workers else b"MapBatches(DrawActor"

    def kill_one() -> None:
        while not killed and (not out.exists() or len(list(out.glob("*.png"))) < 19):
            time.sleep(0.01)
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and last_stage in command_of(process):
                killed.append(int(process.name))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    run(described, resume=True)
    assert killed
    assert pictures(out) == whole
    assert not ray.is_initialized()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["DrawActor", "DevelopActor"])
def test_an_actor_that_hangs_is_noticed_and_replaced(
    stage: str,
    described: Description,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(signs, "SILENCE", 3.0)
    job = replaced(described, engine="ray", workers=1, pixel_workers=1, batch_size=1)
    out, stopped = tmp_path / "out", list[int]()

    def stop_one() -> None:
        while not out.exists() or len(list(out.glob("*.png"))) < 3:
            time.sleep(0.01)
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and f"MapBatches({stage}".encode() in command_of(process):
                stopped.append(int(process.name))
        os.kill(stopped[0], signal.SIGSTOP)

    threading.Thread(target=stop_one, daemon=True).start()
    run(job)
    assert stopped
    assert pictures(out) == whole


HANGING = """
import os, signal, sys, time
from arkv.bulk import signs
from arkv.bulk.watchdog import Watchdog

signs.HUNG = 1
dog = Watchdog(silence=0.8, least=0.2)
with dog.unit():
    pass
if sys.argv[1] == "stopped":
    os.kill(os.getpid(), signal.SIGSTOP)
elif sys.argv[1] == "a long unit":
    with dog.unit():
        time.sleep(20)
else:  # nothing to do is no reason to end
    time.sleep(2)
print("lived")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGSTOP")
@pytest.mark.parametrize(("how", "status"), [("stopped", -9), ("a long unit", -9), ("idle", 0)])
def test_a_process_that_hangs_is_ended_from_beside_it(how: str, status: int) -> None:
    ran = subprocess.run([sys.executable, "-c", HANGING, how], capture_output=True, timeout=60, check=False)
    assert ran.returncode == status, ran.stderr


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_driver_that_was_killed_is_gone_though_nobody_asks_for_its_status() -> None:
    driver = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    known = identity(driver.pid)
    assert is_alive(known)
    driver.kill()
    assert gone_within(10, lambda: not is_alive(known))
    assert Path(f"/proc/{driver.pid}").exists(), "nobody has asked so far"
    driver.communicate()
    assert not is_alive(known)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize("engine", ["in-process", "torchrun"])
def test_processes_that_are_killed_at_random_moments_leave_no_trace(
    engine: str,
    described: Description,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fifty kills: of the driver, and of a worker where there are some."""
    out = tmp_path / "out"
    rng, kills = random.Random(0), 0
    workers = 2 if engine == "torchrun" else None
    job = write(described, tmp_path / "job.yaml", engine=engine, workers=workers, batch_size=1)
    command = [sys.executable, "-c", ARKV, "run", str(job), "--resume", "--quiet"]
    while kills < 50:
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE)
        time.sleep(rng.uniform(2, 14 if engine == "torchrun" else 7))
        victims = [process.pid]
        if engine == "torchrun" and rng.random() < 0.5:
            victims = list(workers_of(tmp_path)) or victims
        if process.poll() is None:
            kills += 1
            victim = rng.choice(victims)
            os.kill(victim, signal.SIGKILL)
            if victim == process.pid:
                assert gone_within(10, lambda: not list(workers_of(tmp_path)))
            else:
                assert process.wait(120) == 0, "a worker that died was started again"
        else:
            assert process.returncode == 0, process.communicate()[1].decode()
        if len(rows_so_far(out)) == 34 and process.returncode == 0:
            for name in rng.sample(sorted(whole), 20):
                (out / name).unlink()
    subprocess.run(command, check=True)
    assert pictures(out) == whole
    assert rows(out) == rows(tmp_path / "undisturbed")


def rows_so_far(out: Path) -> list[dict[str, Any]]:
    return rows(out) if (out / "index.jsonl").exists() else []


def workers_of(place: Path) -> Iterator[int]:
    """Processes that torchrun has started for a run below a folder."""
    for process in Path("/proc").iterdir():
        command = command_of(process).split(b"\0") if process.name.isdigit() else []
        is_worker = b"arkv.bulk.torchrun" in command and b"torch.distributed.run" not in command
        if is_worker and command[-2].startswith(bytes(place)):
            yield int(process.name)


def command_of(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def gone_within(seconds: float, is_gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not is_gone():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True
