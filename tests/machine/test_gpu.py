"""Clock and gauge on a GPU."""

import time

import torch

from arkv.machine.instruments import Clock, PeakMemory

SIZE = 2**27


def test_gpu_the_clock_counts_the_devices_time_and_does_not_wait(device: torch.device) -> None:
    x = torch.ones(SIZE // 4, device=device)
    x.add_(1)
    clock = Clock(device)
    begun = time.perf_counter()
    clock.mark()
    for _ in range(20):
        x.add_(1)
    clock.mark()
    launched = time.perf_counter() - begun
    (seconds,) = clock.seconds()
    waited = time.perf_counter() - begun
    assert 0 < seconds <= waited
    if device.type == "cuda":
        assert launched < seconds


def test_gpu_the_gauge_sees_what_is_allocated_for_a_moment(device: torch.device) -> None:
    gauge = PeakMemory(device)
    x = torch.ones(SIZE, dtype=torch.uint8, device=device)
    del x
    rise = gauge.rise()
    if device.type == "cuda":
        assert rise == SIZE
    else:  # None: a container may not say
        assert rise is None or rise > SIZE / 2
