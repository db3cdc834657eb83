"""The CPU's kernel: against the specification, and how it is built, kept and done without."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

import arkv
from arkv.attention import cpu, operators
from arkv.attention.blocks import Blocks, blocks_of
from arkv.attention.quantization import GROUP, PACKED, can_store, dequantize, quantize
from arkv.attention.reference import Attended
from arkv.attention.window import window_attention
from arkv.errors import ArkvWarning
from arkv.store import CONDITION, FREE, PADDING

BOTH = frozenset({"mass", "scores"})
# Products and sums are float32 throughout; what is left is the last rounding of the output.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}

needs_kernel = pytest.mark.skipif(
    not operators.available(torch.device("cpu")), reason="there is no compiler for the kernel"
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    yield torch.set_num_threads
    torch.set_num_threads(1)


def spread(x: Tensor) -> Tensor:
    """The same numbers in every second row and column of something larger."""
    room = x.new_zeros([2 * size for size in x.shape])
    part = room[tuple(slice(None, None, 2) for _ in x.shape)]
    part.copy_(x)
    return part


@needs_kernel
@given(
    rows=st.integers(1, 3),
    tokens=st.sampled_from([None, 1, 2, 5]),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 2), (5, 1)]),
    capacity=st.integers(1, 70),
    head_dim=st.sampled_from([1, 7, 16, 33, 64, 100, 128, 300]),
    dtype=st.sampled_from(sorted(TOLERANCE, key=str)),
    stored=st.sampled_from([None, torch.int8, torch.float8_e4m3fn, PACKED]),
    unequal=st.booleans(),
    seen=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    apart=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example(2, None, (4, 2), 1300, 64, torch.float32, None, False, 0.7, False, 0)
@example(2, 3, (4, 2), 1300, 64, torch.bfloat16, torch.int8, True, 0.7, False, 0)
@example(2, None, (4, 2), 1300, 96, torch.bfloat16, PACKED, True, 0.7, False, 0)
@example(2, 3, (4, 2), 300, 32, torch.float32, PACKED, False, 0.7, True, 0)
@example(1, None, (2, 2), 1300, 64, torch.bfloat16, None, False, 0.0, True, 0)
def test_it_gives_what_the_specification_gives(
    rows: int,
    tokens: int | None,
    heads: tuple[int, int],
    capacity: int,
    head_dim: int,
    dtype: torch.dtype,
    stored: torch.dtype | None,
    unequal: bool,
    seen: float,
    apart: bool,
    seed: int,
) -> None:
    """On any strides, with NaN in what is hidden; a row alone gives the bits that it gives beside others."""
    if stored is not None and not can_store(stored, head_dim):
        head_dim = 2 * GROUP  # the others cannot be packed
    rng = torch.Generator().manual_seed(seed)
    (queries, kv_heads), slots = heads, heads[1] * capacity
    query = torch.randn(rows, tokens or 1, queries, head_dim, generator=rng).to(dtype)
    keys, values = (torch.randn(rows, slots, head_dim, generator=rng).to(dtype) for _ in range(2))
    visible = torch.rand(rows, tokens or 1, slots, generator=rng) < seen
    wide, scales = [x.float() for x in (keys, values)], (None, None)
    if stored is not None:
        (keys, key_scale), (values, value_scale) = quantize(keys, stored), quantize(values, stored)
        scales = (key_scale, value_scale)
        wide = [dequantize(x, s, torch.float32) for x, s in ((keys, key_scale), (values, value_scale))]
    owner, blocks = None, None
    if unequal:
        owner = torch.randint(0, kv_heads + 1, (1, slots), generator=rng)
        blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner[None], kv_heads)))
    expected = window_attention(query.float(), *wide, visible, kv_heads, owner, BOTH)

    hidden = ~visible.any(1)
    for poisoned in (keys, values) if stored is None else scales:
        poisoned[hidden] = torch.nan
    if tokens is None:
        query, visible = query[:, 0], visible[:, 0]
        expected = Attended(*(x[:, 0] for x in expected))
    if apart:
        query, keys, values, visible = map(spread, (query, keys, values, visible))

    def attend(of: slice) -> Attended:
        scale = [None if x is None else x[of] for x in scales]
        rooms = {name: spread(torch.ones(visible[of].shape)) for name in BOTH} if apart else {}
        leaf = (query[of], keys[of], values[of], visible[of])
        return operators.slot_attention(*leaf, kv_heads, BOTH, *scale, **rooms, blocks=blocks)

    got = attend(slice(None))
    assert got.output.dtype == dtype
    torch.testing.assert_close(got.output.float(), expected.output, atol=TOLERANCE[dtype], rtol=1e-2)
    torch.testing.assert_close(got.mass, expected.mass, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-4, rtol=1e-4)
    assert got.mass is not None
    assert not got.mass[~visible].any()
    for some, same in zip(attend(slice(rows - 1, rows)), got, strict=True):
        assert torch.equal(some, same[rows - 1 :])


@needs_kernel
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 300)),
    limited=st.sampled_from([None, "all", "a layer's", "a row's"]),
    apart=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
@example((3, 4, 9000), "all", False, 0)  # several threads
def test_slots_are_visible_that_hold_a_token_within_the_limit(
    shape: tuple[int, int, int], limited: str | None, apart: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Words, free slots, padding and visual tokens, the last of a large picture among them.
    kinds = torch.tensor([CONDITION, FREE, PADDING, 0, 1, 9215, 2**31 - 1], dtype=torch.int32)
    position = kinds[torch.randint(len(kinds), shape, generator=generator)]
    layers, rows, slots = shape
    of = {None: None, "all": shape, "a layer's": (layers, 1, slots), "a row's": (1, rows, slots)}[limited]
    limit = None if of is None else torch.rand(of, generator=generator) < 0.5
    expected = [
        p in (CONDITION, 0, 1, 9215, 2**31 - 1) and allowed
        for p, allowed in zip(
            position.flatten().tolist(),
            torch.ones(shape, dtype=torch.bool).flatten().tolist()
            if limit is None
            else limit.expand(shape).flatten().tolist(),
            strict=True,
        )
    ]
    if apart:
        position, limit = spread(position), None if limit is None else spread(limit)
    found = operators.visible_slots(position, CONDITION, limit)
    assert (found.dtype, tuple(found.shape)) == (torch.bool, shape)
    assert found.flatten().tolist() == expected
    assert torch.equal(operators._visible_anywhere(position, CONDITION, limit), found)


@needs_kernel
@pytest.mark.parametrize("unequal", [False, True])
def test_any_number_of_threads_gives_the_same_bits(unequal: bool, threads: Callable[[int], None]) -> None:
    query, keys, values = torch.randn(3, 8, 64), torch.randn(3, 4 * 700, 64), torch.randn(3, 4 * 700, 64)
    visible = torch.rand(3, 4 * 700) < 0.9
    owner = torch.randint(0, 5, (1, 1, 4 * 700))
    blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner, 4))) if unequal else None
    found = []
    for count in (1, 2, 3, 7):
        threads(count)
        found.append(operators.slot_attention(query, keys, values, visible, 4, BOTH, blocks=blocks))
    for other in found[1:]:
        assert all(torch.equal(some, same) for some, same in zip(other, found[0], strict=True))


@needs_kernel
@pytest.mark.parametrize("tokens", [1, 3])
def test_heads_of_any_size_stand_beside_each_other(tokens: int) -> None:
    """One with nearly all slots, one with none; a head gives the same bits whatever the others hold."""
    shares = torch.tensor([[0.9, 0.05, 0.0, 0.05], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    owner = shares.multinomial(2500, replacement=True)
    query, keys, values = (torch.randn(3, n, m, 32) for n, m in ((tokens, 8), (2500, 1), (2500, 1)))
    keys, values = keys[:, :, 0], values[:, :, 0]
    visible = torch.rand(3, tokens, 2500) < 0.9

    def attend(of: slice, owner: Tensor) -> Attended:
        blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner[None], 4)))
        leaf = (query[of], keys[of], values[of], visible[of])
        return operators.slot_attention(*leaf, 4, BOTH, blocks=blocks)

    got = attend(slice(None), owner)
    expected = window_attention(query, keys, values, visible, 4, owner, BOTH)
    for some, same in zip(got, expected, strict=True):
        torch.testing.assert_close(some, same, atol=1e-4, rtol=1e-4)
    for row in range(3):
        one = slice(row, row + 1)
        for some, same in zip(attend(one, owner[one]), got, strict=True):
            assert torch.equal(some, same[one])
        for head in range(4):  # the others give up what they have, or get what is free
            for nobody in (owner[one] != head, owner[one] == (head + 1) % 4):
                lonely = attend(one, owner[one].masked_fill(nobody, 4)).output
                mine = slice(2 * head, 2 * head + 2)
                assert torch.equal(lonely[:, :, mine], got.output[one, :, mine])


@needs_kernel
def test_fewer_threads_are_those_of_the_thread_that_asks(threads: Callable[[int], None]) -> None:
    """Also a thread that begins meanwhile has as many as torch has."""
    threads(3)
    cpu.load()
    cpu.use_threads(1)
    try:
        assert torch.get_num_threads() == 1
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        cpu.use_threads(3)
    assert torch.get_num_threads() == 3


@needs_kernel
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn])
@pytest.mark.parametrize("capacity", [5, 1200])
def test_a_number_that_is_not_finite_is_not_lost(capacity: int, stored: torch.dtype | None) -> None:
    visible = torch.ones(1, capacity, dtype=torch.bool)
    for which in range(3):
        leaf = [torch.randn(1, 1, 16), torch.randn(1, capacity, 16), torch.randn(1, capacity, 16)]
        leaf[which][0, -1, 3] = torch.nan
        if stored is not None:
            leaf[1:] = [x.to(stored) for x in leaf[1:]]
        assert operators.slot_attention(*leaf, visible, 1).output.isnan().any()


@needs_kernel
def test_every_code_of_float8_is_what_it_stands_for() -> None:
    """Those below the normal numbers, too. A softmax over one slot gives its value back."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[None, None]
    got = operators.slot_attention(
        torch.zeros(1, 1, 256), torch.zeros_like(values), values, torch.ones(1, 1, dtype=torch.bool), 1
    )
    torch.testing.assert_close(got.output[0, 0], values[0, 0].float(), equal_nan=True, rtol=0, atol=0)


@needs_kernel
def test_a_forked_process_attends(threads: Callable[[int], None]) -> None:
    """With one thread, as torch asks of forked processes that have used several."""
    query, keys, visible = torch.randn(4, 4, 64), torch.randn(4, 400, 64), torch.ones(4, 400) > 0
    threads(2)
    expected = operators.slot_attention(query, keys, keys, visible, 4).output
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        same = torch.equal(operators.slot_attention(query, keys, keys, visible, 4).output, expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


# How it is built


@pytest.fixture
def anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is built or loaded; where libraries would be kept."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for function in (cpu.load, operators.available):
        function.cache_clear()
    yield tmp_path
    for function in (cpu.load, operators.available):
        function.cache_clear()


def test_without_a_compiler_pictures_are_drawn_and_one_line_says_why(
    anew: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    decoder = arkv.Decoder(Tiny(), arkv.load_policy("linear", ratio="1/2"))
    prompts = decoder.model.example_prompts(2, 0)
    with pytest.warns(
        ArkvWarning, match="^attention is slower .* no C\\+\\+ compiler 'no-such-compiler'; [^\n]*$"
    ):
        tokens = decoder.generate(prompts, pixels=False).tokens
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error", ArkvWarning)
        arkv.Decoder(Tiny(), arkv.load_policy("full")).generate(prompts, pixels=False)
    monkeypatch.delenv("CXX")
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    for function in (cpu.load, operators.available):
        function.cache_clear()
    again = arkv.Decoder(Tiny(), arkv.load_policy("linear", ratio="1/2"))
    assert torch.equal(again.generate(prompts, pixels=False).tokens, tokens)


@needs_kernel
def test_a_compiler_that_fails_leaves_nothing_behind(anew: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(compiler: str, folder: Path) -> Path:
        (folder / "half.so").touch()
        raise RuntimeError("C++ compile error\n\nkernel.cpp:1: error: no such instruction\nand so on")

    monkeypatch.setattr(cpu, "build", broken)
    with pytest.warns(ArkvWarning, match="error: no such instruction$"):
        assert not operators.available(torch.device("cpu"))
    assert not list(anew.rglob("*.so"))


@needs_kernel
def test_of_processes_that_need_it_at_once_one_builds_it(
    anew: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def slow(compiler: str, folder: Path) -> Path:
        with (anew / "builds").open("a") as file:
            file.write("one\n")
        time.sleep(0.2)
        (folder / "new.so").write_text("library")
        return folder / "new.so"

    monkeypatch.setattr(cpu, "build", slow)
    children = []
    for _ in range(3):
        children.append(os.fork())
        if children[-1] == 0:
            os._exit(0 if cpu.built().read_text() == "library" else 1)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    assert (anew / "builds").read_text() == "one\n"
    assert capfd.readouterr().err.count("building the attention kernel") == 1
    assert len(list(anew.glob("*.so"))) == 1


@needs_kernel
def test_a_library_is_for_one_source_compiler_and_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = cpu.find_compiler()
    keys = {cpu.key(compiler)}
    for target, name, other in (
        (cpu, "_processor", lambda: ["flags: none"]),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (torch, "__version__", "9.9"),
        (cpu, "SOURCE", Path(__file__)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, other)
            keys.add(cpu.key(compiler))
    assert len(keys) == 5
    assert cpu.key(compiler) in keys
