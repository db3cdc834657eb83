"""One launch of a Triton kernel: what it is given, so that it can be done, compiled or looked at."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: a function of `triton.jit`.
        grid: programs along three axes.
        arguments: of the kernel, by name.
        options: warps and stages.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    options: dict[str, int]


def launch_all(launches: Iterable[Launch], beside: Tensor) -> None:
    """Launch kernels one after the other on the device of a tensor; nothing waits for it."""
    with torch.cuda.device_of(beside):
        for launch in launches:
            launch.kernel[launch.grid](**launch.arguments, **launch.options)
