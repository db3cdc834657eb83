"""Windows: the tokens and the statistics of one token at a time, in fewer passes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import GRID, POLICIES, Tiny, build, tight
from torch import Tensor

from arkv import ArkvError, Decoder, Grid, Observation, Store, load_model, load_policy
from arkv.decoding.window import accept_, parts_of
from arkv.policies.linear import LineAR
from arkv.testing.stores import by_token, count_by_token

PROMPTS = [(1, 2, 3), (4,), (5, 6)]
WINDOWS = [2, 3, 8, 16, 40]
# A low temperature repeats tokens, so that some drafts are right and some are not.
SETTINGS: dict[str, Any] = {"guidance": 1.5, "temperature": 0.3}

every_policy = pytest.mark.parametrize("name", POLICIES)


def draw(policy: Any, window: int, model: Tiny | None = None, **settings: Any) -> tuple[Tensor, int]:
    decoder_settings = {key: settings.pop(key) for key in ("kv_dtype", "compile") if key in settings}
    decoder = Decoder(model or Tiny(), policy, **decoder_settings)
    result = decoder.generate(PROMPTS, window=window, pixels=False, **SETTINGS | settings)
    return result.tokens, result.stats.passes


@every_policy
def test_tokens_are_those_of_one_at_a_time(name: str) -> None:
    alone, steps = draw(tight(name, Tiny()), 1)
    assert steps == GRID.tokens
    for window in WINDOWS:
        tokens, passes = draw(tight(name, Tiny()), window)
        assert torch.equal(tokens, alone)
        assert passes <= steps


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 1.0},
        {"guided_tokens": 7},
        {"guided_tokens": GRID.line},
        {"temperature": 0},
        {"temperature": 1.5, "top_k": 5, "top_p": 0.9},
        {"kv_dtype": "int8"},
        {"kv_dtype": "fp8"},
        {"batch_size": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["linear", "full", "adakv", "often"])
def test_tokens_are_the_same_however_they_are_drawn(name: str, settings: dict[str, Any]) -> None:
    alone, _ = draw(tight(name, Tiny()), 1, **settings)
    for window in (3, 16):
        assert torch.equal(draw(tight(name, Tiny()), window, **settings)[0], alone)


@pytest.mark.parametrize("grid", [Grid(1, 7), Grid(5, 1), Grid(4, 3, True), Grid(3, 5)], ids=str)
def test_grids_of_any_shape_and_with_forced_tokens(grid: Grid) -> None:
    model = Tiny(grid)
    alone, _ = draw(tight("h2o", model), 1, model)
    for window in (2, 5, 16):
        assert torch.equal(draw(tight("h2o", model), window, model)[0], alone)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "diagonal"])
def test_statistics_are_those_of_one_at_a_time_at_every_line_end(name: str) -> None:
    """By token: which of two slots a token lies in, rounding may decide."""

    def watched(window: int) -> list[dict[str, Tensor]]:
        policy, seen = tight(name, Tiny()), []
        decoder = Decoder(Tiny(), policy)

        def look(*_: object) -> None:
            store = decoder.store
            assert store is not None
            held = {"tokens": count_by_token(store)}
            held |= {field: by_token(store, store[field].float()) for field in policy.fields}
            seen.append(held | {field: store[field].clone().float() for field in policy.head_fields})

        decoder.generate(PROMPTS, window=window, pixels=False, on_line=look, **SETTINGS)
        return seen

    for one, same in zip(watched(1), watched(8), strict=True):
        torch.testing.assert_close(same, one, atol=1e-4, rtol=1e-4)


def test_a_policy_is_shown_accepted_tokens_only_one_after_the_other_and_in_order() -> None:
    shown: list[int] = []

    class Listening(LineAR):
        def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
            shown.append(int(step))
            # Its own slots hold the newest token, and what comes later is not there yet.
            assert int(store.position.max()) == int(step)
            super().observe(store, seen, step)

    draw(Listening(budget=7, anchors=2, recent=5), 8)
    assert shown == list(range(GRID.tokens - 1))


def test_a_policy_that_decides_at_every_token_what_is_visible_takes_one_at_a_time() -> None:
    assert draw(tight("diagonal", Tiny()), 16)[1] == GRID.tokens


def test_a_policy_that_evicts_at_every_token_takes_one_at_a_time() -> None:
    assert draw(build("often", 9, every=1), 16)[1] == GRID.tokens


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
    one = decoder.generate(prompt, pixels=False)
    several = decoder.generate(prompt, pixels=False, window=16)
    assert torch.equal(one.tokens, several.tokens)
    assert one.stats.tokens_per_pass == 1
    assert several.stats.tokens_per_pass > 4


@pytest.mark.parametrize("name", ["linear", pytest.param("headkv", marks=pytest.mark.slow)])
def test_compiled_windows_give_the_same_tokens(name: str) -> None:
    alone, _ = draw(tight(name, Tiny()), 1)
    torch.compiler.reset()
    tokens, _ = draw(tight(name, Tiny()), 4, compile="inductor")
    assert torch.equal(tokens, alone)


@given(st.data(), st.integers(1, 6), st.integers(1, 4))
def test_what_is_accepted_is_what_a_list_would_accept(data: st.DataObject, width: int, pictures: int) -> None:
    total, codes = 14, st.integers(0, 1)
    stop = data.draw(st.integers(1, total - 1))
    at = data.draw(st.lists(st.integers(0, stop), min_size=pictures, max_size=pictures))
    row = st.lists(codes, min_size=total, max_size=total)
    tokens = data.draw(st.lists(row, min_size=pictures, max_size=pictures))
    drawn = data.draw(
        st.lists(st.lists(codes, min_size=width, max_size=width), min_size=pictures, max_size=pictures)
    )
    expected, moved = [], []
    for known, start, new in zip(tokens, at, drawn, strict=True):
        known, place = list(known), start
        fed = [min(start + i, stop - 1) for i in range(width)]
        for i, where in enumerate(fed):
            if start == stop or where != start + i:
                break
            right = place == where  # every draft up to here was right
            if right:
                place += 1
                is_draft_right = i + 1 < width and where + 1 < stop and known[where + 1] == new[i]
                known[where + 1] = new[i]
                if not is_draft_right:
                    right = False
                    for j in range(i + 1, width):
                        if fed[j] == start + j:
                            known[fed[j] + 1] = new[j]
                    break
        last = fed[-1] + 1
        known[last + 1 :] = [known[last]] * (total - last - 1)
        expected.append(known)
        moved.append(place)
    got, places = torch.tensor(tokens), torch.tensor(at)
    fed_places = torch.minimum(places[:, None] + torch.arange(width), torch.tensor(stop - 1))
    accept_(got, places, fed_places, torch.tensor(drawn), torch.tensor(stop))
    assert got.tolist() == expected
    assert places.tolist() == moved


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
