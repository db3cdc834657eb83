"""The Triton kernels in Triton's interpreter, on the CPU.

`test_kernels.py` runs this file with TRITON_INTERPRET=1 in a process of its own: whoever imports the
kernels without the variable gets them compiled.
"""

import os
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Tiny
from torch import Tensor

from arkv import CachePlan, Store
from arkv.attention import reference as attention
from arkv.attention.blocks import Blocks, blocks_of, owners_of
from arkv.attention.quantization import PACKED
from arkv.attention.quantization import dequantize as exactly
from arkv.attention.quantization import quantize as rounded
from arkv.attention.window import window_attention

LAZY = "arkv.attention.triton_kernels" not in sys.modules
assert os.environ.get("TRITON_INTERPRET") == "1"

import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from arkv.attention import triton_kernels  # noqa: E402
from arkv.attention.triton_kernels import attend, launches_of  # noqa: E402
from arkv.attention.tunables import Tuning  # noqa: E402
from arkv.errors import ArkvError  # noqa: E402
from arkv.weights.quantization import WeightDtype, dequantize, quantize  # noqa: E402
from arkv.weights.triton_kernels import multiply  # noqa: E402

BOTH = frozenset({"mass", "scores"})
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Attended = attention.Attended


@pytest.fixture(scope="session", autouse=True)
def loops_that_numpy_allows() -> None:
    """Triton 3.6 turns arrays of one element into bounds of loops, numpy 2.4 does not (triton #9171)."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # type: ignore[attr-defined]

    interpreter._patch_lang_tensor = patched


@pytest.fixture(scope="session", autouse=True)
def products_of_bfloat16() -> None:
    """The interpreter keeps bfloat16 as whole numbers of 16 bits, and would multiply these."""
    builder, product = interpreter.InterpreterBuilder, interpreter.InterpreterBuilder.create_dot

    def widened(self: object, *arguments: Any) -> object:
        factors = [
            builder.cast_impl(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in arguments[:2]
        ]
        return product(self, *factors, *arguments[2:])

    builder.create_dot = widened


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chance(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    rows: int, heads: int, slots: int, head_dim: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    shapes = ((rows, heads, head_dim), (rows, slots, head_dim), (rows, slots, head_dim))
    return [normal(*shape, seed=seed + i).to(dtype) for i, shape in enumerate(shapes)]


def by_kernel(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    blocks: Blocks | None,
    kv_heads: int,
    needs: frozenset[str] = BOTH,
    tuning: Tuning | None = None,
    **scales: Tensor,
) -> Attended:
    # Not zero: what ought to be written and is not stands out. Wider than the pool, as layers may be.
    mass, scores = (
        torch.full((*visible.shape[:-1], visible.shape[-1] + 3), 7.0) if name in needs else None
        for name in ("mass", "scores")
    )
    key_scale, value_scale = scales.get("key_scale"), scales.get("value_scale")
    output = attend(
        query, keys, values, visible, blocks, kv_heads, mass, scores, key_scale, value_scale, tuning
    )
    for room in (mass, scores):
        assert room is None or bool((room[..., visible.shape[-1] :] == 7).all())
    return Attended(output, *(room if room is None else room[..., :-3] for room in (mass, scores)))


def by_eager(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    blocks: Blocks | None,
    kv_heads: int,
    needs: frozenset[str] = BOTH,
) -> Attended:
    """In float32, as the kernels count."""
    wide = query.float(), keys.float(), values.float(), visible
    if blocks is None:
        found = attention.slot_attention(*wide, kv_heads, needs)
    else:
        owner = owners_of(blocks, keys.shape[1], kv_heads)
        found = attention.ragged_attention(*wide, owner, kv_heads, needs)
    return found._replace(output=found.output.to(query.dtype))


# Of the output, where matrix products take the weights of a softmax in the type of the values.
ROUNDED = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


def close(got: Attended, expected: Attended, grouped: bool = False) -> None:
    tolerance = {"atol": ROUNDED[got.output.dtype], "rtol": 2e-2} if grouped else {}
    torch.testing.assert_close(got.output, expected.output, **tolerance)
    for some, same in zip(got[1:], expected[1:], strict=True):
        assert (some is None) == (same is None)
        if some is not None:
            torch.testing.assert_close(some, same, atol=1e-5, rtol=1e-5)


def dealt(rows: int, slots: int, kv_heads: int, seed: int) -> Blocks:
    """Blocks of slots that belong to any head; some to nobody."""
    owner = (chance(rows, slots, seed=seed) * (kv_heads + 0.1)).long()
    return Blocks(*(leaf[0] for leaf in blocks_of(owner[None], kv_heads)))


def test_the_kernels_are_not_imported_with_the_operators() -> None:
    assert LAZY


@pytest.mark.parametrize("layout", ["equal", "unequal"])
@pytest.mark.parametrize("head_dim", [64, 100, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_kernel_gives_what_the_plain_function_gives(dtype: torch.dtype, head_dim: int, layout: str) -> None:
    # Every width and dtype with one, two and four query heads to a key head among them.
    group = (1, 2, 4)[([64, 100, 128].index(head_dim) + DTYPES.index(dtype)) % 3]
    tensors = inputs(2, 2 * group, 2 * 37, head_dim, dtype)
    visible = chance(2, 74, seed=9) < 0.7
    blocks = dealt(2, 74, 2, seed=8) if layout == "unequal" else None
    close(by_kernel(*tensors, visible, blocks, 2), by_eager(*tensors, visible, blocks, 2), group > 1)


tunings = st.builds(
    Tuning,
    tile=st.sampled_from([8, 16, 32]),
    threads=st.sampled_from([2, 8]),
    warps=st.sampled_from([1, 2, 4]),
    stages=st.just(1),
    part=st.sampled_from([16, 48, 256]),
)


@settings(max_examples=15)
@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    capacity=st.sampled_from([1, 5, 15, 16, 17, 48, 70]),
    unequal=st.booleans(),
    seen=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    needs=st.sampled_from([frozenset(), frozenset({"mass"}), frozenset({"scores"}), BOTH]),
    tuning=tunings,
    seed=st.integers(0, 1000),
)
def test_any_shape(
    rows: int,
    kv_heads: int,
    group: int,
    capacity: int,
    unequal: bool,
    seen: float,
    needs: frozenset[str],
    tuning: Tuning,
    seed: int,
) -> None:
    slots = kv_heads * capacity
    tensors = inputs(rows, kv_heads * group, slots, 8, seed=seed)
    visible = chance(rows, slots, seed=seed + 3) < seen
    blocks = dealt(rows, slots, kv_heads, seed + 4) if unequal else None
    if blocks is not None:
        # Slots of nobody are never visible in a store.
        owned = torch.zeros_like(visible).scatter_add(1, blocks.slot, blocks.filled)
        visible &= owned
    got = by_kernel(*tensors, visible, blocks, kv_heads, needs, tuning)
    close(got, by_eager(*tensors, visible, blocks, kv_heads, needs))
    for found in got[1:]:
        assert found is None or not found[~visible].any()


@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_however_the_slots_are_split_the_parts_make_one_whole(layout: str) -> None:
    """Ten blocks a head: a program takes all of them, eight, three, or one."""
    tensors = inputs(1, 4, 2 * 160, 8)
    # One slot far above the others, and parts that see nothing.
    tensors[1][0, 17] *= 30
    visible = chance(1, 320, seed=3) < 0.5
    visible[0, 50:150] = False
    blocks = dealt(1, 320, 2, seed=4) if layout == "unequal" else None
    expected = by_eager(*tensors, visible, blocks, 2)
    for part in (256, 128, 48, 16):
        tuning = Tuning(tile=16, threads=8, warps=1, stages=1, part=part)
        close(by_kernel(*tensors, visible, blocks, 2, tuning=tuning), expected)


def test_more_slots_than_the_second_kernel_takes_at_a_time() -> None:
    tensors = inputs(1, 2, 2 * 1100, 4)
    visible = chance(1, 2200, seed=3) < 0.5
    owner = torch.arange(2200)[None] // 2150  # nearly all of one head
    for blocks in (None, Blocks(*(leaf[0] for leaf in blocks_of(owner[None], 2)))):
        close(by_kernel(*tensors, visible, blocks, 2), by_eager(*tensors, visible, blocks, 2))


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_a_row_gives_the_same_bits_alone_and_in_any_batch(layout: str, group: int) -> None:
    """In one part and in several, at any place, beside rows that see other slots."""
    query, keys, values = inputs(4, 2 * group, 2 * 40, 8, torch.bfloat16)
    visible = chance(4, 80, seed=3) < 0.5
    blocks = dealt(4, 80, 2, seed=4) if layout == "unequal" else None
    for part in (48, 16):
        tuning = Tuning(tile=16, threads=8, warps=1, stages=1, part=part)
        every = by_kernel(query, keys, values, visible, blocks, 2, tuning=tuning)
        for rows in ([2], [3, 2]):
            some = None if blocks is None else Blocks(*(leaf[rows] for leaf in blocks))
            alone = by_kernel(query[rows], keys[rows], values[rows], visible[rows], some, 2, tuning=tuning)
            for got, expected in zip(alone, every, strict=True):
                assert torch.equal(got, expected[rows])


def test_a_launch_is_cut_by_slots_and_not_by_rows() -> None:
    """Nothing but one axis of the grid knows how many rows there are."""

    def cut(rows: int, unequal: bool) -> list[object]:
        tensors = [x.to("meta") for x in inputs(rows, 4, 4 * 300, 8)]
        visible = torch.ones(rows, 1200, dtype=torch.bool, device="meta")
        blocks = None
        if unequal:
            blocks = Blocks(*(x.to("meta") for x in dealt(1, 1200, 4, seed=1)))
        mass = torch.empty(rows, 1200, device="meta")
        _, launches = launches_of(*tensors, visible, blocks, 4, mass, None, None, None)
        sizes = [
            {name: value for name, value in launch.arguments.items() if isinstance(value, int)}
            for launch in launches
        ]
        grids = [[n for n in launch.grid if n != rows] for launch in launches]
        return [sizes, grids, [launch.options for launch in launches]]

    for unequal in (False, True):
        assert cut(1009, unequal) == cut(17, unequal)


@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_what_is_hidden_is_not_read(layout: str) -> None:
    """A NaN that is read would be in every number of its head, for zero times a NaN is one."""
    query, keys, values = inputs(2, 4, 2 * 70, 8)
    visible = chance(2, 140, seed=3) < 0.5
    visible[0, 32:70] = visible[0, 70:102] = False  # whole tiles: the last of one head, the first of another
    visible[1, 70:] = False  # a whole head
    blocks = dealt(2, 140, 2, seed=4) if layout == "unequal" else None
    if blocks is not None:
        visible &= torch.zeros_like(visible).scatter_add(1, blocks.slot, blocks.filled)
    expected = by_kernel(query, keys, values, visible, blocks, 2)
    for leaf in (keys, values):
        leaf[~visible] = torch.nan
    got = by_kernel(query, keys, values, visible, blocks, 2)
    for some, same in zip(got, expected, strict=True):
        assert some is not None
        assert some.isfinite().all()
        assert torch.equal(some, same)


@pytest.mark.parametrize("layout", ["equal", "unequal"])
def test_heads_that_see_nothing_give_zeros(layout: str) -> None:
    tensors = inputs(2, 4, 2 * 20, 8)
    visible = torch.ones(2, 40, dtype=torch.bool)
    visible[0] = False
    owner = torch.arange(40).div(20, rounding_mode="floor").expand(2, -1)
    visible[1, :20] = False
    blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner[None], 2))) if layout == "unequal" else None
    got = by_kernel(*tensors, visible, blocks, 2)
    assert not got.output[0].any()
    assert not got.output[1, :2].any()
    assert got.output[1, 2:].all()
    assert got.mass is not None
    assert got.mass.sum().item() == pytest.approx(2)


def test_a_number_that_is_not_finite_is_not_lost() -> None:
    """The decoder looks for it in what comes out."""
    for which in (0, 1, 2):
        tensors = inputs(1, 2, 40, 8)
        tensors[which][0, 0, 3] = torch.nan
        visible = torch.ones(1, 40, dtype=torch.bool)
        assert by_kernel(*tensors, visible, None, 1).output[0, 0].isnan().any()


@pytest.mark.parametrize("height", [100.0, 1e15])
def test_scores_are_exponentiated_without_overflow(height: float) -> None:
    query, values = torch.full((1, 1, 4), height), normal(1, 48, 4, seed=0)
    tuning = Tuning(tile=16, threads=8, warps=1, stages=1, part=16)
    for best in (0, 20, 47):
        keys = torch.full((1, 48, 4), -height)
        keys[0, best] = height
        got = by_kernel(query, keys, values, torch.ones(1, 48, dtype=torch.bool), None, 1, tuning=tuning)
        torch.testing.assert_close(got.output[0, 0], values[0, best])
        assert got.mass is not None
        assert got.mass[0].nonzero().tolist() == [[best]]


@pytest.mark.parametrize("shared", [False, True])
def test_unequal_heads_of_a_store(shared: bool) -> None:
    """Both kinds of plan, all layers, with free slots, and the shared pool after it has changed hands."""
    spec = Tiny(heads=6, kv_heads=3).spec
    plan = CachePlan(((9, 40, 3), (20, 4, 3)), 5, shared)
    store = Store(spec, plan, 2, 3, {}, torch.bfloat16)
    store.reset_(torch.tensor([[True, True, True], [False, True, True]]))
    period = plan.period
    slots = torch.stack(
        [
            torch.stack([starts + 3 + n for n in range(period)], -1).expand(2, -1, -1)
            for starts in store.starts
        ]
    )
    store.free_(slots)
    other = slots.clone()
    other[:, 1] = slots[:, 1].flip(1)
    store.assign_(other)
    for token in range(period - 1):
        store.claim_(slots[..., token], torch.tensor(token))
    assert store.blocks is not None
    for layer, pool in enumerate(store.pools):
        keys, values = (normal(2, pool, spec.head_dim, seed=i).bfloat16() for i in (layer, layer + 5))
        store.keys[layer].copy_(keys)
        store.values[layer].copy_(values)
        query = normal(2, 6, spec.head_dim, seed=layer + 10).bfloat16()
        blocks, visible = Blocks(*(leaf[layer] for leaf in store.blocks)), store.resident[layer, :, :pool]
        close(
            by_kernel(query, store.keys[layer], store.values[layer], visible, blocks, 3),
            by_eager(query, keys, values, visible, blocks, 3),
            grouped=True,
        )


@pytest.mark.parametrize("layout", ["equal", "unequal"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_eight_bits_are_multiplied_by_the_scale_of_their_slot(dtype: torch.dtype, layout: str) -> None:
    query, *wide = inputs(2, 4, 2 * 37, 8)
    scales = [leaf.abs().amax(-1) / (127 if dtype == torch.int8 else 448) for leaf in wide]
    narrow = [
        (leaf / scale[..., None]).clamp(-127, 127).to(dtype)
        if dtype == torch.int8
        # Whole numbers to 16 are exact in it, so that only the scale has to be right.
        else (leaf / scale[..., None]).to(dtype)
        for leaf, scale in zip(wide, scales, strict=True)
    ]
    visible = chance(2, 74, seed=9) < 0.7
    blocks = dealt(2, 74, 2, seed=8) if layout == "unequal" else None
    keys, values = (leaf.float() * scale[..., None] for leaf, scale in zip(narrow, scales, strict=True))
    got = by_kernel(query, *narrow, visible, blocks, 2, key_scale=scales[0], value_scale=scales[1])
    close(got, by_eager(query, keys, values, visible, blocks, 2))
    assert got.output.dtype == query.dtype


@pytest.mark.parametrize("layout", ["equal", "unequal"])
@pytest.mark.parametrize(("heads", "head_dim"), [(2, 8), (2, 64), (4, 32), (6, 96), (2, 128)])
def test_four_bits_have_the_scale_and_the_zero_of_their_group(heads: int, head_dim: int, layout: str) -> None:
    """One query a head and several; where it is hidden, what stands beside the codes is no number."""
    query, *wide = inputs(2, heads, 2 * 37, head_dim)
    (keys, key_scale), (values, value_scale) = (rounded(leaf, PACKED) for leaf in wide)
    visible = chance(2, 74, seed=9) < 0.7
    blocks = dealt(2, 74, 2, seed=8) if layout == "unequal" else None
    exact = [exactly(*leaf, torch.float32) for leaf in ((keys, key_scale), (values, value_scale))]
    expected = by_eager(query, *exact, visible, blocks, 2)
    for scale in (key_scale, value_scale):
        scale[~visible] = torch.nan
    got = by_kernel(query, keys, values, visible, blocks, 2, key_scale=key_scale, value_scale=value_scale)
    close(got, expected, grouped=heads > 2)


def test_views_that_a_loop_hands_over() -> None:
    """What may be looked at is cut from a wider tensor; rows have one layout in common, or each its own."""
    _, keys, values = inputs(3, 2, 50, 8)
    query = normal(3, 8, 2, seed=5).transpose(1, 2)
    visible = (chance(3, 61, seed=6) < 0.5)[:, :50]
    owner = torch.arange(50) // torch.tensor([33, 40, 25])[:, None]
    for rows in (1, 3):
        blocks = Blocks(*(leaf[0] for leaf in blocks_of(owner[None, :rows], 2)))
        close(
            by_kernel(query, keys, values, visible, blocks, 2),
            by_eager(query, keys, values, visible, blocks, 2),
        )
    close(by_kernel(query, keys, values, visible, None, 2), by_eager(query, keys, values, visible, None, 2))


# A window of tokens


@pytest.mark.parametrize("layout", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("tokens", "group", "stored", "most", "needs"),
    [
        (3, 1, torch.float32, 64, BOTH),
        (5, 2, torch.float32, 4, frozenset({"mass"})),
        (2, 3, torch.int8, 64, BOTH),
        (3, 1, torch.float8_e4m3fn, 2, frozenset()),
        (3, 2, PACKED, 4, BOTH),
    ],
)
def test_a_window_gives_what_the_plain_function_gives(
    tokens: int, group: int, stored: torch.dtype, most: int, needs: frozenset[str], layout: str
) -> None:
    """In several parts, by programs of all queries and of some, where what no token sees is no number."""
    capacity, part, seen, seed = 20, 16, 0.4, tokens
    rows, kv_heads, slots = 1, 2, 2 * capacity
    query = normal(rows, tokens, kv_heads * group, 8, seed=seed)
    keys, values = normal(2, rows, slots, 8, seed=seed + 1)
    scales = {}
    if stored != torch.float32:
        (keys, scales["key_scale"]), (values, scales["value_scale"]) = (
            rounded(leaf, stored) for leaf in (keys, values)
        )
    visible = chance(rows, tokens, slots, seed=seed + 2) < seen
    blocks, owner = None, None
    if layout == "unequal":
        blocks = dealt(rows, slots, kv_heads, seed + 3)
        visible &= torch.zeros(rows, slots, dtype=torch.bool).scatter_add(1, blocks.slot, blocks.filled)[
            :, None
        ]
        owner = owners_of(blocks, slots, kv_heads)
    expected = window_attention(query, keys, values, visible, kv_heads, owner, needs, **scales)
    if stored == torch.float32:
        keys[~visible.any(1)] = values[~visible.any(1)] = torch.nan
    tuning = Tuning(tile=8, threads=8, warps=2, stages=1, part=part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "MOST_QUERIES", most)
        got = by_kernel(query, keys, values, visible, blocks, kv_heads, needs, tuning, **scales)
    close(got, expected, grouped=stored != torch.float32)


def test_a_token_of_a_window_gives_the_same_bits_in_any_batch() -> None:
    query, (keys, values) = normal(2, 3, 2, 8, seed=0).bfloat16(), normal(2, 2, 40, 8, seed=1).bfloat16()
    visible = chance(2, 3, 40, seed=2) < 0.5
    every = by_kernel(query, keys, values, visible, None, 2)
    alone = by_kernel(query[1:2], keys[1:2], values[1:2], visible[1:2], None, 2)
    for got, expected in zip(alone, every, strict=True):
        assert torch.equal(got, expected[1:2])


@pytest.mark.parametrize("wrong", ["keys", "heads", "slots"])
def test_what_the_kernels_cannot_read_is_refused(wrong: str) -> None:
    query, keys, values = inputs(1, 4, 40, 8)
    if wrong == "keys":
        keys = normal(1, 8, 40, seed=0).transpose(1, 2)
    kv_heads = {"keys": 2, "heads": 3, "slots": 4}[wrong]
    slots = 38 if wrong == "slots" else 40
    visible = torch.ones(1, slots, dtype=torch.bool)
    with pytest.raises(ArkvError, match="contiguous" if wrong == "keys" else "divide"):
        attend(query, keys[:, :slots], values[:, :slots], visible, None, kv_heads, None, None, None, None)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "outer"), [(1, 256, 48), (3, 96, 16), (70, 192, 80)])
def test_weights_of_few_bits_are_multiplied_as_the_numbers_that_their_codes_stand_for(
    kind: WeightDtype, dtype: torch.dtype, rows: int, columns: int, outer: int
) -> None:
    """Also where rows of input and weight fill no tile, and columns no step."""
    codes, scales = quantize(normal(outer, columns, seed=0), kind, dtype)
    x = normal(rows, columns, seed=1).to(dtype)
    exact = x.double() @ dequantize(codes, scales.double(), kind).T
    got = multiply(x, codes, scales)
    assert got.dtype == dtype
    # The interpreter cuts bfloat16 off where a GPU rounds.
    off = 2 * torch.finfo(dtype).eps * exact.abs().max()
    torch.testing.assert_close(got.double(), exact, atol=float(off), rtol=0)
