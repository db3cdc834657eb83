"""From arguments to an exit status: one line for whatever goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from saying import PROMPTS, arkv_says, picture_of

import arkv
from arkv.cli import main
from arkv.models.scenes.adapter import Scenes


def test_interrupt_is_quiet(
    tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tiny, "head", interrupt)
    flags = [*picture_of(PROMPTS[0]), "--out", str(tmp_path / "picture.png"), "--quiet"]
    assert main(["generate", *flags]) == 130
    assert capsys.readouterr().err == "arkv: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"arkv {arkv.__version__}\n"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        MemoryError(),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
    ],
)
def test_memory_that_runs_out_is_one_line(
    error: Exception,
    tiny: Scenes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tiny, "pixels", fail)
    out = tmp_path / "picture.png"
    complaint = arkv_says(capsys, "generate", *picture_of(PROMPTS[0]), "--out", out, "--quiet", status=1)
    assert complaint == "arkv: error: out of memory; take a smaller --batch-size or a smaller ratio\n"
    assert not list(tmp_path.iterdir())


UNEXPECTED = {
    "a file system's": OSError(5, "Input/output error", "weights.bin"),
    "without a number": OSError("cannot seek"),
    "a value's": ValueError("a fault\nof ours"),
    "a type's": TypeError("NoneType has no len()"),
    "recursion": RecursionError("maximum recursion depth exceeded"),
    "a key's": KeyError("model"),
    "no thread to be had": RuntimeError("can't start new thread"),
    "without a word": AssertionError(),
}


@pytest.mark.parametrize("error", UNEXPECTED.values(), ids=UNEXPECTED)
def test_what_nobody_expected_is_one_line_and_a_traceback_if_asked_for(
    error: Exception,
    tiny: Scenes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(tiny, "pixels", fail)
    flags = ["generate", *picture_of(PROMPTS[0]), "--out", tmp_path / "picture.png", "--quiet"]
    complaint = arkv_says(capsys, *flags, status=1)
    assert complaint.endswith("while running 'arkv generate'; ARKV_DEBUG=1 shows where\n")
    assert "out of memory" not in complaint
    monkeypatch.setenv("ARKV_DEBUG", "1")
    with pytest.raises(type(error)):
        main([str(flag) for flag in flags])


@pytest.mark.parametrize("closed", [False, True], ids=["none", "closed"])
@pytest.mark.parametrize("missing", ["stdout", "stderr"])
def test_without_a_console_nothing_is_missed(
    missing: str, closed: bool, tiny: Scenes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = open(os.devnull, "w") if closed else None  # noqa: SIM115
    if stream is not None:
        stream.close()
    monkeypatch.setattr(sys, missing, stream)
    assert main(["policies"]) == 0
    assert main(["generate", "--out", str(tmp_path / "x.jpg"), *picture_of("a")]) == 1
    assert main(["generate", "--out", str(tmp_path / "x.png"), *picture_of(PROMPTS[0])]) == 0
    assert getattr(sys, missing) is stream
    with pytest.raises(SystemExit):
        main(["--help"])
    with pytest.raises(SystemExit):
        main(["generat"])


@pytest.mark.parametrize("argument", ["ü", "\udcff", "三", "a\nb"])
def test_characters_that_the_console_does_not_have_are_no_traceback(argument: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "0"}
    for arguments in (["generate", "--policy", argument, "--prompt", argument, "--out", "x.png"], [argument]):
        done = subprocess.run(
            [sys.executable, "-m", "arkv.cli", *arguments], env=environment, capture_output=True
        )
        assert done.returncode in (1, 2)
        assert b"Traceback" not in done.stderr
        assert b"arkv: error: " in done.stderr


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


@pytest.mark.parametrize("command", ["policies", "--help"])
def test_a_reader_that_leaves_is_no_error(command: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "arkv.cli", command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=BUFFERED,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_cannot_be_written_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "arkv.cli", "--help"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=BUFFERED,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("arkv: error: cannot write to the standard output: ")
    assert done.stderr.count("\n") == 1


def test_help_and_its_errors_import_no_torch() -> None:
    code = (
        "import sys; from arkv.cli import generate, main; from dataclasses import replace; "
        "fail = lambda *_: (_ for _ in ()).throw(MemoryError()); "
        "generate.COMMAND = replace(generate.COMMAND, run=fail); "
        "assert main(['generate', '--prompt', 'x', '--out', 'x.png']) == 1; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "out of memory" in done.stderr


def test_a_warning_of_arkv_is_one_line(tmp_path: Path) -> None:
    """Where Python would show the place in the code, too."""
    (tmp_path / "p.txt").write_text("three red circles\n")
    torch.save({"x": torch.ones(1), "beside": Path("x")}, tmp_path / "w.pt")
    program = (
        "import sys, warnings; from arkv.cli import entry, parser; from arkv.weights.torch_files import *\n"
        "class Command: name, options = 'x', None\n"
        "Command.run = lambda *_: (read_tensors(sys.argv[1]), warnings.warn('theirs')) and 0\n"
        "from pathlib import Path; sys.argv[1] = Path(sys.argv[1])\n"
        "entry.parse = lambda _: Command\n"
        "sys.exit(entry.main([]))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "w.pt"], capture_output=True, text=True, check=True
    )
    first, second = ran.stderr.splitlines()[:2]
    assert first.startswith(f"arkv: warning: {tmp_path / 'w.pt'} has objects beside its tensors"), ran.stderr
    assert second.endswith("UserWarning: theirs"), "of others as it was"
