"""How many threads a step takes beside other processes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv import Decoder
from arkv.attention import cpu
from arkv.machine import threads
from arkv.machine.threads import Threads
from arkv.testing import Tiny

TICKS = 100


class Machine:
    """Four cores of eight, of which other processes, and this one, work as long as is said."""

    def __init__(self, folder: Path) -> None:
        self.stat, self.cores = folder / "stat", {1, 2, 3, 5}
        self.now, self.own, self.worked, self.used = 100.0, 10.0, [0] * 8, list[int]()
        self.fitting = Threads(self.used.append)

    def work(
        self, others: float = 0.0, mine: float = 0.0, elsewhere: float = 0.0, seconds: float = 1.0
    ) -> None:
        self.now += seconds
        self.own += mine
        self.worked[2] += round((others + mine) * TICKS)
        self.worked[0] += round(elsewhere * TICKS)
        lines = [f"cpu {sum(self.worked)} 0 0 7 7 0 0 5 0 0"]
        for core, ticks in enumerate(self.worked):
            lines.append(f"cpu{core} {ticks} 1 1 {int(self.now)} 900 1 0 50 0 0")
        self.stat.write_text("\n".join([*lines, "intr 1 2 3"]))

    def step(self, **work: float) -> int:
        """Threads of a step, in which there is work."""
        self.used.clear()
        with self.fitting.fitted():
            self.work(**work)
        assert self.used[1:] in ([], [4])  # afterwards as many as before
        return self.used[0] if self.used else 4


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine(tmp_path)
    monkeypatch.setattr(threads, "PROC", tmp_path)
    monkeypatch.setattr(threads.time, "monotonic", lambda: made.now)
    monkeypatch.setattr(threads.time, "process_time", lambda: made.own)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: made.cores, raising=False)
    monkeypatch.setattr(threads.os, "sysconf", lambda _: TICKS)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    made.work()
    return made


def test_a_quiet_machine_is_used_whole(machine: Machine) -> None:
    assert machine.step(mine=4) == 4
    assert machine.step(others=0.3, mine=3.7) == 4
    assert machine.step() == 4


def test_cores_that_others_keep_busy_are_left_to_them(machine: Machine) -> None:
    assert machine.step(others=0.9, mine=3) == 4
    assert machine.step(others=2.1, mine=2) == 3
    assert machine.step(others=7) == 2
    assert machine.step() == 1
    assert machine.step() == 4


def test_what_others_do_on_cores_that_are_not_ours_is_nothing_to_us(machine: Machine) -> None:
    machine.step(elsewhere=3)
    assert machine.step() == 4


def test_there_is_a_look_after_half_a_second(machine: Machine) -> None:
    for _ in range(4):
        assert machine.step(others=0.125, seconds=0.125) == 4
    assert machine.step() == 3


def test_what_was_before_a_pause_is_forgotten(machine: Machine) -> None:
    machine.step(others=3)
    machine.work(others=300, seconds=100)
    assert machine.step() == 4


def test_fewer_threads_than_cores_are_not_made_fewer_without_need(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    machine.step(others=1.9)
    machine.step(others=3)
    assert machine.used == []
    with machine.fitting.fitted():
        assert machine.used == [1]
    assert machine.used == [1, 2]


def test_a_thread_that_is_bound_to_a_core_is_no_reason(machine: Machine) -> None:
    """As OpenMP binds the first of its threads where it is told to: the others have other cores."""
    machine.cores = {1}
    machine.step(others=1)
    assert machine.step() == 4


def test_an_error_changes_nothing_for_good(machine: Machine) -> None:
    machine.step(others=2)
    with pytest.raises(KeyError), machine.fitting.fitted():
        raise KeyError
    assert machine.used[-2:] == [2, 4]


@pytest.mark.parametrize("text", [None, "", "cpu1 what is this", "cpu1 1 2"])
def test_where_the_system_does_not_say_nothing_changes(machine: Machine, text: str | None) -> None:
    machine.step(others=3)
    if text is None:
        machine.stat.unlink()
    else:
        machine.stat.write_text(text)
    for fitting in (machine.fitting, Threads(machine.used.append)):
        machine.now += 5
        machine.used.clear()
        with fitting.fitted():
            machine.now += 1
        with fitting.fitted():
            assert machine.used == []


@pytest.mark.skipif(not cpu.load(), reason="there is no compiler for the kernel")
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("compile", ["none", "inductor"])
def test_a_step_that_is_not_compiled_has_as_many_threads_as_fit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, window: int, compile: Any
) -> None:
    monkeypatch.setattr(cpu, "use_threads", machine.used.append)
    for module in ("step", "window"):  # what compiling takes does not matter here
        monkeypatch.setattr(f"arkv.decoding.{module}.compiled", lambda part, _: part)
    expected = Decoder(Tiny(), "full", compile=compile).generate([(1, 2)], window=window).tokens
    assert machine.used == []
    model = Tiny()
    embed: Callable[..., torch.Tensor] = model.embed

    def busy(*given: torch.Tensor) -> torch.Tensor:
        machine.work(others=0.125, seconds=0.125)
        return embed(*given)

    monkeypatch.setattr(model, "embed", busy)
    got = Decoder(model, "full", compile=compile).generate([(1, 2)], window=window).tokens
    assert torch.equal(got, expected)
    assert machine.used == ([3, 4] * (len(machine.used) // 2) if compile == "none" else [])
    assert bool(machine.used) == (compile == "none")
