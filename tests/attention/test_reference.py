from collections.abc import Sequence

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Entry, attend
from torch import Tensor

from arkv.attention.reference import Attended, causal_attention, ragged_attention, slot_attention

BOTH = frozenset({"mass", "scores"})


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor | None, expected: Tensor | None) -> None:
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def all_close(got: Attended, expected: Attended) -> None:
    for some, same in zip(got, expected, strict=True):
        close(some, same)


def over_lists(
    query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, owner: Tensor, kv_heads: int
) -> Attended:
    """In float64, head by head over a Python list of the slots it owns; nothing seen gives zeros."""
    rows, heads, _ = query.shape
    output, (mass, scores) = numpy.zeros(query.shape), numpy.zeros((2, *visible.shape))
    exact_query, exact_keys, exact_values = (x.double().numpy() for x in (query, keys, values))
    for row, head in numpy.ndindex(rows, heads):
        mine = (owner[row] == head // (heads // kv_heads)) & visible[row]
        slots = mine.nonzero()[:, 0].tolist()
        if not slots:
            continue
        held = [Entry(slot, exact_keys[row, slot], exact_values[row, slot]) for slot in slots]
        output[row, head], weights = attend(exact_query[row, head], held)
        mass[row, slots] += weights
        scores[row, slots] += exact_keys[row, slots] @ exact_query[row, head] / query.shape[-1] ** 0.5
    return Attended(*(torch.from_numpy(x).float() for x in (output, mass, scores)))


def dealt(sizes: Sequence[Sequence[int]], seed: int) -> Tensor:
    """Owners of slots in any order, int64 `[rows, slots]`: of each head as many as asked for.

    Rows with fewer slots than the others are filled up with slots of nobody.
    """
    slots, nobody = max(1, *map(sum, sizes)), len(sizes[0])
    rows = []
    for index, row in enumerate(sizes):
        heads = [head for head, size in enumerate(row) for _ in range(size)]
        owners = torch.tensor(heads + [nobody] * (slots - len(heads)))
        rows.append(owners[normal(slots, seed=seed + index).argsort()])
    return torch.stack(rows)


# Slots of heads that all have as many


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    capacity=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_a_query_over_slots_is_softmax_attention_over_what_it_may_see(
    rows: int, kv_heads: int, group: int, capacity: int, seed: int
) -> None:
    query = normal(rows, kv_heads * group, 4, seed=seed)
    keys, values = (normal(rows, kv_heads * capacity, 4, seed=seed + i) for i in (1, 2))
    visible = normal(rows, kv_heads * capacity, seed=seed + 3) > 0
    visible[:, ::capacity] = True
    owner = torch.arange(kv_heads).repeat_interleave(capacity).expand(rows, -1)
    attended = slot_attention(query, keys, values, visible, kv_heads, BOTH)
    all_close(attended, over_lists(query, keys, values, visible, owner, kv_heads))
    assert torch.equal(attended.mass == 0, ~visible)
    assert attended.scores is not None
    assert not attended.scores[~visible].any()


@pytest.mark.parametrize(
    "asked",
    [frozenset(), frozenset({"mass"}), frozenset({"scores"}), BOTH],
    ids=lambda names: "+".join(sorted(names)),
)
def test_only_what_is_asked_for_is_computed(asked: frozenset[str]) -> None:
    seen, owner = torch.ones(1, 3, dtype=torch.bool), torch.zeros(1, 3, dtype=torch.long)
    query, slots = normal(1, 2, 4, seed=0), normal(1, 3, 4, seed=1)
    dense = query, slots, slots, seen, 1
    ragged = query, slots, slots, seen, owner, 1
    for attention, arguments in ((slot_attention, dense), (ragged_attention, ragged)):
        some, whole = attention(*arguments, asked), attention(*arguments, BOTH)
        assert torch.equal(some.output, whole.output)
        for name in ("mass", "scores"):
            assert (getattr(some, name) is not None) == (name in asked)
            assert name not in asked or torch.equal(getattr(some, name), getattr(whole, name))
    assert attention(*arguments)[1:] == (None, None)


def test_scores_are_exponentiated_without_overflow() -> None:
    query = torch.full((1, 1, 4), 100.0)
    keys = torch.stack([torch.full((4,), 100.0), torch.full((4,), -100.0)])[None]
    seen = torch.ones(1, 2, dtype=torch.bool)
    attended = slot_attention(query, keys, keys, seen, 1, BOTH)
    assert torch.equal(attended.output, query)
    assert attended.mass is not None
    assert attended.mass.tolist() == [[1.0, 0.0]]
    assert attended.scores is not None
    assert attended.scores.tolist() == [[2e4, -2e4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_come_back_narrow_with_the_rest_in_float32(dtype: torch.dtype) -> None:
    seen = torch.ones(1, 40, dtype=torch.bool)
    query, slots = normal(1, 4, 4, seed=0), normal(1, 40, 4, seed=1)
    narrow = query.to(dtype), slots.to(dtype), slots.to(dtype)
    owner = torch.arange(2).repeat_interleave(20)[None]
    exact = slot_attention(query, slots, slots, seen, 2, BOTH)
    for attended in (
        slot_attention(*narrow, seen, 2, BOTH),
        ragged_attention(*narrow, seen, owner, 2, BOTH),
    ):
        assert attended.output.dtype == dtype
        torch.testing.assert_close(attended.output.float(), exact.output, atol=3e-2, rtol=0)
        for got, expected in ((attended.mass, exact.mass), (attended.scores, exact.scores)):
            assert got is not None
            assert got.dtype == torch.float32
            torch.testing.assert_close(got, expected, atol=5e-2, rtol=0)


# Slots of heads of any size


@st.composite
def deals(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """Owners of slots, key heads, query heads of each, and a seed."""
    kv_heads, rows = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    sizes = st.lists(
        st.one_of(st.integers(0, 3), st.integers(0, 48)),
        min_size=kv_heads,
        max_size=kv_heads,
    )
    seed = draw(st.integers(0, 1000))
    owner = dealt(draw(st.lists(sizes, min_size=rows, max_size=rows)), seed)
    if draw(st.booleans()):
        owner = owner[:1].expand(rows, -1)
    return owner, kv_heads, draw(st.integers(1, 3)), seed


@given(deals(), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_query_over_unequal_heads_is_softmax_attention_over_what_its_head_owns(
    deal: tuple[Tensor, int, int, int], hidden: float
) -> None:
    owner, kv_heads, group, seed = deal
    rows, slots = owner.shape
    query = normal(rows, kv_heads * group, 4, seed=seed + 10) * 2
    keys, values = (normal(rows, slots, 4, seed=seed + i) for i in (11, 12))
    noise = torch.rand(rows, slots, generator=torch.Generator().manual_seed(seed))
    visible = (noise >= hidden) & (owner < kv_heads)
    attended = ragged_attention(query, keys, values, visible, owner, kv_heads, BOTH)
    all_close(attended, over_lists(query, keys, values, visible, owner, kv_heads))
    assert attended.mass is not None
    assert attended.scores is not None
    assert torch.equal(attended.mass == 0, ~visible)
    assert not attended.scores[~visible].any()
    # The mass of a key head is one for each of its query heads, unless it sees nothing.
    for row, head in numpy.ndindex(rows, kv_heads):
        seen = visible[row] & (owner[row] == head)
        assert attended.mass[row][owner[row] == head].sum().item() == pytest.approx(
            group * bool(seen.any()), abs=1e-4
        )


@given(
    rows=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    capacity=st.sampled_from([1, 5, 16, 17, 48]),
    seed=st.integers(0, 1000),
)
def test_equal_heads_give_what_dense_attention_gives(
    rows: int, kv_heads: int, group: int, capacity: int, seed: int
) -> None:
    query = normal(rows, kv_heads * group, 8, seed=seed)
    keys, values = (normal(rows, kv_heads * capacity, 8, seed=seed + i) for i in (1, 2))
    visible = normal(rows, kv_heads * capacity, seed=seed + 3) > 0
    visible[:, ::capacity] = True
    owner = torch.arange(kv_heads).repeat_interleave(capacity)[None]
    all_close(
        ragged_attention(query, keys, values, visible, owner, kv_heads, BOTH),
        slot_attention(query, keys, values, visible, kv_heads, BOTH),
    )


def test_one_layout_for_all_rows_is_the_same_layout_for_each() -> None:
    owner = dealt([[3, 0, 33]], seed=0)
    query = normal(4, 6, 4, seed=1)
    keys, values = (normal(4, owner.shape[1], 4, seed=i) for i in (2, 3))
    visible = normal(4, owner.shape[1], seed=4) > -1
    one = ragged_attention(query, keys, values, visible, owner, 3, BOTH)
    each = ragged_attention(query, keys, values, visible, owner.expand(4, -1), 3, BOTH)
    assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))


def test_a_head_that_sees_nothing_gives_zeros_beside_heads_that_see() -> None:
    owner = dealt([[20, 20, 0]], seed=0)
    query, keys = normal(1, 6, 4, seed=1), normal(1, 40, 4, seed=2)
    visible = owner == 1
    attended = ragged_attention(query, keys, keys, visible, owner, 3, BOTH)
    assert not attended.output[:, [0, 1, 4, 5]].any()
    assert attended.output[:, [2, 3]].all()
    assert attended.mass is not None
    assert attended.mass.sum().item() == pytest.approx(2)
    nothing = ragged_attention(query, keys, keys, visible & False, owner, 3, BOTH)
    assert not any(x.any() for x in nothing if x is not None)


@pytest.mark.parametrize("height", [100.0, 1e15])
def test_slots_far_apart_are_exponentiated_without_overflow(height: float) -> None:
    """One slot's score is far above the others', whichever it is."""
    for best in range(48):
        query = torch.full((1, 1, 4), height)
        keys = torch.full((1, 48, 4), -height)
        keys[0, best] = height
        values = normal(1, 48, 4, seed=0)
        seen, owner = torch.ones(1, 48, dtype=torch.bool), torch.zeros(1, 48, dtype=torch.long)
        attended = ragged_attention(query, keys, values, seen, owner, 1, BOTH)
        close(attended.output[0, 0], values[0, best])
        assert attended.mass is not None
        assert attended.mass[0].nonzero().tolist() == [[best]]


def test_heads_do_not_depend_on_how_large_the_others_are() -> None:
    """Equal to the last bit: a picture is the same whatever the layout beside it."""
    query, keys, values = normal(1, 3, 4, seed=0), normal(1, 200, 4, seed=1), normal(1, 200, 4, seed=2)
    seen, outputs = torch.ones(1, 200, dtype=torch.bool), []
    for others in (1, 17, 90):
        owner = torch.tensor([0] * 20 + [1] * others + [2] * others + [3] * (180 - 2 * others))[None]
        outputs.append(ragged_attention(query, keys, values, seen, owner, 3).output[0, 0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("heads", [2, 4])
def test_unequal_heads_are_one_graph_and_nothing_is_recorded_for_a_backward_pass(heads: int) -> None:
    torch._dynamo.reset()
    traced = torch.compile(ragged_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    query = normal(2, heads, 8, seed=0)
    keys, values = (normal(2, 50, 8, seed=i) for i in (1, 2))
    with torch.inference_mode():
        for seed in (3, 4):  # another layout is the same graph
            owner = dealt([[9, 41], [30, 20]], seed)
            visible = normal(2, 50, seed=seed) > -1
            arguments = (query, keys, values, visible, owner, 2, BOTH)
            with torch.compiler.set_stance("default" if seed == 3 else "fail_on_recompile"):
                got = traced(*arguments)
            all_close(got, ragged_attention(*arguments))
            assert not any(x.requires_grad for x in got)
    torch._dynamo.reset()


# A whole sequence


@given(
    tokens=st.integers(1, 11), kv_heads=st.integers(1, 2), group=st.integers(1, 2), seed=st.integers(0, 99)
)
def test_causal_attention_is_softmax_attention_over_the_past(
    tokens: int, kv_heads: int, group: int, seed: int
) -> None:
    heads = kv_heads * group
    query = normal(2, tokens, heads, 4, seed=seed)
    key, value = (normal(2, tokens, kv_heads, 4, seed=seed + i) for i in (1, 2))
    mask = normal(2, tokens, seed=seed + 3) > -0.5
    result = causal_attention(query, key, value, mask)
    assert result.shape == query.shape
    assert result.isfinite().all()
    for row, token, head in numpy.ndindex(2, tokens, heads):
        past = [i for i in range(token + 1) if mask[row, i]]
        if past:
            k, v = (x[row, :, head // group].double().numpy() for x in (key, value))
            expected, _ = attend(
                query[row, token, head].double().numpy(), [Entry(i, k[i], v[i]) for i in past]
            )
            numpy.testing.assert_allclose(result[row, token, head], expected, atol=1e-5)


def test_no_mask_is_a_mask_of_all_true() -> None:
    query, key = normal(2, 9, 4, 8, seed=0), normal(2, 9, 2, 8, seed=1)
    everything = torch.ones(2, 9, dtype=torch.bool)
    assert torch.equal(causal_attention(query, key, key, None), causal_attention(query, key, key, everything))
