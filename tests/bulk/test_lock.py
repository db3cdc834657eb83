"""One run a folder, or one group of workers, with locks of the system and without."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from arkv.bulk import lock as lock_module
from arkv.bulk.lock import HOLDER, InUse, is_in_use
from arkv.errors import ArkvError

fcntl = pytest.importorskip("fcntl")

REFUSED = [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL]


@pytest.fixture(
    params=[None, *REFUSED], ids=lambda number: "flock" if number is None else errno.errorcode[number]
)
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """File systems with locks, and without them in several ways."""
    monkeypatch.setattr(lock_module, "PATIENCE", 0.2)
    monkeypatch.setattr(lock_module, "BEAT", 0.1)
    monkeypatch.setattr(lock_module, "SILENCE", 0.6)
    if request.param is not None:

        def flock(descriptor: int, kind: int) -> None:
            raise OSError(request.param, os.strerror(request.param))

        monkeypatch.setattr(fcntl, "flock", flock)
    return request.param


def test_one_run_at_a_time(locks: int | None, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with InUse(out):
        for _ in range(2):
            with pytest.raises(ArkvError, match="another run is drawing into"):
                InUse(out)
        assert is_in_use(out)
    assert not out.exists()
    out.mkdir()
    with InUse(out):
        pass
    assert not list(out.iterdir())
    assert is_in_use(out) is False


def test_workers_of_one_group_share_a_folder_and_another_group_stays_out(
    locks: int | None, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first, second = InUse(out, "one"), InUse(out, "one")
    with pytest.raises(ArkvError, match="another run is drawing into"):
        InUse(out, "two")
    first.release()
    with pytest.raises(ArkvError, match="another run is drawing into"):
        InUse(out)
    second.release()
    time.sleep(0.3)
    InUse(out, "two").release()
    InUse(out).release()


def test_a_driver_lets_its_own_workers_in(locks: int | None, tmp_path: Path) -> None:
    with InUse(tmp_path / "out") as held:
        held.hold("mine")
        with InUse(tmp_path / "out", "mine"):
            pass
        with pytest.raises(ArkvError, match="another run"):
            InUse(tmp_path / "out", "theirs")
        held.hold()
        with pytest.raises(ArkvError, match="another run"):
            InUse(tmp_path / "out", "mine")


def test_of_many_that_begin_at_once_one_gets_in(locks: int | None, tmp_path: Path) -> None:
    held: list[InUse] = []
    refused: list[str] = []
    start = threading.Barrier(6)

    def begin() -> None:
        start.wait()
        try:
            held.append(InUse(tmp_path))
        except ArkvError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(refused)) == (1, 5)
    held[0].release()


class TestWithoutLocks:
    """The file that says who is in, on file systems that have no locks."""

    @pytest.fixture(autouse=True)
    def without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(descriptor: int, kind: int) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", flock)
        monkeypatch.setattr(lock_module, "BEAT", 0.1)
        monkeypatch.setattr(lock_module, "SILENCE", 0.6)

    @pytest.mark.parametrize("asked", [True, False])
    def test_whoever_was_killed_here_is_known_to_be_gone(self, asked: bool, tmp_path: Path) -> None:
        """Also if nobody has asked for its status."""
        code = (
            "import fcntl, os, sys\n"
            "def flock(*_): raise OSError(37, 'x')\n"
            "fcntl.flock = flock\n"
            "from pathlib import Path\n"
            "from arkv.bulk.lock import InUse\n"
            "InUse(Path(sys.argv[1])); print('in', flush=True); os.kill(os.getpid(), 9)\n"
        )
        command = [sys.executable, "-c", code, tmp_path]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as held:
            assert held.stdout is not None
            assert held.stderr is not None
            said, complained = held.stdout.read(), held.stderr.read()
            os.waitid(os.P_PID, held.pid, os.WEXITED | os.WNOWAIT)  # its pipes close before it has ended
            if asked:
                held.wait()
            assert said == "in\n", complained
            assert (tmp_path / HOLDER).exists()
            InUse(tmp_path).release()

    def test_somebody_who_is_about_to_end_is_waited_for(self, tmp_path: Path) -> None:
        """As the system's own locks are: a process that was killed gives its memory back first."""
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
            said = {**lock_module._myself(), **lock_module._process(other.pid), "group": None}
            (tmp_path / HOLDER).write_text(json.dumps(said))
            with pytest.raises(ArkvError, match="another run"):
                InUse(tmp_path)
            killed = threading.Timer(0.2, other.kill)
            killed.start()
            InUse(tmp_path).release()
            killed.join()

    @pytest.mark.parametrize("changes", [{"host": "elsewhere"}, {"numbers": "pid:[1]"}], ids=str)
    def test_somebody_on_another_machine_counts_as_long_as_there_are_signs(
        self, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        said = {**lock_module._myself(), "pid": 2**22 + 1, "group": None, **changes}
        (tmp_path / HOLDER).write_text(json.dumps(said))
        with touching(tmp_path / HOLDER), pytest.raises(ArkvError, match="another run"):
            InUse(tmp_path)
        assert json.loads((tmp_path / HOLDER).read_text()) == said
        InUse(tmp_path).release()
        assert not list(tmp_path.iterdir())

    def test_a_machine_that_was_started_again_has_nobody_in(self, tmp_path: Path) -> None:
        said = {"host": socket.gethostname(), "boot": "before", "pid": os.getpid(), "group": None}
        (tmp_path / HOLDER).write_text(json.dumps(said))
        with touching(tmp_path / HOLDER):
            InUse(tmp_path).release()

    @pytest.mark.parametrize("content", [b"", b"[1]", b"\0\0", b"[" * 10_000], ids=str)
    def test_half_a_holder_holds_nothing_for_long(self, content: bytes, tmp_path: Path) -> None:
        (tmp_path / HOLDER).write_bytes(content[:100])
        InUse(tmp_path).release()

    def test_a_planted_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / HOLDER).symlink_to(tmp_path / "thesis.tex")
        with pytest.raises(ArkvError, match="symbolic link"):
            InUse(tmp_path / "out")
        assert (tmp_path / "thesis.tex").read_text() == "years of work"


@contextmanager
def touching(path: Path) -> Iterator[None]:
    """Signs of life, as somebody else gives them."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.05):
            if path.exists():
                os.utime(path)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
