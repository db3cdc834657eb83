"""Clock and memory gauge."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from arkv.machine import instruments
from arkv.machine.instruments import Clock, PeakMemory, used_memory

CPU = torch.device("cpu")


def test_intervals_lie_between_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 4.0])
    monkeypatch.setattr(instruments.time, "perf_counter", lambda: next(times))
    clock = Clock(CPU)
    assert clock.seconds() == []
    for _ in range(3):
        clock.mark()
    assert clock.seconds() == [0.5, 2.5]


@pytest.mark.skipif(used_memory(CPU) is None, reason="the system does not say")
def test_a_peak_is_seen_after_it_is_over() -> None:
    size = 2**26
    gauge = PeakMemory(CPU)
    if gauge.rise() is None:
        pytest.skip("the system does not let processes forget their peak")
    before = used_memory(CPU)
    with mmap.mmap(-1, size) as pages:  # from the system: an allocator may have some to spare
        for start in range(0, size, mmap.PAGESIZE):
            pages[start] = 1
    rise, after = gauge.rise(), used_memory(CPU)
    assert rise is not None
    assert 0.9 * size < rise < 3 * size
    assert before is not None
    assert after is not None
    assert after - before < size / 2


def test_without_an_account_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instruments, "STATUS", tmp_path / "none")
    monkeypatch.setattr(instruments, "CLEAR", tmp_path / "no" / "folder")
    assert used_memory(CPU) is None
    assert PeakMemory(CPU).rise() is None
