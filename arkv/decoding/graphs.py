"""CUDA graphs of work that comes again and again with other numbers at the same addresses."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Replayed:
    """Runs work the first time that it comes, captures it the second, and replays it from then on.

    The first run is real work and is all the warming up that a capture needs: nothing is run only to be
    undone, which for a cache that evicts would have to mean a copy of all its state. Work reads and writes
    tensors that stay where they are; what it allocates besides is the graph's own and is overwritten by the
    next replay of any graph. Graphs are replayed one after the other, so they share their memory.

    Args:
        capture: whether to do so; else everything is simply run.

    Attributes:
        captures: whether it does so.
    """

    def __init__(self, capture: bool) -> None:
        self.captures = capture
        self._known: dict[Hashable, Callable[[], None] | None] = {}
        self._pool: Any = None  # torch has a type for it, but no public name

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
            run_beside(work)
        else:
            replay = self._known[key]
            if replay is None:
                if self._pool is None:
                    self._pool = torch.cuda.graph_pool_handle()
                replay = self._known[key] = captured(work, self._pool)
            replay()


def run_beside(work: Callable[[], None]) -> None:
    """Run on a stream of its own, as captures do: libraries set themselves up once for each stream."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        work()
    torch.cuda.current_stream().wait_stream(beside)


def captured(work: Callable[[], None], pool: Any) -> Callable[[], None]:
    """Record work, without doing it, as a graph.

    Returns:
        What does it.
    """
    graph = torch.cuda.CUDAGraph()
    # What other threads do on streams of their own, such as drawing pixels, is not part of it and may go on.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        work()
    return graph.replay
