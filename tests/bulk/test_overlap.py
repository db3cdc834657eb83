"""Making files while the next unit is drawn: the same files, in the same order, whatever goes wrong."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from letters import install

from arkv.bulk import Description, overlap, ray_data, run, worker
from arkv.bulk.overlap import overlapped
from arkv.bulk.prepared import prepare
from arkv.bulk.ray_data import DrawActor
from arkv.bulk.worker import Worker
from arkv.errors import ArkvError
from arkv.jobs.recipe import Recipe

PATIENCE = 30.0  # seconds; what is waited for here takes far less


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_order(count: int) -> None:
    assert list(overlapped(range(count), lambda item: item * item)) == [item**2 for item in range(count)]


def test_an_item_is_worked_on_while_the_next_is_made() -> None:
    working = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        # Would time out if the first item were only worked on when the second is there.
        assert working.wait(PATIENCE)
        yield 2

    def work(item: int) -> int:
        working.set()
        return item

    assert list(overlapped(items(), work)) == [1, 2]


def test_no_more_than_one_item_waits() -> None:
    may_go_on, made = threading.Event(), []

    def items() -> Iterator[int]:
        for item in range(4):
            made.append(item)
            yield item

    def work(item: int) -> int:
        assert may_go_on.wait(PATIENCE)
        return item

    results = overlapped(items(), work)
    first: list[int] = []
    reader = threading.Thread(target=lambda: first.append(next(results)))
    reader.start()
    reader.join(0.2)
    assert reader.is_alive()
    assert made == [0, 1]
    may_go_on.set()
    reader.join(PATIENCE)
    assert first == [0]
    assert list(results) == [1, 2, 3]


def test_what_was_begun_is_completed_if_making_the_next_fails() -> None:
    begun, done = threading.Event(), []

    def items() -> Iterator[int]:
        yield 1
        assert begun.wait(PATIENCE)
        raise ArkvError("no more")

    def work(item: int) -> None:
        begun.set()
        threading.Event().wait(0.2)
        done.append(item)

    with pytest.raises(ArkvError, match="no more"):
        list(overlapped(items(), work))
    assert done == [1]


def test_an_error_of_the_work_ends_it() -> None:
    def work(item: int) -> int:
        if item == 1:
            raise ArkvError("the disk is full")
        return item

    results = overlapped(range(5), work)
    assert next(results) == 0
    with pytest.raises(ArkvError, match="disk is full"):
        next(results)


def test_work_that_lacks_memory_is_done_again_while_nothing_else_is() -> None:
    threads: list[threading.Thread] = []

    def work(item: int) -> int:
        if item == 1:
            threads.append(threading.current_thread())
            if len(threads) == 1:
                raise RuntimeError("CUDA error: out of memory")
        return item

    assert list(overlapped(range(3), work)) == [0, 1, 2]
    in_thread, again = threads
    assert in_thread is not threading.current_thread()
    assert again is threading.current_thread()


def test_work_that_lacks_memory_twice_ends_it() -> None:
    def work(item: int) -> int:
        raise MemoryError(f"for {item}")

    with pytest.raises(MemoryError, match="for 0"):
        list(overlapped(range(2), work))


def test_work_is_queued_on_one_stream_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the stream is: there need not be a GPU to see that it is made once and entered each time."""
    made, current = [], []

    @contextmanager
    def stream(entered: str) -> Iterator[None]:
        current.append(entered)
        yield
        current.remove(entered)

    def new_stream(device: torch.device) -> str:
        made.append(f"of {device}")
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", new_stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    work = overlap.on_stream(torch.device("cuda:1"), lambda item: (item, *current))
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(work, "ab")) == [("a", "of cuda:1"), ("b", "of cuda:1")]
    assert made == ["of cuda:1"]
    assert not current


class TestJob:
    """A whole job with overlapping, which on a CPU has to be switched on."""

    @pytest.fixture
    def described(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Description:
        monkeypatch.syspath_prepend(install(tmp_path / "site").split(":")[0])
        (tmp_path / "prompts.txt").write_text("".join(f"{letter} b\n" for letter in "acdefgh"))
        recipe = Recipe(model="letters", policy="window:ratio=1/2")
        return Description(
            prompts=str(tmp_path / "prompts.txt"), out=str(tmp_path / "out"), recipe=recipe, batch_size=2
        )

    @pytest.mark.parametrize("layout", ["flat", "webdataset"])
    def test_has_the_same_files_and_index(
        self, described: Description, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def files(name: str) -> dict[str, bytes]:
            changes = {"out": str(tmp_path / name), "layout": layout}
            run(Description.from_values({**described.values(), **changes}))
            found = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.is_file()}
            index = found.pop("index.jsonl").splitlines()[1:]
            return {**found, "rows": b"\n".join(index), "log.jsonl": b""}

        threads = set()

        def develop(*arguments: Any) -> Any:
            threads.add(threading.current_thread())
            return worker.develop(*arguments)

        monkeypatch.setattr(overlap, "develop", develop)
        apart = files("apart")
        monkeypatch.setattr(overlap, "OVERLAPPING", frozenset({"cpu"}))
        assert files("overlapped") == apart
        assert len(threads) == 2

    def test_is_resumed_behind_a_file_that_was_still_in_the_making(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(overlap, "OVERLAPPING", frozenset({"cpu"}))
        draw, units = Worker.draw, []

        def draw_two(drawing: Worker, unit: Any) -> Any:
            units.append(unit)
            if len(units) == 3:
                raise ArkvError("enough")
            return draw(drawing, unit)

        monkeypatch.setattr(Worker, "draw", draw_two)
        with pytest.raises(ArkvError, match="enough"):
            run(described)
        monkeypatch.setattr(Worker, "draw", draw)
        assert run(described, resume=True).pictures == described.job().pictures - 4

    def test_goes_on_in_an_actor_that_is_called_twice_at_a_time(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        actor, calls = actor_of(described), [{"unit": numpy.array([number])} for number in (0, 1)]
        expected = [actor(call) for call in calls]
        draw, drawing, drawn, both = Worker.draw, threading.Lock(), [], threading.Event()

        def draw_alone(worker: Worker, unit: Any) -> Any:
            assert drawing.acquire(blocking=False), "two units at a time are too much for one GPU"
            drawn.append(draw(worker, unit))
            drawing.release()
            if len(drawn) == 2:
                both.set()
            return drawn[-1]

        def develop(*arguments: Any) -> Any:
            # Would time out if the second unit were only drawn when the files of the first are there.
            assert both.wait(PATIENCE)
            return worker.develop(*arguments)

        monkeypatch.setattr(Worker, "draw", draw_alone)
        monkeypatch.setattr(ray_data, "develop", develop)
        with ThreadPoolExecutor(2) as pool:
            got = list(pool.map(actor, calls))
        assert [each["content"] for each in got] == [each["content"] for each in expected]
        assert [each["file"] for each in got] == [each["file"] for each in expected]

    def test_lacks_memory_in_an_actor_and_waits_until_nothing_is_drawn(
        self, described: Description, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        actor, attempts = actor_of(described), []
        expected = actor({"unit": numpy.array([0])})

        def develop(*arguments: Any) -> Any:
            attempts.append(actor._turn.locked())
            if len(attempts) == 1:
                raise RuntimeError("CUDA error: out of memory")
            return worker.develop(*arguments)

        monkeypatch.setattr(ray_data, "develop", develop)
        assert actor({"unit": numpy.array([0])})["content"] == expected["content"]
        assert attempts == [False, True]


def actor_of(described: Description) -> DrawActor:
    prepared = prepare(described, described.job(), described.recipe.load_model())
    return DrawActor(prepared, develops=True)
