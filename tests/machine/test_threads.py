"""How many threads a step takes beside other processes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arkv import Decoder
from arkv.machine import threads
from arkv.machine.threads import Threads
from arkv.testing import Tiny

TICKS = 100

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    """Four cores of eight, of which other processes, and this one, work a second long as much as is said."""
    now, own, worked = [100.0], [10.0], [0] * 8

    def told() -> None:
        lines = [f"cpu {sum(worked)} 0 0 7 7 0 0 5 0 0"]
        lines += [f"cpu{core} {ticks - 3} 1 1 {now[0]} 900 1 0 50 0 0" for core, ticks in enumerate(worked)]
        (tmp_path / "stat").write_text("\n".join([*lines, "intr 1 2 3"]).replace(".0", ""))

    def work(others: float = 0.0, mine: float = 0.0, elsewhere: float = 0.0, seconds: float = 1.0) -> None:
        now[0] += seconds
        own[0] += mine
        worked[2] += round((others + mine) * TICKS)
        worked[0] += round(elsewhere * TICKS)
        told()

    monkeypatch.setattr(threads, "PROC", tmp_path)
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threads.time, "process_time", lambda: own[0])
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {1, 2, 3, 5}, raising=False)
    monkeypatch.setattr(threads.os, "sysconf", lambda _: TICKS)
    # Setting the number for good would outlive the test.
    number = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: number[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: number.__setitem__(0, count))
    work()
    return work


def within(fitting: Threads) -> int:
    """Threads that work has."""
    with fitting.fitted():
        return torch.get_num_threads()


def test_a_quiet_machine_is_used_whole(machine: Machine) -> None:
    fitting = Threads(adapts=True)
    assert within(fitting) == 4
    machine(others=0.3, mine=3.9)
    assert within(fitting) == 4


def test_cores_that_others_keep_busy_are_left_to_them(machine: Machine) -> None:
    fitting = Threads(adapts=True)
    machine(others=0.9, mine=3)
    assert within(fitting) == 3
    machine(others=2.1, mine=2)
    assert within(fitting) == 2
    machine(others=7)
    assert within(fitting) == 1
    machine()
    assert within(fitting) == 4


def test_what_others_do_on_cores_that_are_not_ours_is_nothing_to_us(machine: Machine) -> None:
    fitting = Threads(adapts=True)
    machine(elsewhere=3)
    assert within(fitting) == 4


def test_there_is_no_new_look_within_half_a_second(machine: Machine) -> None:
    fitting = Threads(adapts=True)
    machine(others=0.4, seconds=0.4)
    assert within(fitting) == 4
    machine(others=0.2, seconds=0.2)
    assert within(fitting) == 3


def test_fewer_threads_than_cores_are_not_made_fewer_without_need(machine: Machine) -> None:
    torch.set_num_threads(2)
    fitting = Threads(adapts=True)
    machine(others=1.9)
    assert within(fitting) == 2
    machine(others=3)
    assert within(fitting) == 1
    assert torch.get_num_threads() == 2


def test_afterwards_there_are_as_many_as_before(machine: Machine) -> None:
    fitting = Threads(adapts=True)
    machine(others=2)
    assert within(fitting) == 2
    assert torch.get_num_threads() == 4
    with pytest.raises(KeyError), fitting.fitted():
        raise KeyError
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("text", [None, "", "cpu1 what is this", "cpu1 1 2"])
def test_where_the_system_does_not_say_nothing_changes(
    machine: Machine, tmp_path: Path, text: str | None
) -> None:
    fitting = Threads(adapts=True)
    machine(others=3)
    if text is None:
        (tmp_path / "stat").unlink()
    else:
        (tmp_path / "stat").write_text(text)
    assert within(fitting) == within(Threads(adapts=True)) == 4


@pytest.mark.parametrize("window", [1, 3])
def test_a_step_that_is_not_compiled_has_as_many_threads_as_fit(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    model, seen = Tiny(), []
    project = model.blocks[0].project

    def noted(*given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        seen.append(torch.get_num_threads())
        machine(others=0.1, seconds=0.1)
        return project(*given)

    monkeypatch.setattr(model.blocks[0], "project", noted)
    alone = Decoder(Tiny(), "full").generate([(1, 2)], window=window).tokens
    assert torch.equal(Decoder(model, "full").generate([(1, 2)], window=window).tokens, alone)
    assert seen[0] == 4
    assert seen[-1] == 3
    assert torch.get_num_threads() == 4
