"""Lines that are captured and replayed, on a tape that stands in for a CUDA graph.

A tape keeps what a graph keeps: the operations, and the addresses that they read and write. Numbers that
Python held while they were recorded stay as they were, and whoever asks for a number on the host is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import GRID, POLICIES, Tiny, build, tight
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from arkv import ArkvError, CachePolicy, Decoder, Grid
from arkv.decoding import graphs
from arkv.decoding import step as step_module
from arkv.decoding import window as window_module
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.speed import engine as engine_module
from arkv.speed.engine import PolicyEngine
from arkv.speed.timing import WHOLE, decode

PROMPTS = [(1, 2, 3), (4,)]


class Tape(TorchDispatchMode):
    """Writes down every operation while it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a number was asked for while a graph was captured")
        out = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, out))
        return out

    def play(self) -> None:
        """Do it all again at the same addresses."""
        for func, args, kwargs, out in self.operations:
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            views = all(
                t.untyped_storage()._cdata in given for t in tree_leaves(out) if isinstance(t, Tensor)
            )
            if views and not func._schema.is_mutable:
                continue  # a view is where it was
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Tapes instead of CUDA graphs, and no compiler."""
    made: list[Tape] = []

    def captured(work: Callable[[], None], pool: object, stream: object) -> Callable[[], None]:
        tape = Tape()
        with tape:
            work()
        made.append(tape)
        played = iter([False])  # what was recorded was done as well: that was the first time
        return lambda: tape.play() if next(played, True) else None

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "run_beside", lambda work, stream: work())
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    for module in (step_module, window_module):
        monkeypatch.setattr(module, "compiled", lambda function, mode: function)
    return made


@torch.inference_mode()
def pictures(
    model: Tiny, policy: CachePolicy, captured: bool, runs: list[Sampling], window: int = 1, lag: int = 0
) -> list[Tensor]:
    """Tokens of one picture a prompt, of several batches one after the other."""
    condition = model.condition(PROMPTS, runs[0].guided)
    loop = Loop(model, policy, *condition.mask.shape, "cudagraphs" if captured else "none", runs[0].guided)
    tokens = []
    if window > 1:
        loop._window(window)._lag = lag
    for number, sampling in enumerate(runs):
        keys = seed_keys([number, 7])
        assert list(loop.sample_(condition, keys, sampling, window)) == list(range(model.spec.grid.rows))
        tokens.append(loop.tokens.clone())
    return tokens


RUNS = [Sampling(1.5, 1.5), Sampling(1.5, 1.5), Sampling(3.0, 0.7), Sampling(1.2, 2.0)]


@pytest.mark.parametrize("name", POLICIES)
def test_replayed_lines_draw_what_eager_ones_do(name: str, captures: list[Tape]) -> None:
    """For other seeds, another guidance and another temperature, too."""
    model = Tiny(GRID)
    policy = tight(name, model) if name != "full" else build(name, GRID.tokens)
    expected = pictures(model, policy, False, RUNS)
    got = pictures(model, policy, True, RUNS)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(expected[1], expected[2])
    # The last line is shorter by a token, which enters no cache; periods may fall anywhere in a line.
    assert 2 <= len(captures) <= 1 + GRID.line


@pytest.mark.parametrize(
    "sampling", [Sampling(1.5, 0), Sampling(1.5, 1.2, top_k=3), Sampling(1.5, 1.2, top_p=0.8), Sampling()]
)
def test_every_way_to_draw_is_captured(sampling: Sampling, captures: list[Tape]) -> None:
    model, policy = Tiny(Grid(4, 3, newline=True)), build("linear", 8)
    expected = pictures(model, policy, False, [sampling] * 3)
    for one, other in zip(pictures(model, policy, True, [sampling] * 3), expected, strict=True):
        assert torch.equal(one, other)
    assert captures


def test_each_way_to_draw_has_graphs_of_its_own(captures: list[Tape]) -> None:
    model, policy = Tiny(GRID), build("linear", 12)
    runs = [Sampling(1.5, 1.5), Sampling(1.5, 1.5), Sampling(1.5, 0), Sampling(1.5, 1.5, top_k=2)]
    expected = pictures(model, policy, False, runs)
    for one, other in zip(pictures(model, policy, True, runs), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("guided_tokens", [1, 2, GRID.line, GRID.line + 2, GRID.tokens])
def test_guidance_may_end_between_captured_lines_or_within_one(
    guided_tokens: int, captures: list[Tape]
) -> None:
    model, policy = Tiny(GRID), tight("linear", Tiny(GRID))
    runs = [Sampling(2.0, 1.5, guided_tokens=guided_tokens)] * 3
    expected = pictures(model, policy, False, runs)
    for one, other in zip(pictures(model, policy, True, runs), expected, strict=True):
        assert torch.equal(one, other)
    assert captures


def test_what_is_timed_are_the_lines_that_generate_replays(
    captures: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And everything is captured before the first round that counts."""
    monkeypatch.setattr(engine_module, "check_mode", lambda mode, device: None)
    model = Tiny(GRID)
    engine = PolicyEngine(model, tight("linear", model), "cudagraphs", guided=True)
    spans, replayed = WHOLE.spans(GRID), list[object]()
    run = graphs.Replayed.run

    def noted(self: graphs.Replayed, key: tuple[object, ...], work: Callable[[], None]) -> None:
        replayed.append(key[:2])
        run(self, key, work)

    monkeypatch.setattr(graphs.Replayed, "run", noted)
    traces = []
    with tqdm(disable=True) as bar:
        for _ in range(engine.cold_batches + 2):
            traces.append(decode(model, engine, 2, Sampling(1.5), spans, 3, bar))
            if len(traces) == engine.cold_batches:
                made = len(captures)
    assert made == len(captures) == 2, "a line, and the last one"
    lines = [("line", GRID.line)] * (GRID.rows - 1) + [("line", GRID.line - 1)]
    assert replayed == lines * len(traces)
    assert all(torch.equal(trace.tokens, traces[0].tokens) for trace in traces)
    assert all(len(trace.steps) == GRID.tokens - 1 for trace in traces)
    for line in range(GRID.rows - 1):
        (of_line,) = {round(x, 12) for x in traces[-1].steps[line * GRID.line : (line + 1) * GRID.line]}
        assert of_line > 0


@pytest.mark.parametrize("guided_tokens", [None, GRID.line + 2])
@pytest.mark.parametrize("name", ["linear", "full", "adakv"])
def test_replayed_passes_draw_what_eager_steps_do(
    name: str, guided_tokens: int | None, captures: list[Tape]
) -> None:
    """A window is captured, and what is done in each picture between its passes; a pass ahead of the host."""
    model, policy = Tiny(GRID), tight(name, Tiny(GRID))
    runs = [Sampling(1.5, 0.5, guided_tokens=guided_tokens)] * 3
    expected = pictures(model, policy, False, runs)
    for one, other in zip(pictures(model, policy, True, runs, 3, lag=1), expected, strict=True):
        assert torch.equal(one, other)
    assert captures


@pytest.mark.parametrize("name", ["linear", "full"])
def test_a_pass_ahead_of_the_host_costs_none(name: str) -> None:
    """No pass is made in which nothing could be accepted."""
    passes = []
    for lag in (0, 1):
        policy = tight(name, Tiny(GRID))
        condition = Tiny(GRID).condition(PROMPTS, False)
        loop = Loop(Tiny(GRID), policy, *condition.mask.shape, "none")
        with torch.inference_mode():
            loop._window(3)._lag = lag
            list(loop.sample_(condition, seed_keys([1, 2]), Sampling(1.0, 0.5), 3))
        passes.append(loop.passes)
    assert passes[0] == passes[1]


def test_a_number_that_is_asked_for_while_capturing_is_caught(captures: list[Tape]) -> None:
    replayed, x = graphs.Replayed(True, torch.device("cpu")), torch.ones(3)
    replayed.run("sum", lambda: float(x.sum()) and None)
    with pytest.raises(RuntimeError, match="a number was asked for"):
        replayed.run("sum", lambda: float(x.sum()) and None)


class Streams:
    """Stands in for `torch.cuda`: who ran what on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Any] = []
        self.now: Any = None
        self.ran: list[tuple[str, Any]] = []
        for name, stand_in in {
            "Stream": self.stream_on,
            "current_stream": lambda device: SimpleNamespace(device=device, wait_stream=lambda other: None),
            "stream": self.on,
            "graph_pool_handle": lambda: object(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.ran.append(("replay", self.now))),
            "graph": lambda graph, pool, stream, capture_error_mode: self.on(stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    def stream_on(self, device: torch.device) -> Any:
        self.made.append(SimpleNamespace(device=device, wait_stream=lambda other: None))
        return self.made[-1]

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        self.now = stream
        yield
        self.now = None


def test_first_runs_and_captures_of_a_set_of_graphs_are_on_one_stream_of_their_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And no other set of graphs has that stream."""
    streams = Streams(monkeypatch)
    device = torch.device("cuda", 1)
    for number in range(2):
        replayed = graphs.Replayed(True, device)
        streams.ran.clear()
        for name in ("a", "b", "a", "b", "a"):
            replayed.run(name, partial(lambda name: streams.ran.append((name, streams.now)), name))
        own = streams.made[number]
        assert own.device == device
        replay = ("replay", None)
        assert streams.ran == [("a", own), ("b", own), ("a", own), replay, ("b", own), replay, replay]
    assert len(streams.made) == 2


def test_without_a_gpu_graphs_are_refused() -> None:
    with pytest.raises(ArkvError, match="compile is 'cudagraphs' and the model is on cpu: take 'inductor'"):
        Decoder(Tiny(), build("full", GRID.tokens), compile="cudagraphs")
