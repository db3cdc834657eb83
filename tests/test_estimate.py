import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from live import Live
from tiny import LONGEST, POLICIES, Tiny, tight

from arkv import CachePolicy, Decoder, Grid, Store
from arkv.attention.blocks import BLOCK
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.errors import MemoryLimitError
from arkv.estimate import available_memory, check_memory, estimate, format_bytes, rows_of

PROMPTS = [(1,), (2, 3), (4, 5, 6)]


def spare(store: Store) -> float:
    """By how much statistics may be overestimated: a table of blocks by less than a block of each row."""
    return 0 if store.blocks is None else store.blocks.head[..., 0].numel() * BLOCK * (8 + 1 + 8 / BLOCK)


@pytest.mark.parametrize(
    ("pictures", "guided", "dtype"),
    [(1, False, torch.float32), (3, False, torch.bfloat16), (2, True, torch.float32)],
)
@pytest.mark.parametrize("name", POLICIES)
@torch.inference_mode()
def test_bytes_are_those_that_are_allocated(
    name: str, pictures: int, guided: bool, dtype: torch.dtype
) -> None:
    model = Tiny(Grid(3, 4, newline=True), layers=3).to(dtype)
    policy = tight(name, model)
    condition = model.condition(PROMPTS[:pictures], guided)
    rows, length = condition.mask.shape
    store = Loop(model, policy, rows, length, "none", guided).store
    estimated = estimate(model, policy, pictures, guided, length)
    assert estimated.kv == store.kv_bytes
    assert 0 <= estimated.statistics - (store.nbytes - store.kv_bytes) <= spare(store)
    assert estimated.weights == sum(p.nbytes for p in model.parameters())
    assert estimated.total == estimated.weights + estimated.batch
    assert estimated.full_kv == estimate(model, tight("full", model), pictures, guided, length).kv
    assert (estimated.kv < estimated.full_kv) == (name != "full")


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("budgets", [((1, 9), (5, 3), (20, 2)), ((4, 4), (9, 9), (1, 1))], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_bytes_of_unequal_heads_are_those_that_are_allocated(
    sums: Callable[..., CachePolicy], budgets: Any, shared: bool, guided: bool, dtype: torch.dtype
) -> None:
    model = Tiny(layers=3).to(dtype)
    policy = sums(budget=1, budgets=budgets, shared=shared)
    condition = model.condition(PROMPTS, guided)
    rows, length = condition.mask.shape
    store = Loop(model, policy, rows, length, "none", guided).store
    estimated = estimate(model, policy, len(PROMPTS), guided, length)
    slots = sum(length + min(budget + 5, 20) for layer in budgets for budget in layer)
    assert estimated.kv == store.kv_bytes == rows * slots * 2 * 8 * dtype.itemsize
    assert 0 <= estimated.statistics - (store.nbytes - store.kv_bytes) <= spare(store)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "rkv"])  # its score has its own
@torch.inference_mode()
def test_scratch_is_at_most_what_was_estimated_and_no_small_part_of_it(name: str) -> None:
    """Counted as tensors come and go, at a prefill and over two lines with their evictions."""
    model = Tiny(Grid(4, 5), layers=3, heads=4, kv_heads=4)
    policy, prompts = tight(name, model), model.example_prompts(6, 0)
    condition, sampling = model.condition(prompts, True), Sampling(1.5)
    loop = Loop(model, policy, *condition.mask.shape, "none", True)
    with Live() as live:
        loop.begin_(condition, seed_keys(range(len(prompts))), sampling)
        for line in range(2):
            loop.decode_(range(5 * line, 5 * line + 5), sampling)
    estimated = estimate(model, policy, len(prompts), True, condition.mask.shape[1]).scratch
    assert estimated / 3 < live.peak <= estimated


def test_graphs_and_workspaces_are_counted_where_there_are_any() -> None:
    model, policy = Tiny(), tight("linear", Tiny())
    eager, captured = (estimate(model, policy, 3, compile=mode) for mode in ("inductor", "cudagraphs"))
    assert (eager.graphs, eager.workspaces) == (0, 0)
    # Captures have a stream of their own, and cuBLAS a workspace for each.
    assert captured.workspaces == 2 * 32 * 2**20
    assert 0 < captured.graphs < captured.scratch
    assert captured.batch == captured.total - captured.weights
    assert sum(dict(rows_of(captured)).values()) == captured.total * 2 + captured.full_kv


def test_the_longest_prompt_and_the_models_dtype_are_assumed() -> None:
    model = Tiny()
    policy = tight("linear", model)
    assert estimate(model, policy, 2) == estimate(model, policy, 2, True, LONGEST + 1, torch.float32)
    narrow = estimate(model, policy, 2, dtype=torch.bfloat16)
    assert narrow == dataclasses.replace(
        estimate(model.to(torch.bfloat16), policy, 2), scratch=narrow.scratch
    )


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        empty = Tiny.__new__(Tiny)
        torch.nn.Module.__init__(empty)
        empty.weight = torch.nn.Parameter(torch.empty(10**6, 10**6))
    empty.spec = dataclasses.replace(Tiny().spec, layers=10**4)
    estimated = estimate(empty, tight("full", Tiny()), 10**6)
    assert estimated.weights == 4 * 10**12
    assert estimated.kv > 10**12


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_batch_that_does_not_fit_says_which_one_does(
    name: str, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tiny()
    decoder = Decoder(model, tight(name, model))
    prompts = [(i % 7, 1) for i in range(40)]
    asked: list[Any] = []

    def some(device: torch.device) -> int:
        asked.append(device)
        return 300_000

    monkeypatch.setattr("arkv.estimate.available_memory", some)
    with pytest.raises(MemoryLimitError) as caught:
        decoder.generate(prompts, guidance=guidance)
    message = str(caught.value)
    assert "\n" not in message
    needed = estimate(model, decoder.policy, 40, guidance != 1, 3).batch
    assert "a batch of 40" in message
    assert format_bytes(needed) in message
    assert f"{format_bytes(300_000 * 0.95)} is free on cpu" in message
    fits = int(re.fullmatch(r".*the largest batch that fits is (\d+)", message)[1])  # type: ignore[index]
    assert 1 <= fits < 40
    with pytest.raises(MemoryLimitError):
        decoder.generate(prompts[: fits + 1], guidance=guidance)
    assert len(decoder.generate(prompts, guidance=guidance, batch_size=fits).images) == 40
    assert {device.type for device in asked} == {"cpu"}


def test_if_no_batch_fits_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arkv.estimate.available_memory", lambda device: 1000)
    with pytest.raises(MemoryLimitError, match="not even one picture fits: lower the ratio"):
        Decoder(Tiny(), tight("linear", Tiny())).generate([(1,), (2,)])


def test_where_nobody_knows_the_memory_everything_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arkv.estimate.available_memory", lambda device: None)
    check_memory(Tiny(), tight("full", Tiny()), 10**12, True, 5)
    assert available_memory(torch.device("meta")) is None


def test_this_machine_has_memory() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None
    assert 10**6 < free < 10**15


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (3_538_944, "3.54 MB"),
        (10**9, "1 GB"),
        (1.2e15, "1200 TB"),
    ],
)
def test_bytes_are_printed_with_three_digits(count: float, text: str) -> None:
    assert format_bytes(count) == text


def test_the_printed_rows_hold_every_part() -> None:
    estimated = estimate(Tiny(), tight("linear", Tiny()), 2)
    rows = dict(rows_of(estimated))
    assert rows.pop("total") == estimated.total
    assert rows.pop("(full cache)") == estimated.full_kv
    assert sum(rows.values()) == estimated.total
