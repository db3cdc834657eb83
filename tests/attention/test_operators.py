"""The operators: on the CPU, in graphs, and, where there is one, on a GPU."""

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from arkv.attention import operators as kernels
from arkv.attention import reference
from arkv.attention.blocks import BLOCK, Blocks, blocks_of, owners_of
from arkv.attention.reference import Attended

BOTH = frozenset({"mass", "scores"})

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; a CPU build of torch does not bring it"
)
needs_gpu = pytest.mark.skipif(
    not kernels.available(torch.device("cuda")) or not torch.cuda.is_available(), reason="needs a CUDA GPU"
)
layouts = pytest.mark.parametrize("layout", ["equal", "unequal"])


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def case(
    layout: str,
    rows: int = 2,
    kv_heads: int = 2,
    group: int = 2,
    capacity: int = 37,
    head_dim: int = 8,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Any]:
    """Arguments up to the key heads, for slots in either layout."""
    slots = kv_heads * capacity
    query = normal(rows, kv_heads * group, head_dim, seed=0)
    keys, values = (normal(rows, slots, head_dim, seed=seed) for seed in (1, 2))
    visible = normal(rows, slots, seed=3) < 0.7
    tables: tuple[Tensor, ...] = ()
    if layout == "unequal":
        owner = normal(1, slots, seed=4).abs().long().clamp(max=kv_heads - 1)
        tables = Blocks(*(leaf[0] for leaf in blocks_of(owner[None], kv_heads)))
    tensors = [*(x.to(dtype) for x in (query, keys, values)), visible, *tables]
    return [*(x.to(device) for x in tensors), kv_heads]


def functions(layout: str) -> tuple[Any, Any]:
    """The operator's function and its specification, for the same arguments."""
    if layout == "equal":
        return kernels.slot_attention, reference.slot_attention

    def operator(
        query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *rest: Any, **rooms: Any
    ) -> Attended:
        *blocks, kv_heads = rest[:4]
        return kernels.slot_attention(
            query, keys, values, visible, kv_heads, *rest[4:], **rooms, blocks=Blocks(*blocks)
        )

    def plain(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, *rest: Any) -> Attended:
        *blocks, kv_heads = rest[:4]
        owner = owners_of(Blocks(*blocks), keys.shape[1], kv_heads)
        return reference.ragged_attention(query, keys, values, visible, owner, kv_heads, *rest[4:])

    return operator, plain


def all_close(got: Attended, expected: Attended, atol: float = 1e-5, rtol: float = 1e-5) -> None:
    for some, same in zip(got, expected, strict=True):
        assert (some is None) == (same is None)
        if some is not None and same is not None:
            torch.testing.assert_close(some, same, atol=atol, rtol=rtol, check_device=False)


# The operators, as every device has them


@layouts
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"mass"}), BOTH], ids=len)
def test_on_a_cpu_an_operator_is_the_plain_function(layout: str, needs: frozenset[str]) -> None:
    """Whether it has a kernel there or not."""
    kernels.available(torch.device("cpu"))
    operator, plain = functions(layout)
    arguments = case(layout)
    expected = plain(*arguments, needs)
    all_close(operator(*arguments, needs), expected)
    *leaf, kv_heads = arguments
    mass, scores = (torch.zeros(leaf[3].shape) if name in needs else None for name in ("mass", "scores"))
    tables = leaf[4:] or (None, None, None)
    output = kernels._anywhere(*leaf[:4], kv_heads, None, None, *tables, mass, scores)
    assert torch.equal(output, expected.output)
    for some, same in ((mass, expected.mass), (scores, expected.scores)):
        assert some is same is None or torch.equal(some, same)


@layouts
def test_mass_and_scores_are_written_where_the_caller_wants_them(layout: str) -> None:
    """Into one layer's part of a tensor for all layers, which is as wide as the widest."""
    operator, plain = functions(layout)
    arguments = case(layout)
    room = torch.full((2, 3, 2, 80), -1.0)
    got = operator(*arguments, BOTH, mass=room[0, 1], scores=room[1, 1])
    expected = plain(*arguments, BOTH)
    all_close(Attended(got.output, room[0, 1, :, :74], room[1, 1, :, :74]), expected)
    room[:, 1, :, :74] = -1
    assert bool((room == -1).all())
    assert got.mass.data_ptr() == room[0, 1].data_ptr()


@layouts
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_with_a_scale_are_what_they_stand_for(layout: str, dtype: torch.dtype) -> None:
    operator, plain = functions(layout)
    query, keys, values, *rest = case(layout)
    scales = [leaf.abs().amax(-1) / 127 for leaf in (keys, values)]
    narrow = [(x / s[..., None]).to(dtype) for x, s in zip((keys, values), scales, strict=True)]
    wide = [x.float() * s[..., None] for x, s in zip(narrow, scales, strict=True)]
    for query_dtype in (torch.float32, torch.bfloat16):
        cast = query.to(query_dtype)
        got = operator(cast, *narrow, *rest, BOTH, key_scale=scales[0], value_scale=scales[1])
        assert got.output.dtype == query_dtype
        # What the plain function rounds to the narrow type on the way, a kernel need not.
        tolerance = 1e-5 if query_dtype == torch.float32 else 3e-2
        all_close(got, plain(cast, *(x.to(query_dtype) for x in wide), *rest, BOTH), tolerance, tolerance)


def rooms(arguments: list[Any], written: bool, scaled: bool) -> tuple[Tensor | None, ...]:
    """Where mass and scores go, and the scales."""
    visible = arguments[3]
    mass, scores = (torch.zeros(visible.shape) if written else None for _ in range(2))
    key_scale, value_scale = (torch.rand(visible.shape) + 1 if scaled else None for _ in range(2))
    return mass, scores, key_scale, value_scale


@layouts
@pytest.mark.parametrize(("written", "scaled"), [(False, False), (True, False), (True, True)])
def test_operators_say_the_truth_about_themselves(layout: str, written: bool, scaled: bool) -> None:
    """What they write, what they return, and that graphs may take both for granted."""
    *leaf, kv_heads = case(layout, capacity=5)
    *leaf, slot, filled, head = leaf if layout == "unequal" else [*leaf, None, None, None]
    mass, scores, *scales = rooms(leaf, written, scaled)
    given = (*leaf, kv_heads, *scales, slot, filled, head)
    if written:
        torch.library.opcheck(torch.ops.arkv.observed_attention, (*given, mass, scores))
    else:
        torch.library.opcheck(torch.ops.arkv.slot_attention, given)


@pytest.mark.parametrize("limited", [False, True])
def test_the_operator_of_visible_slots_says_the_truth_about_itself(limited: bool) -> None:
    position = torch.randint(-3, 9, (2, 3, 40), dtype=torch.int32)
    limit = torch.rand(2, 1, 40) < 0.5 if limited else None
    torch.library.opcheck(torch.ops.arkv.visible_slots, (position, -2, limit))


@layouts
def test_an_operator_within_a_graph_is_the_plain_function(layout: str) -> None:
    """One graph; mass lands in memory that the graph was given, and in memory of its own."""
    torch._dynamo.reset()
    operator, plain = functions(layout)

    def step(arguments: list[Any], mass: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        doubled = [arguments[0] * 2, *arguments[1:]]
        first = operator(*doubled, frozenset({"mass"}), mass=mass)
        second = operator(*doubled, BOTH)
        nobody_looks = operator(*doubled)
        return (first.output + nobody_looks.output) / 2 + 1, second.mass + 1, second.scores

    traced = torch.compile(step, fullgraph=True, dynamic=False)
    arguments = case(layout)
    with torch.inference_mode():
        for seed in (5, 6):
            arguments[0] = normal(*arguments[0].shape, seed=seed)
            room = torch.full((3, *arguments[3].shape), -1.0)
            with torch.compiler.set_stance("default" if seed == 5 else "fail_on_recompile"):
                got = traced(arguments, room[1])
            expected = plain(arguments[0] * 2, *arguments[1:], BOTH)
            assert expected.mass is not None
            all_close(Attended(*got), Attended(expected.output + 1, expected.mass + 1, expected.scores))
            torch.testing.assert_close(room[1], expected.mass)
            assert bool((room[::2] == -1).all())
    torch._dynamo.reset()


# The kernels on a GPU

# What is summed in another order, and what the plain functions round to the narrow type on the way.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@needs_gpu
@layouts
@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gpu_a_kernel_gives_what_the_plain_function_gives(
    dtype: torch.dtype, head_dim: int, layout: str
) -> None:
    operator, plain = functions(layout)
    # Every width and dtype with one to eight query heads to a key head among them.
    group = (1, 2, 4, 8)[([64, 100, 128].index(head_dim) + list(TOLERANCE).index(dtype)) % 4]
    for rows, capacity in ((1, 1), (2, 37), (3, 700), (40, 333)):
        arguments = case(layout, rows, 3, group, capacity, head_dim, dtype, "cuda")
        wide = [x.float() if x.is_floating_point() else x for x in arguments[:-1]]
        got, expected = operator(*arguments, BOTH), plain(*wide, arguments[-1], BOTH)
        assert got.output.dtype == dtype
        torch.testing.assert_close(got.output.float(), expected.output, atol=TOLERANCE[dtype], rtol=1e-2)
        all_close(got._replace(output=expected.output), expected, atol=1e-4, rtol=1e-4)
        again = operator(*arguments, BOTH)
        assert all(torch.equal(some, same) for some, same in zip(again, got, strict=True))


@needs_gpu
@layouts
@pytest.mark.parametrize("group", [1, 4])
def test_gpu_a_row_gives_the_same_bits_alone_and_in_any_batch(group: int, layout: str) -> None:
    operator, _ = functions(layout)
    for capacity in (144, 700):
        arguments = case(layout, 300, 3, group, capacity, 128, torch.bfloat16, "cuda")
        every = operator(*arguments, BOTH)
        for rows in (slice(0, 1), slice(7, 24)):
            # What is common to all rows is cut to none of them.
            cut = [x[rows] if isinstance(x, Tensor) and len(x) == 300 else x for x in arguments]
            for got, expected in zip(operator(*cut, BOTH), every, strict=True):
                assert torch.equal(got, expected[rows])


@needs_gpu
@layouts
def test_gpu_what_is_hidden_is_not_read(layout: str) -> None:
    operator, _ = functions(layout)
    query, keys, values, visible, *rest = case(layout, capacity=20 * BLOCK, head_dim=128, device="cuda")
    visible[:, 5 * BLOCK : 20 * BLOCK] = False
    expected = operator(query, keys, values, visible, *rest, BOTH)
    for leaf in (keys, values):
        leaf[~visible] = torch.nan
    got = operator(query, keys, values, visible, *rest, BOTH)
    assert all(torch.equal(some, same) for some, same in zip(got, expected, strict=True))


@needs_gpu
@layouts
def test_gpu_a_number_that_is_not_finite_is_not_lost(layout: str) -> None:
    """The decoder looks for it in what comes out; the interpreter's maximum is another than a GPU's."""
    operator, _ = functions(layout)
    for which in (0, 1, 2):
        arguments = case(layout, rows=1, kv_heads=1, device="cuda")
        arguments[3][:] = True
        arguments[which][0, 0, 3] = torch.nan
        assert operator(*arguments).output[0, 0].isnan().any()


@needs_gpu
@layouts
def test_gpu_a_captured_kernel_follows_its_inputs_and_nothing_waits(layout: str) -> None:
    operator, plain = functions(layout)
    arguments = case(layout, capacity=333, head_dim=128, device="cuda")
    mass = torch.zeros(3, *arguments[3].shape, device="cuda")[1]
    with torch.inference_mode():
        operator(*arguments, frozenset({"mass"}), mass=mass)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = operator(*arguments, frozenset({"mass"}), mass=mass).output
        arguments[0].copy_(normal(*arguments[0].shape, seed=9))
        arguments[3].logical_not_()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            operator(*arguments, frozenset({"mass"}), mass=mass)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = plain(*arguments, frozenset({"mass"}))
    torch.testing.assert_close(output, expected.output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(mass, expected.mass, atol=1e-4, rtol=1e-4)
