"""A decoder in the user's process: its defaults, threads, copies and other processes."""

import copy
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from elsewhere import draw_in_a_process
from llamagen_files import TinyClasses, write_llamagen
from PIL import Image
from tiny import GRID, Tiny, build, tight
from torch import Tensor

from arkv import ArkvError, Decoder, Grid, load_model, load_policy
from arkv.decoding import isolation

PROMPTS = [(1, 2, 3), (4,), (5, 6)]
OTHERS = [(7, 0, 1), (2, 2), (3,)]
SETTINGS: dict[str, Any] = {"guidance": 1.5, "temperature": 1.5}
policies = pytest.mark.parametrize("name", ["linear", "adakv", "headkv"])


def decoder(name: str = "linear", **more: Any) -> Decoder:
    model = Tiny()
    return Decoder(model, tight(name, model), **more)


# What the process has set for itself


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


DEFAULTS: dict[str, Callable[[], Any]] = {
    "dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "dtype float64": lambda: default_dtype(torch.float64),
    "device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "gradients": torch.enable_grad,
}


@pytest.mark.parametrize(
    ("name", "default"), [*(("linear", name) for name in DEFAULTS), ("adakv", "dtype bfloat16")]
)
def test_defaults_of_the_process_do_not_reach_inside(name: str, default: str) -> None:
    settings = SETTINGS | {"guided_tokens": 9}
    expected = decoder(name).generate(PROMPTS, **settings)
    made = decoder(name)
    logits = made.teacher_force(PROMPTS, expected.tokens, guidance=1.5).raw
    used = decoder(name)
    with DEFAULTS[default]():
        before = torch.get_default_dtype()
        for _ in range(2):
            got = used.generate(PROMPTS, **settings)
            assert torch.equal(got.tokens, expected.tokens)
        assert got.images[0].tobytes() == expected.images[0].tobytes()
        assert torch.equal(used.teacher_force(PROMPTS, expected.tokens, guidance=1.5).raw, logits)
        assert torch.get_default_dtype() == before


@pytest.mark.parametrize("default", ["dtype bfloat16", "dtype float64", "device"])
def test_a_model_that_is_loaded_under_other_defaults_is_the_same(default: str, tmp_path: Path) -> None:
    """Its tables and its picture decoder, too, which have dtypes of their own."""
    write_llamagen(tmp_path, TinyClasses.variant)
    tokens = torch.arange(16)[None]
    for load in (lambda: load_model("scenes"), lambda: TinyClasses.from_pretrained(tmp_path)):
        plain = load()
        with DEFAULTS[default]():
            other = load()
        for (name, one), two in zip(plain.named_buffers(), other.buffers(), strict=True):
            assert one.dtype == two.dtype, name
            assert torch.equal(one, two), name
        for (name, one), two in zip(plain.named_parameters(), other.parameters(), strict=True):
            assert (one.dtype, one.device) == (two.dtype, two.device), name
    assert torch.equal(plain.pixels(tokens), other.pixels(tokens))


def test_one_thread_that_is_done_does_not_change_the_dtype_of_another_that_draws() -> None:
    with default_dtype(torch.bfloat16):
        first, second = isolation.isolated(torch.device("cpu")), isolation.isolated(torch.device("cpu"))
        first.__enter__()
        thread = threading.Thread(target=second.__enter__)
        thread.start()
        thread.join()
        first.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.float32
        second.__exit__(None, None, None)
        assert torch.get_default_dtype() == torch.bfloat16


def test_what_is_given_back_can_be_trained_on() -> None:
    made = decoder()
    result = made.generate(PROMPTS, **SETTINGS)
    forced = made.teacher_force(PROMPTS, result.tokens, guidance=1.5)
    table = torch.nn.Embedding(made.model.spec.vocabulary, 3)
    scale = torch.ones((), requires_grad=True)
    loss = table(result.tokens).sum() + (forced.raw * scale).nan_to_num(neginf=0).sum()
    (loss + (forced.guided * scale).nan_to_num(neginf=0).sum()).backward()
    assert table.weight.grad is not None
    assert scale.grad is not None


def test_what_on_line_does_is_the_callers_own_affair() -> None:
    """Gradients are there, and what it computes can be trained on."""
    seen = []

    def train(batch: range, line: int, images: Sequence[Image.Image]) -> None:
        weight = torch.ones(3, requires_grad=True)
        (weight * 2).sum().backward()
        seen.append(weight.grad)

    decoder().generate(PROMPTS[:1], **SETTINGS, on_line=train)
    assert len(seen) == GRID.rows


# Copies, and other processes


def sent(made: Decoder) -> Decoder:
    """As torch sends it to a worker: with the memory of tensors shared."""
    return pickle.loads(ForkingPickler.dumps(made))


def pickled(made: Decoder) -> Decoder:
    file = BytesIO()
    pickle.dump(made, file)
    file.seek(0)
    return pickle.load(file)


@policies
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, sent])
def test_a_copy_of_a_used_decoder_is_whole_and_has_a_cache_of_its_own(
    name: str, copied: Callable[[Decoder], Decoder]
) -> None:
    used, settings = decoder(name, kv_dtype="int8"), SETTINGS | {"guided_tokens": 7}
    expected = used.generate(PROMPTS, **settings).tokens
    other = copied(used)
    assert (other.compile, other.kv_dtype, other.plan) == (used.compile, "int8", used.plan)
    # In turns, a line of the one within each line of the other.
    inner: list[Tensor] = []

    def draw_beside(batch: range, line: int, images: Sequence[Image.Image]) -> None:
        if line in (0, 2):
            inner.append(other.generate(PROMPTS, **settings).tokens)

    outer = used.generate(PROMPTS, **settings, on_line=draw_beside).tokens
    assert torch.equal(outer, expected)
    assert all(torch.equal(tokens, expected) for tokens in inner)
    assert used.store is not other.store


def test_a_forked_process_begins_with_a_cache_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not wait for a thread that was drawing in the other one."""
    made = decoder()
    expected = made.generate(PROMPTS, **SETTINGS).tokens
    before = made.store
    made._turns._lock.acquire()
    monkeypatch.setattr(isolation.os, "getpid", lambda: -1)
    assert torch.equal(made.generate(PROMPTS, **SETTINGS).tokens, expected)
    assert made.store is not before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_processes_that_are_given_a_used_decoder_draw_at_once_and_do_not_share_a_cache(method: str) -> None:
    """Python's own and torch's start methods, which share the memory of tensors."""
    import torch.multiprocessing

    made = decoder("adakv")
    wanted = [made.generate(prompts, **SETTINGS).tokens.tolist() for prompts in (OTHERS, PROMPTS)]
    context = torch.multiprocessing.get_context(method)
    barrier, told = context.Barrier(3), context.Queue()
    workers = [
        context.Process(target=draw_in_a_process, args=(made, PROMPTS, SETTINGS, barrier, told), daemon=True)
        for _ in range(2)
    ]
    for worker in workers:
        worker.start()
    barrier.wait(60)
    mine = [made.generate(OTHERS, **SETTINGS).tokens.tolist() for _ in range(2)]
    assert mine == [wanted[0]] * 2
    assert [told.get(timeout=60) for _ in workers] == [[wanted[1]] * 2] * 2
    for worker in workers:
        worker.join(60)


# Turns


def test_two_threads_on_one_decoder_draw_what_one_after_the_other_would() -> None:
    made, got = decoder(), dict[tuple[int, int], Tensor]()
    expected = {
        i: decoder().generate(prompts, **SETTINGS).tokens for i, prompts in enumerate([PROMPTS, OTHERS])
    }

    def draw(index: int, prompts: list[Any]) -> None:
        for turn in range(3):
            got[index, turn] = made.generate(prompts, **SETTINGS).tokens

    threads = [threading.Thread(target=draw, args=pair) for pair in enumerate([PROMPTS, OTHERS])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[index, turn], expected[index]) for index in (0, 1) for turn in range(3))


@pytest.mark.parametrize("call", ["generate", "teacher_force", "batch_that_fits"])
def test_on_line_that_calls_its_own_decoder_is_refused_and_spoils_nothing(call: str) -> None:
    made, refused = decoder(), []
    expected = made.generate(PROMPTS, **SETTINGS).tokens
    given: dict[str, tuple[Any, ...]] = {
        "generate": (OTHERS,),
        "teacher_force": (PROMPTS, expected),
        "batch_that_fits": (OTHERS, True),
    }

    def draw(batch: range, line: int, images: Sequence[Image.Image]) -> None:
        with pytest.raises(
            ArkvError, match="this decoder is drawing, and was called by its own on_line"
        ) as told:
            getattr(made, call)(*given[call])
        refused.append(str(told.value))

    assert torch.equal(made.generate(PROMPTS, **SETTINGS, on_line=draw).tokens, expected)
    assert len(refused) == GRID.rows
    assert "\n" not in refused[0]


@pytest.mark.parametrize("name", ["model", "policy", "compile", "kv_dtype", "plan"])
def test_a_decoder_is_what_its_constructor_said(name: str) -> None:
    made = decoder()
    held = getattr(made, name)
    with pytest.raises(ArkvError, match=f"the {name} of a decoder cannot be changed: make another"):
        setattr(made, name, None)
    assert getattr(made, name) is held


def test_a_model_that_was_trained_in_between_draws_in_evaluation_mode() -> None:
    made = decoder()
    made.model.train()
    made.generate(PROMPTS[:1])
    assert not made.model.training


# While lines are drawn


@pytest.mark.parametrize("grid", [GRID, Grid(3, 4, newline=True)], ids=str)
def test_lines_so_far_show_nothing_of_other_batches(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a finished line, where a picture decoder may look, stands that line again."""
    model = Tiny(grid)
    made = Decoder(model, build("full", grid.tokens))
    made.generate(OTHERS, seeds=[7, 8, 9], **SETTINGS)
    given: list[Tensor] = []
    monkeypatch.setattr(model, "pixels", lambda tokens: given.append(tokens) or Tiny.pixels(model, tokens))
    drawn = made.generate(
        PROMPTS, **SETTINGS, pixels=False, on_line=lambda batch, line, images: images[0]
    ).tokens
    lines = drawn.unflatten(1, (grid.rows, grid.line))
    assert len(given) == grid.rows
    for line, tokens in enumerate(given):
        shown = tokens.unflatten(1, (grid.rows, grid.line))
        assert torch.equal(shown[:, : line + 1], lines[:, : line + 1])
        assert torch.equal(shown[:, line + 1 :], lines[:, line, None].expand_as(shown[:, line + 1 :]))


def test_lines_so_far_are_drawn_only_if_somebody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    made, kept = decoder(), []
    whole = made.generate(PROMPTS, **SETTINGS).images
    pixels, calls = made.model.pixels, []
    monkeypatch.setattr(made.model, "pixels", lambda tokens: calls.append(len(tokens)) or pixels(tokens))
    made.generate(
        PROMPTS,
        **SETTINGS,
        pixels=False,
        on_line=lambda batch, line, images: kept.append(images) or len(images),
    )
    assert not calls
    # Kept and looked at later, each is of its own line.
    for line, images in enumerate(kept):
        for image, picture in zip(images, whole, strict=True):
            assert image.tobytes() == picture.crop((0, 0, *image.size)).tobytes()
            assert image.height == picture.height * (line + 1) // GRID.rows
    assert calls == [len(PROMPTS)] * GRID.rows


def test_returning_false_ends_it_and_gives_what_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    made, fed = decoder(), []
    whole = made.generate(PROMPTS, **SETTINGS)
    embed = made.model.embed  # fed one token a pass, so that it can be told which
    monkeypatch.setattr(made.model, "embed", lambda tokens, at: fed.append(int(at)) or embed(tokens, at))
    stopped = made.generate(
        PROMPTS,
        **SETTINGS,
        batch_size=1,
        window=1,
        on_line=lambda batch, line, images: (batch.start, line) != (1, 1),
    )
    assert fed == [*range(GRID.tokens - 1), *range(2 * GRID.line)]
    assert torch.equal(stopped.tokens, whole.tokens[:1])
    assert [image.tobytes() for image in stopped.images] == [whole.images[0].tobytes()]
    assert (stopped.stats.pictures, stopped.stats.steps) == (1, GRID.tokens)
    nothing = made.generate(PROMPTS, **SETTINGS, window=1, on_line=lambda batch, line, images: False)
    assert nothing.tokens.shape == (0, GRID.tokens)
    assert nothing.images == []
    assert str(nothing.stats).startswith("0 pictures, 0 steps")


# What people type


@pytest.mark.parametrize(
    "seeds", [[5, 6, 7], range(5, 8), (5, 6, 7), iter([5, 6, 7]), torch.tensor([5, 6, 7]), numpy.arange(5, 8)]
)
def test_seeds_of_every_kind_are_the_same_seeds(seeds: Any) -> None:
    expected = decoder().generate(PROMPTS, seeds=[5, 6, 7], **SETTINGS).tokens
    assert torch.equal(decoder().generate(PROMPTS, seeds=seeds, **SETTINGS).tokens, expected)


@pytest.mark.parametrize("seed", [5, numpy.int64(5), torch.tensor(5)])
def test_one_seed_is_that_of_the_first_prompt(seed: Any) -> None:
    expected = decoder().generate(PROMPTS, seeds=[5, 6, 7], **SETTINGS).tokens
    assert torch.equal(decoder().generate(PROMPTS, seed=seed, **SETTINGS).tokens, expected)


@pytest.mark.parametrize(
    "arguments",
    [
        {"seeds": torch.tensor(5)},
        {"seeds": torch.ones(3)},
        {"seeds": torch.zeros(3, 1, dtype=torch.long)},
        {"seeds": torch.tensor([True, False, True])},
        {"seeds": numpy.ones((3, 2), dtype=int)},
        {"seeds": numpy.array(5)},
        {"seeds": "567"},
        {"seed": 1.5},
        {"seed": -1},
        {"seed": 2**64 - 2},
        {"seed": [5, 6, 7]},
        {"seed": 5, "seeds": [5, 6, 7]},
        {"batch_size": torch.tensor(1.5)},
        {"guidance": torch.ones(2)},
        {"temperature": numpy.ones(2)},
        {"top_k": True},
        {"top_k": numpy.float64(2)},
    ],
    ids=str,
)
def test_wrong_numbers_of_every_kind_are_one_clear_line(arguments: dict[str, Any]) -> None:
    with pytest.raises(ArkvError, match=next(iter(arguments))[:4]) as told:
        decoder().generate(PROMPTS, **arguments)
    assert "\n" not in str(told.value)


def test_numbers_of_numpy_and_torch_are_numbers() -> None:
    expected = decoder().generate(PROMPTS, guidance=1.5, temperature=1.5, top_k=5, top_p=0.75).tokens
    for kind in (numpy.float32, torch.tensor):
        got = decoder().generate(
            PROMPTS,
            guidance=kind(1.5),
            temperature=kind(1.5),
            top_k=numpy.int32(5),
            top_p=kind(0.75),
            batch_size=numpy.int64(2),
        )
        assert torch.equal(got.tokens, expected)


@pytest.mark.parametrize(
    "collection", [iter, lambda prompts: (p for p in prompts), tuple], ids=["iterator", "generator", "tuple"]
)
def test_prompts_may_come_one_by_one(collection: Any) -> None:
    assert torch.equal(decoder().generate(collection(PROMPTS)).tokens, decoder().generate(PROMPTS).tokens)


@pytest.mark.parametrize("prompts", [b"a cat", {"a": 1}, 3.5, torch.tensor(3), numpy.array(3)], ids=repr)
def test_prompts_that_are_no_list_are_one_clear_line(prompts: Any) -> None:
    with pytest.raises(ArkvError, match=r"^prompts is .*: expected a list of them") as told:
        decoder().generate(prompts)
    assert "\n" not in str(told.value)


def test_a_policy_may_be_given_as_a_text() -> None:
    made = Decoder(Tiny(), "window:budget=8")
    assert made.policy == load_policy("window:budget=8")
    with pytest.raises(ArkvError, match="unknown policy 'windou'; did you mean window"):
        Decoder(Tiny(), "windou")


@pytest.mark.parametrize(
    "model", ["scenes", torch.nn.DataParallel(Tiny()), Tiny, None], ids=lambda m: type(m).__name__
)
def test_what_is_no_model_is_told_in_one_line(model: Any) -> None:
    with pytest.raises(ArkvError, match=r"^model is .*: give an arkv\.Model itself") as told:
        Decoder(model, "full")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("policy", [3, None, type(load_policy("full"))], ids=repr)
def test_what_is_no_policy_is_told_in_one_line(policy: Any) -> None:
    with pytest.raises(ArkvError, match=r"^policy is .*: give a text such as"):
        Decoder(Tiny(), policy)


# Compiled


def test_a_batch_that_is_not_full_is_filled_up_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first as well as the last, so that no other size is compiled."""
    for part in ("step", "window"):
        monkeypatch.setattr(f"arkv.decoding.{part}.compiled", lambda function, mode: function)
    made, rows = decoder(compile="inductor"), []

    def note(batch: range, line: int, images: Sequence[Image.Image]) -> None:
        assert made.store is not None
        rows.append((made.store.rows, len(images)))

    for count in (3, 1, 5):
        prompts = (PROMPTS + OTHERS)[:count]
        got = made.generate(prompts, **SETTINGS, batch_size=4, on_line=note)
        assert torch.equal(got.tokens, decoder().generate(prompts, **SETTINGS).tokens)
        assert len(got.images) == count
    assert set(rows) == {(8, 3), (8, 1), (8, 4)}


def test_warming_up_draws_a_batch_of_each_size(monkeypatch: pytest.MonkeyPatch) -> None:
    made, sizes = decoder(), []
    condition = made.model.condition
    monkeypatch.setattr(
        made.model,
        "condition",
        lambda prompts, guided: sizes.append(len(prompts)) or condition(prompts, guided),
    )
    made.warm_up([1, 3], guidance=2.0)
    assert sizes == [1, 3]
    with pytest.raises(ArkvError, match="batch_size is 0"):
        made.warm_up([0])
