"""Windows: the tokens and the statistics of one token at a time, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, POLICIES, Tiny, build, tight
from torch import Tensor
from torch._dynamo.utils import counters

from arkv import (
    ArkvError,
    CachePolicy,
    Decoder,
    Grid,
    Observation,
    Store,
    load_model,
    load_policy,
)
from arkv.decoding import loop as loop_module
from arkv.decoding import window as window_module
from arkv.decoding.drafts import accept_
from arkv.decoding.loop import Loop
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.decoding.width import TRIAL_LINES, WindowSize, chosen_width
from arkv.decoding.window import parts_of
from arkv.errors import ArkvWarning
from arkv.policies.linear import LineAR
from arkv.testing.stores import by_token, count_by_token

PROMPTS = [(1, 2, 3), (4,), (5, 6)]
GRIDS = [Grid(1, 7), Grid(5, 1), Grid(4, 3, True), Grid(3, 5)]
# A low temperature repeats tokens, so that some drafts are right and some are not.
SETTINGS: dict[str, Any] = {"guidance": 1.5, "temperature": 0.3}

every_policy = pytest.mark.parametrize("name", POLICIES)


def draw(policy: Any, window: WindowSize, model: Tiny | None = None, **settings: Any) -> tuple[Tensor, int]:
    decoder_settings = {key: settings.pop(key) for key in ("kv_dtype", "compile") if key in settings}
    decoder = Decoder(model or Tiny(), policy, **decoder_settings)
    result = decoder.generate(PROMPTS, window=window, pixels=False, **SETTINGS | settings)
    return result.tokens, result.stats.passes


@every_policy
def test_tokens_are_those_of_one_at_a_time(name: str) -> None:
    alone, steps = draw(tight(name, Tiny()), 1)
    assert steps == GRID.tokens
    for window in [2, 3, 8, 16, 40] if name in ("linear", "full") else [3]:
        tokens, passes = draw(tight(name, Tiny()), window)
        assert torch.equal(tokens, alone)
        assert passes <= steps


WAYS: list[dict[str, Any]] = [
    {"guidance": 1.0},
    {"guided_tokens": 7},
    {"guided_tokens": GRID.line},
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 5, "top_p": 0.9},
    {"kv_dtype": "int8"},
    {"kv_dtype": "int4"},
    {"batch_size": 2},
]


@pytest.mark.parametrize("settings", WAYS, ids=str)
@pytest.mark.parametrize("name", ["linear", "full", "often"])
def test_tokens_are_the_same_however_they_are_drawn(name: str, settings: dict[str, Any]) -> None:
    alone, _ = draw(tight(name, Tiny()), 1, **settings)
    assert torch.equal(draw(tight(name, Tiny()), 5, **settings)[0], alone)


def test_guidance_may_end_where_heads_share_their_slots() -> None:
    alone, _ = draw(tight("adakv", Tiny()), 1, guided_tokens=7)
    assert torch.equal(draw(tight("adakv", Tiny()), 5, guided_tokens=7)[0], alone)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_grids_of_any_shape_and_with_forced_tokens(grid: Grid) -> None:
    model = Tiny(grid)
    alone, _ = draw(tight("h2o", model), 1, model)
    for window in (2, 16):
        assert torch.equal(draw(tight("h2o", model), window, model)[0], alone)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("diagonal", "full")])
def test_statistics_are_those_of_one_at_a_time_at_every_eviction(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By token: which of two slots a token lies in, rounding may decide."""
    policy = tight(name, Tiny())

    select = type(policy).select
    condition = Tiny().condition(PROMPTS, True)

    @torch.inference_mode()
    def watched(window: int) -> dict[tuple[int, int], dict[str, Tensor]]:
        """What is held and remembered, by row and place, whenever something is to be given up."""
        loop = Loop(Tiny(), policy, *condition.mask.shape, "none", True)
        seen = {}

        def remember(store: Store, place: int) -> None:
            found = {"tokens": count_by_token(store)}
            found |= {field: by_token(store, store[field].float()) for field in policy.fields}
            found |= {field: store[field].clone().float() for field in policy.head_fields}
            first = store.position.storage_offset() // store.slots
            for row in range(store.rows):
                number = first + row * (loop.store.rows // store.rows)
                seen[number, place] = {key: x[:, row] for key, x in found.items()}

        def watching(self: CachePolicy, store: Store, step: Tensor) -> Tensor:
            remember(store, int(step))
            return select(self, store, step)

        monkeypatch.setattr(type(policy), "select", watching)
        for _ in loop.sample_(condition, seed_keys([0, 1, 2]), Sampling(1.5, 0.3), window):
            pass
        remember(loop.store, GRID.tokens)
        return seen

    one, same = watched(1), watched(8)
    assert len(one) > 2 * len(PROMPTS) * 3
    torch.testing.assert_close(same, one, atol=1e-4, rtol=1e-4)


def test_a_policy_is_shown_accepted_tokens_only_one_after_the_other_and_in_order() -> None:
    shown: list[int] = []

    class Listening(LineAR):
        def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
            shown.append(int(step))
            # Its own slots hold the newest token, and what comes later is not there yet.
            assert int(store.position.max()) == int(step)
            super().observe(store, seen, step)

    Decoder(Tiny(), Listening(budget=7, anchors=2, recent=5)).generate(
        PROMPTS[:1], window=8, pixels=False, **SETTINGS
    )
    assert shown == list(range(GRID.tokens - 1))


@pytest.mark.parametrize("policy", [tight("diagonal", Tiny()), build("often", 9, every=1)], ids=str)
def test_a_policy_that_decides_at_every_token_takes_one_at_a_time_and_says_so(policy: CachePolicy) -> None:
    with pytest.warns(ArkvWarning, match="decides at every token: one a pass is taken, whatever the window"):
        assert draw(policy, 16)[1] == GRID.tokens
    assert draw(policy, "auto")[1] == GRID.tokens


def test_right_guesses_save_passes() -> None:
    """A picture of one colour is guessed after its first token: a line takes as many passes as windows."""

    class Plain(Tiny):
        def head(self, hidden: Tensor, position: Tensor) -> Tensor:
            logits = super().head(hidden, position)
            return torch.zeros_like(logits).index_fill(-1, torch.tensor([3]), 50.0)

    grid = Grid(4, 9)
    tokens, passes = draw(load_policy("window", budget=9), 4, Plain(grid))
    assert (tokens == 3).all()
    # The prefill draws the first token, and the last one is never fed.
    assert passes == 1 + 3 * 3 + 2


def test_the_embedded_model_takes_a_quarter_of_the_passes_at_most() -> None:
    decoder = Decoder(load_model("scenes"), "linear:ratio=1/6")
    prompt = ["three red circles"]
    one = decoder.generate(prompt, window=1, pixels=False)
    several = decoder.generate(prompt, pixels=False, window=16)
    assert torch.equal(one.tokens, several.tokens)
    assert one.stats.tokens_per_pass == 1
    assert several.stats.tokens_per_pass > 4


@pytest.mark.parametrize(
    ("rows", "device", "dtype", "width"),
    [
        (2, "cuda", torch.bfloat16, 16),
        (8, "cuda", torch.float16, 16),
        (16, "cuda", torch.bfloat16, 8),
        (40, "cuda", torch.bfloat16, 4),
        (64, "cuda", torch.bfloat16, 1),
        (8, "cuda", torch.float32, 4),
        (2, "cpu", torch.float32, 16),
        (2, "cpu", torch.bfloat16, 16),
        (8, "cpu", torch.bfloat16, 4),
        (128, "cpu", torch.bfloat16, 1),
        (1, "mps", torch.float16, 1),
    ],
)
def test_the_window_that_auto_stands_for(rows: int, device: str, dtype: torch.dtype, width: int) -> None:
    assert chosen_width(rows, torch.device(device), dtype) == width


def test_auto_is_what_is_taken_where_nothing_is_said() -> None:
    """A batch of any size; its tokens are those of one a pass, and its passes those of the window chosen."""
    alone, _ = draw(tight("linear", Tiny()), 1)
    decoder = Decoder(Tiny(), tight("linear", Tiny()))
    usual = decoder.generate(PROMPTS, pixels=False, **SETTINGS)
    assert torch.equal(usual.tokens, alone)
    width = chosen_width(2 * len(PROMPTS), torch.device("cpu"), torch.float32)
    assert usual.stats.passes == draw(tight("linear", Tiny()), width)[1] < GRID.tokens


@pytest.mark.parametrize("name", ["linear", "full", "often"])
def test_a_picture_alone_whose_drafts_are_wrong_goes_on_one_at_a_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is the same, whatever is held and laid out when it changes."""
    monkeypatch.setattr(loop_module, "BREAK_EVEN", GRID.tokens)
    model, settings = Tiny(Grid(6, 4)), {"temperature": 3.0}
    decoder = Decoder(model, tight(name, model))
    one, tried, wide = (
        decoder.generate(PROMPTS[:1], window=window, pixels=False, **settings) for window in (1, "auto", 16)
    )
    assert torch.equal(tried.tokens, one.tokens)
    assert torch.equal(wide.tokens, one.tokens)
    assert one.stats.passes == model.spec.grid.tokens
    assert tried.stats.passes > wide.stats.passes
    assert tried.stats.passes > model.spec.grid.tokens - TRIAL_LINES * model.spec.grid.line


def test_what_else_is_in_a_batch_decides_on_no_window() -> None:
    """Only a picture alone is tried: in a narrow dtype another window may round otherwise."""
    model = Tiny(Grid(6, 4))
    decoder = Decoder(model, "full")
    passes = [
        decoder.generate(PROMPTS[:2], window=window, pixels=False, guidance=1.0, temperature=3.0).stats.passes
        for window in ("auto", 16)
    ]
    assert passes[0] == passes[1]


def test_in_a_narrow_dtype_a_picture_does_not_depend_on_what_else_is_in_its_batch() -> None:
    """To the last bit: the others may draw more tokens a pass, or fewer, and evict earlier or later."""
    decoder = Decoder(Tiny().to(torch.bfloat16), tight("linear", Tiny()))
    first, other = (
        decoder.generate([PROMPTS[0], *others], seeds=seeds, window=4, pixels=False, **SETTINGS).tokens
        for others, seeds in (([(6,), (7, 5)], [0, 1, 2]), ([(2,), (4, 4)], [0, 8, 9]))
    )
    assert torch.equal(first[0], other[0])
    assert not torch.equal(first[1:], other[1:])


@pytest.mark.parametrize("name", ["linear", "full"])
def test_a_pass_is_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is traced anew after the first lines, nor for another picture of the batch."""

    def traced(function: Any, mode: str) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

    torch._dynamo.reset()
    monkeypatch.setattr(window_module, "compiled", traced)
    decoder, graphs = Decoder(Tiny(), tight(name, Tiny())), []

    def count(*_: object) -> None:
        graphs.append(counters["stats"]["unique_graphs"])

    for _ in range(2):
        result = decoder.generate(PROMPTS[:2], window=3, pixels=False, on_line=count, **SETTINGS)
    first, *rest = graphs
    assert first > 0
    assert set(rest) == {first}
    monkeypatch.undo()
    assert torch.equal(result.tokens, draw(tight(name, Tiny()), 1, batch_size=2)[0][:2])


@pytest.mark.parametrize("name", ["linear", pytest.param("headkv", marks=pytest.mark.slow)])
def test_compiled_windows_give_the_same_tokens(name: str) -> None:
    alone, _ = draw(tight(name, Tiny()), 1)
    torch.compiler.reset()
    tokens, _ = draw(tight(name, Tiny()), 4, compile="inductor")
    assert torch.equal(tokens, alone)


@given(st.data(), st.integers(1, 6), st.integers(1, 4), st.sampled_from(GRIDS))
def test_what_is_accepted_is_what_a_list_would_accept(
    data: st.DataObject, width: int, pictures: int, grid: Grid
) -> None:
    total, codes = grid.tokens, st.integers(0, 1)
    stops = data.draw(st.lists(st.integers(1, total - 1), min_size=pictures, max_size=pictures))
    starts = [data.draw(st.integers(0, stop)) for stop in stops]
    row = st.lists(codes, min_size=total, max_size=total)
    tokens = data.draw(st.lists(row, min_size=pictures, max_size=pictures))
    drawn = data.draw(
        st.lists(st.lists(codes, min_size=width, max_size=width), min_size=pictures, max_size=pictures)
    )
    expected, moved = [], []
    for known, start, stop, new in zip(tokens, starts, stops, drawn, strict=True):
        known, place, last = list(known), start, min(start + width - 1, stop - 1) + 1
        if start < stop:
            drafts = known[start + 1 : last + 1]
            known[start + 1 : last + 1] = new[: last - start]
            right = [draft == draw for draft, draw in zip(drafts, new, strict=False)]
            place += min(len(right), [*right, False].index(False) + 1)
        drawn_last = known[last]
        agrees = last >= grid.line and known[last - grid.line] == drawn_last
        for behind in range(last + 1, total):
            ends = grid.newline and behind % grid.line == grid.columns
            as_above = behind >= grid.line and (agrees or ends or behind // grid.line > last // grid.line)
            known[behind] = known[behind - grid.line] if as_above else drawn_last
        expected.append(known)
        moved.append(place)
    got, at, stop_at = torch.tensor(tokens), torch.tensor(starts), torch.tensor(stops)
    fed = torch.minimum(at[:, None] + torch.arange(width), stop_at[:, None] - 1)
    accepted = accept_(got, at, fed, torch.tensor(drawn), stop_at, grid)
    near = min(grid.line, total)
    for mine, theirs, stop, start in zip(got.tolist(), expected, stops, starts, strict=True):
        last = min(start + width - 1, stop - 1) + 1
        assert mine[: last + near + 1] == theirs[: last + near + 1]
    assert at.tolist() == moved
    assert accepted.sum(1).tolist() == [place - start for place, start in zip(moved, starts, strict=True)]


@given(st.integers(0, 40), st.integers(1, 40), st.integers(1, 20))
def test_windows_end_where_an_eviction_is_due(start: int, count: int, period: int) -> None:
    parts = parts_of(range(start, start + count), period)
    assert [step for part in parts for step in part] == list(range(start, start + count))
    assert all(part and part.start // period == (part.stop - 1) // period for part in parts)
    assert all(part.start % period == 0 for part in parts[1:])


@pytest.mark.parametrize("window", [0, -1, 2.5, "four", None, True])
def test_a_window_that_is_no_number_of_tokens_is_one_clear_line(window: Any) -> None:
    with pytest.raises(ArkvError, match="window is .*expected a whole number of tokens, at least 1"):
        Decoder(Tiny(), load_policy("full")).generate(PROMPTS, window=window)


def test_lines_are_told_as_without_a_window() -> None:
    """With the pictures so far, which show no drafts."""

    def told(window: int) -> list[tuple[int, bytes]]:
        seen: list[tuple[int, bytes]] = []
        decoder = Decoder(Tiny(), load_policy("full"))
        decoder.generate(
            PROMPTS[:1],
            window=window,
            on_line=lambda _, line, images: seen.append((line, images[0].tobytes())),
            **SETTINGS,
        )
        return seen

    assert told(8) == told(1)
