"""CUDA graphs of work that comes again and again with other numbers at the same addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make a CUDA device the current one: kernels, streams and graphs are those of the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class Replayed:
    """Runs work the first time that it comes, captures it the second, and replays it from then on.

    The first run is real work and is all the warming up that a capture needs: nothing is run only to be
    undone, which for a cache that evicts would have to mean a copy of all its state. Work reads and writes
    tensors that stay where they are; what it allocates besides is the graph's own and is overwritten by the
    next replay of any graph. Graphs are replayed one after the other, so they share their memory.

    First runs and captures are on one stream, which no other set of graphs has: libraries keep workspaces by
    stream, and one that another set's capture was given would be freed with it.

    Args:
        capture: whether to do so; else everything is simply run.
        device: of the work.

    Attributes:
        captures: whether it does so.
    """

    def __init__(self, capture: bool, device: torch.device) -> None:
        self.captures, self._device = capture, device
        self._known: dict[Hashable, Callable[[], None] | None] = {}
        # What a capture goes to; torch has a type for a pool, but no public name.
        self._stream: Any = torch.cuda.Stream(device) if capture else None
        self._pool: Any = torch.cuda.graph_pool_handle() if capture else None

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do a piece of work.

        Args:
            key: everything that decides which operations the work is made of; equal keys, equal operations.
            work: launches operations on the current CUDA stream and waits for none of them.
        """
        if not self.captures:
            work()
        elif key not in self._known:
            self._known[key] = None
            run_beside(work, self._stream)
        else:
            replay = self._known[key]
            if replay is None:
                replay = self._known[key] = captured(work, self._pool, self._stream)
            replay()


def run_beside(work: Callable[[], None], stream: Any) -> None:
    """Run on the stream of captures: libraries set themselves up once for each stream."""
    here = torch.cuda.current_stream(stream.device)
    stream.wait_stream(here)
    with torch.cuda.stream(stream):
        work()
    here.wait_stream(stream)


def captured(work: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """Record work, without doing it, as a graph.

    Returns:
        What does it.
    """
    graph = torch.cuda.CUDAGraph()
    # What other threads do on streams of their own, such as drawing pixels, is not part of it and may go on.
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph.replay


class Look:
    """Numbers on their way from the device: work may go on there before they are read.

    Args:
        x: of any shape, as it is after what has been launched so far.
    """

    def __init__(self, x: Tensor) -> None:
        self._arrived: Any = None
        if x.is_cuda:
            self._arriving = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self._arriving.copy_(x, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(x.device))
        else:
            self._arriving = x.clone()

    def read(self) -> Tensor:
        """The numbers, on the CPU; waits for them, and for nothing that was launched after them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._arriving
