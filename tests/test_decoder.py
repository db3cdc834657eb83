import base64
import gc
import io
import math
import re
import weakref
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Linear
from PIL import Image
from tiny import GRID, LONGEST, POLICIES, WORDS, Tiny, build, random_tokens, tight
from torch import Tensor

from arkv import ArkvError, Decoder, Grid, RankedPolicy, Store, load_model, load_policy
from arkv.decoding.noise import gumbel, seed_keys
from arkv.errors import MemoryLimitError, NumericalError
from arkv.estimate import KEPT_FREE, estimate, format_bytes
from arkv.result import SHOWN

N = GRID.tokens
PROMPTS = [(1, 2, 3), (4,), (5, 6), (0, 7, 2, 1), (3, 3)]
SETTINGS = {"guidance": 1.5, "temperature": 1.5}

every_policy = pytest.mark.parametrize("name", POLICIES)
few = settings(max_examples=max(1, settings().max_examples // 6))


def decoder(name: str = "linear", model: Tiny | None = None) -> Decoder:
    model = model or Tiny()
    return Decoder(model, tight(name, model))


# One picture, alone and in company


@every_policy
def test_a_picture_is_the_same_alone_in_any_batch_and_in_any_order(name: str) -> None:
    made = decoder(name).generate(PROMPTS, seeds=[5, 6, 7, 8, 9], **SETTINGS)
    for order in ([0], [1], [3, 1], [4, 3, 2, 1, 0], [2, 2, 2]):
        again = decoder(name).generate([PROMPTS[i] for i in order], seeds=[5 + i for i in order], **SETTINGS)
        assert torch.equal(again.tokens, made.tokens[order])


@few
@given(
    st.lists(
        st.lists(st.integers(0, WORDS - 1), min_size=1, max_size=LONGEST).map(tuple), min_size=1, max_size=7
    ),
    st.integers(1, 8),
    st.sampled_from([1.0, 2.0]),
)
def test_splitting_into_batches_changes_nothing(prompts: list, size: int, guidance: float) -> None:
    whole = decoder().generate(prompts, guidance=guidance, temperature=1.5)
    split = decoder().generate(prompts, guidance=guidance, temperature=1.5, batch_size=size)
    assert torch.equal(split.tokens, whole.tokens)
    assert split.stats.steps == -(-len(prompts) // size) * N
    assert split.stats.kv_bytes <= whole.stats.kv_bytes


@every_policy
def test_a_decoder_can_be_used_again_for_other_batches(name: str) -> None:
    used, calls = decoder(name), [(PROMPTS[:2], 1.5), (PROMPTS, 1.0), (PROMPTS[:1], 1.5), (PROMPTS[:2], 1.5)]
    # Four rows either way: with two pictures guided, and four unguided.
    calls += [(PROMPTS[:4], 1.0), (PROMPTS[2:4], 1.5)]
    for prompts, guidance in calls:
        once = used.generate(prompts, guidance=guidance, temperature=1.5).tokens
        assert torch.equal(once, used.generate(prompts, guidance=guidance, temperature=1.5).tokens)
        assert torch.equal(once, decoder(name).generate(prompts, guidance=guidance, temperature=1.5).tokens)


def test_a_call_that_was_broken_off_leaves_no_trace() -> None:
    used = decoder()

    def stop(batch: range, line: int, images: list[Image.Image]) -> None:
        if line == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        used.generate(PROMPTS, on_line=stop, **SETTINGS)
    assert torch.equal(
        used.generate(PROMPTS, **SETTINGS).tokens, decoder().generate(PROMPTS, **SETTINGS).tokens
    )


# Seeds and settings


def test_seeds_make_pictures() -> None:
    prompts = [(1, 2)] * 4
    made = decoder().generate(prompts, seeds=[3, 4, 3, 2**63 - 1], **SETTINGS).tokens
    assert torch.equal(made[0], made[2])
    assert len({tuple(picture) for picture in made.tolist()}) == 3
    numbered = decoder().generate(prompts, **SETTINGS).tokens
    assert torch.equal(numbered, decoder().generate(prompts, seeds=[0, 1, 2, 3], **SETTINGS).tokens)
    assert torch.equal(numbered, decoder().generate(prompts, seeds=range(4), **SETTINGS).tokens)


def test_global_random_numbers_are_neither_used_nor_changed() -> None:
    used, made = decoder(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        made.append(used.generate(PROMPTS, **SETTINGS).tokens)
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*made)


@every_policy
def test_temperature_zero_follows_the_likeliest_token(name: str) -> None:
    model = Tiny()
    tokens = decoder(name, model).generate(PROMPTS, guidance=1.5, temperature=0).tokens
    assert torch.equal(
        tokens, decoder(name, model).generate(PROMPTS, seeds=[9] * 5, guidance=1.5, temperature=0).tokens
    )
    forced = decoder(name, model).teacher_force(PROMPTS, tokens, guidance=1.5)
    assert torch.equal(forced.guided.argmax(-1), tokens)
    assert torch.equal(tokens, decoder(name, model).generate(PROMPTS, guidance=1.5, top_k=1).tokens)


@every_policy
def test_tokens_are_those_that_the_forced_logits_and_the_seed_give(name: str) -> None:
    """A naive sampler over `teacher_force` draws the picture that `generate` made."""
    made = decoder(name).generate(PROMPTS, seeds=[3, 1, 4, 1, 5], guidance=1.7, temperature=1.3, top_k=9)
    logits = decoder(name).teacher_force(PROMPTS, made.tokens, guidance=1.7).guided.double().numpy()
    for picture, seed in enumerate([3, 1, 4, 1, 5]):
        for position in range(N):
            row = logits[picture, position] / 1.3
            noise = gumbel(seed_keys([seed]), torch.tensor([position]), len(row))[0].double().numpy()
            sums = numpy.where(row >= numpy.sort(row)[-9], row, -numpy.inf) + noise
            assert sums[int(made.tokens[picture, position])] > sums.max() - 1e-4


def test_guidance_of_one_decodes_no_unconditional_rows() -> None:
    made = decoder().generate(PROMPTS, guidance=1)
    guided = decoder().generate(PROMPTS, guidance=1.5)
    assert guided.stats.kv_bytes == 2 * made.stats.kv_bytes
    forced = decoder().teacher_force(PROMPTS, made.tokens)
    assert torch.equal(forced.raw, forced.guided)


def test_guidance_is_the_models_own_unless_given() -> None:
    model = Tiny()
    own = decoder(model=model).generate(PROMPTS, temperature=1.5).tokens
    assert torch.equal(own, decoder().generate(PROMPTS, guidance=model.spec.guidance, temperature=1.5).tokens)
    assert not torch.equal(own, decoder().generate(PROMPTS, guidance=4.0, temperature=1.5).tokens)


def test_newlines_stand_at_line_ends_and_nowhere_else() -> None:
    grid = Grid(4, 3, newline=True)
    model = Tiny(grid)
    for name in POLICIES:
        tokens = decoder(name, model).generate(PROMPTS, guidance=2.0, temperature=3.0).tokens
        at_end = torch.arange(grid.tokens) % grid.line == grid.columns
        assert torch.equal(tokens == model.spec.vocabulary - 1, at_end.expand(len(PROMPTS), -1))


# Logits


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("grid", [GRID, Grid(3, 4, newline=True)], ids=str)
def test_the_full_cache_has_the_logits_of_a_causal_pass(grid: Grid, guidance: float) -> None:
    model = Tiny(grid)
    tokens = random_tokens(model, len(PROMPTS))
    forced = decoder("full", model).teacher_force(PROMPTS, tokens, guidance)
    rows = tokens if guidance == 1 else tokens.repeat(2, 1)
    with torch.no_grad():
        expected = model.causal_logits(model.condition(PROMPTS, guidance != 1), rows)
    torch.testing.assert_close(forced.raw, expected, atol=1e-4, rtol=1e-4)
    wanted = expected if guidance == 1 else oracle.guided(expected, guidance)
    torch.testing.assert_close(forced.guided, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("name", "parameters", "rule"),
    [
        ("full", {}, oracle.keep_all),
        ("window", {"sinks": 3}, oracle.window(8, 3)),
        ("window", {"sinks": 0}, oracle.window(8, 0)),
        ("linear", {"anchors": 2, "recent": 3}, Linear(8, 2, 3)),
        ("linear", {"anchors": 0, "recent": 0}, Linear(8, 0, 0)),
        ("linear", {"anchors": 1, "recent": 5}, Linear(8, 1, 5)),
    ],
    ids=[
        "full",
        "window",
        "window without sinks",
        "linear",
        "linear by attention",
        "linear with one recent line",
    ],
)
@torch.inference_mode()
def test_logits_are_those_of_plain_lists(
    name: str, parameters: dict[str, int], rule: oracle.Rule, seed: int, guidance: float
) -> None:
    model = Tiny(seed=seed)
    tokens = random_tokens(model, 3, seed)
    expected = oracle.force(model, PROMPTS[:3], tokens, guidance, rule)
    forced = Decoder(model, build(name, 8, **parameters)).teacher_force(PROMPTS[:3], tokens, guidance)
    torch.testing.assert_close(forced.raw, expected, atol=1e-4, rtol=1e-4)
    wanted = expected if guidance == 1 else oracle.guided(expected, guidance)
    torch.testing.assert_close(forced.guided, wanted, atol=1e-4, rtol=1e-4)
    if name != "full":
        whole = Decoder(model, build("full", N)).teacher_force(PROMPTS[:3], tokens, guidance)
        assert (whole.raw - forced.raw).abs().max() > 0.1, "this model does not notice what a cache forgets"


@pytest.mark.parametrize(
    ("tokens", "facts"),
    [
        (torch.zeros(1, N, dtype=torch.long), [f"[1, {N}]", f"[2, {N}]"]),
        (torch.zeros(2, N - 1, dtype=torch.long), [f"[2, {N - 1}]", f"[2, {N}]"]),
        (torch.zeros(2, N), ["0 to 16"]),
        (torch.full((2, N), 17), ["0 to 16"]),
        (torch.full((2, N), -1), ["0 to 16"]),
    ],
    ids=["pictures", "length", "dtype", "above", "below"],
)
def test_tokens_that_are_no_picture_are_refused(tokens: torch.Tensor, facts: list[str]) -> None:
    with pytest.raises(ArkvError) as caught:
        decoder().teacher_force(PROMPTS[:2], tokens)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


# Pictures, progress and statistics


def test_images_are_what_the_model_draws() -> None:
    model = Tiny()
    made = decoder(model=model).generate(PROMPTS)
    assert made.tokens.shape == (5, N)
    assert made.tokens.dtype == torch.int64
    for image, pixels in zip(made.images, model.pixels(made.tokens).numpy(), strict=True):
        assert image.size == (3 * GRID.columns, 2 * GRID.rows)
        assert numpy.array_equal(numpy.asarray(image), pixels)


@pytest.mark.parametrize("grid", [GRID, Grid(3, 4, newline=True)], ids=str)
def test_every_line_is_shown_when_it_is_done(grid: Grid) -> None:
    seen: list[tuple[range, int, list[Image.Image]]] = []
    made = decoder(model=Tiny(grid)).generate(
        PROMPTS[:3], batch_size=2, on_line=lambda batch, line, images: seen.append((batch, line, images))
    )
    assert [(batch, line, len(images)) for batch, line, images in seen] == [
        (batch, line, len(batch)) for batch in (range(2), range(2, 3)) for line in range(grid.rows)
    ]
    for batch, line, images in seen:
        for image, whole in zip(images, made.images[batch.start : batch.stop], strict=True):
            assert image.size == (3 * grid.columns, 2 * (line + 1))
            assert image.tobytes() == whole.crop((0, 0, *image.size)).tobytes()


def test_statistics_add_up() -> None:
    model = Tiny()
    made = Decoder(model, build("window", 8)).generate(PROMPTS, guidance=1.5, batch_size=2)
    stats = made.stats
    assert (stats.pictures, stats.tokens, stats.steps) == (5, 5 * N, 3 * N)
    assert stats.seconds > 0
    assert stats.tokens_per_second == pytest.approx(5 * N / stats.seconds)
    # The batch of the third and fourth prompts is the largest, by the longer of the two: five words.
    slot = 2 * 2 * 8 * 2 * 4  # layers, key heads, head_dim, keys and values, bytes
    assert stats.kv_bytes == 4 * (5 + 8 + GRID.line) * slot
    assert stats.full_kv_bytes == 4 * (5 + N) * slot
    assert f"KV {format_bytes(stats.kv_bytes)} (72% of the full cache's" in str(stats)
    full = Decoder(model, build("full", N)).generate(PROMPTS[:1]).stats
    assert full.kv_bytes == full.full_kv_bytes


def test_a_bar_is_shown_if_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    decoder().generate(PROMPTS[:2])
    assert capsys.readouterr() == ("", "")
    decoder().generate(PROMPTS[:2], progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "40.0/40.0" in err


def test_the_model_is_put_into_evaluation_mode() -> None:
    model = Tiny().train()
    decoder(model=model)
    assert not model.training


# Bad input


@pytest.mark.parametrize(
    ("prompts", "arguments", "facts"),
    [
        ([], {}, ["prompts", "empty"]),
        ((), {}, ["prompts", "empty"]),
        ("a red circle", {}, ["one text", "list"]),
        (3, {}, ["prompts is 3", "list"]),
        (None, {}, ["prompts is None", "list"]),
        ([(1,)], {"seeds": []}, ["0 seeds for 1 prompts"]),
        ([(1,)], {"seeds": [1, 2]}, ["2 seeds for 1 prompts"]),
        ([(1,)], {"seeds": 1}, ["seeds is 1", "list"]),
        ([(1,)], {"seeds": [-1]}, ["seed -1", "2^64"]),
        ([(1,)], {"seeds": [2**64]}, [f"seed {2**64}", "2^64"]),
        ([(1,)], {"seeds": [1.0]}, ["seed 1.0", "whole number"]),
        ([(1,)], {"seeds": ["1"]}, ["seed '1'", "whole number"]),
        ([(1,)], {"seeds": [True]}, ["seed True", "whole number"]),
        ([(1,)], {"temperature": -0.1}, ["temperature", "-0.1"]),
        ([(1,)], {"temperature": math.nan}, ["temperature", "nan"]),
        ([(1,)], {"guidance": math.nan}, ["guidance", "nan"]),
        ([(1,)], {"guidance": -1}, ["guidance", "-1"]),
        ([(1,)], {"top_k": -1}, ["top_k is -1", "1 to 17"]),
        ([(1,)], {"top_k": 18}, ["top_k is 18", "1 to 17"]),
        ([(1,)], {"top_p": 0}, ["top_p is 0"]),
        ([(1,)], {"top_p": 1.5}, ["top_p is 1.5"]),
        ([(1,)], {"batch_size": 0}, ["batch_size is 0"]),
        ([(1,)], {"batch_size": 1.5}, ["batch_size is 1.5", "whole number"]),
        ([(1,)], {"batch_size": "all"}, ["batch_size is 'all'", "'auto'"]),
    ],
)
def test_bad_input_is_explained_in_one_line(
    prompts: Any, arguments: dict[str, Any], facts: list[str]
) -> None:
    drawn: list[int] = []
    with pytest.raises(ArkvError) as caught:
        decoder().generate(prompts, **arguments, on_line=lambda batch, line, images: drawn.append(line))
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)
    assert not drawn


def test_a_bad_prompt_is_found_before_the_first_picture_is_begun() -> None:
    drawn: list[int] = []
    with pytest.raises(ArkvError, match="outside the vocabulary"):
        decoder().generate(
            [(1,), (2,), (WORDS + 1,)], batch_size=1, on_line=lambda batch, line, images: drawn.append(line)
        )
    assert not drawn


@pytest.mark.parametrize("name", ["full", "linear"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("weight", "where"),
    [
        ("transformer.blocks.0.qkv.weight", "token 0 of 20, first in layer 0"),
        ("transformer.blocks.1.down.weight", "token 0 of 20, first in layer 1"),
        ("output.weight", "token 0 of 20, first in the output head"),
        ("codes.weight", "token 1 of 20, first in layer 0"),
    ],
)
def test_damaged_weights_stop_the_loop_and_name_step_and_layer(
    name: str, weight: str, where: str, value: float
) -> None:
    model = Tiny()
    good = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    used = decoder(name, model)
    lines: list[int] = []
    model.get_parameter(weight).data.fill_(value)
    with pytest.raises(NumericalError, match=where) as caught:
        used.generate(PROMPTS, guidance=1.5, on_line=lambda batch, line, images: lines.append(line))
    assert "\n" not in str(caught.value)
    assert not lines
    with pytest.raises(NumericalError, match=where):
        used.teacher_force(PROMPTS, random_tokens(model, 5), guidance=1.5)

    # What it left in the store does not spoil the next picture.
    model.load_state_dict(good)
    assert torch.equal(
        used.generate(PROMPTS, **SETTINGS).tokens, decoder(name).generate(PROMPTS, **SETTINGS).tokens
    )


def test_the_step_named_is_the_first_that_went_wrong() -> None:
    model = Tiny(Grid(3, 5))
    decoded = Decoder(model, build("full", 15))
    tokens = decoded.generate([(1, 2)], guidance=1, temperature=0).tokens[0].tolist()
    late = next(t for t in reversed(range(16)) if t in tokens and tokens.index(t) > 0)
    model.codes.weight.data[late] = math.nan
    with pytest.raises(NumericalError, match=f"token {tokens.index(late) + 1} of 15, first in layer 0"):
        decoded.generate([(1, 2)], guidance=1, temperature=0, window=1)


def test_a_model_that_was_moved_to_another_dtype_gets_a_new_store() -> None:
    model = Tiny()
    made = decoder("full", model)
    before = made.generate(PROMPTS[:2]).stats.kv_bytes
    model.to(torch.float64)
    assert made.generate(PROMPTS[:2]).stats.kv_bytes == 2 * before


def test_numpy_integers_are_seeds() -> None:
    made = decoder("full").generate(PROMPTS[:2], seeds=numpy.arange(5, 7))
    assert torch.equal(made.tokens, decoder("full").generate(PROMPTS[:2], seeds=[5, 6]).tokens)


# What a batch may hold


def test_a_store_of_another_shape_is_gone_before_the_next_is_made() -> None:
    made = decoder("full")
    gc.collect()
    gc.disable()  # the store must not wait for the collector of cycles
    try:
        made.generate(PROMPTS[:1])
        first = weakref.ref(made._loop.store.keys[0])
        made.generate(PROMPTS[:2])
        assert first() is None
    finally:
        gc.enable()


def test_a_short_last_batch_is_filled_up_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("step", "window"):
        monkeypatch.setattr(f"arkv.decoding.{part}.compiled", lambda function, mode: function)
    rows = []
    made = Decoder(Tiny(), build("full", N), compile="inductor")
    filled = made.generate(
        PROMPTS,
        batch_size=3,
        on_line=lambda batch, line, images: rows.append((made._loop.store.rows, len(images))),
    )
    assert set(rows) == {(6, 3), (6, 2)}
    assert torch.equal(filled.tokens, decoder("full").generate(PROMPTS, batch_size=3).tokens)


def test_lengths_are_rounded_up_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("step", "window"):
        monkeypatch.setattr(f"arkv.decoding.{part}.compiled", lambda function, mode: function)
    monkeypatch.setattr("arkv.decoder.LENGTHS", 3)
    made, eager = (Decoder(Tiny(), build("linear", 16), compile=mode) for mode in ("inductor", "none"))
    most = made.model.spec.max_condition
    assert most % 3 != 0
    loops = []
    for words in range(most):
        prompts = [tuple(range(words)), ()]
        tokens = eager.generate(prompts).tokens
        assert torch.equal(made.generate(prompts).tokens, tokens)
        torch.testing.assert_close(
            made.teacher_force(prompts, tokens, guidance=1.5).raw,
            eager.teacher_force(prompts, tokens, guidance=1.5).raw,
        )
        if not loops or made._loop is not loops[-1]:
            loops.append(made._loop)
    assert [loop.store.condition for loop in loops] == [*range(3, most, 3), most]


def test_seeds_differ_beyond_32_bits() -> None:
    low, high = (decoder("full").generate(PROMPTS[:1], seeds=[seed]).tokens for seed in (5, 5 + 2**32))
    assert not torch.equal(low, high)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_a_score_of_any_dtype_ranks(dtype: torch.dtype) -> None:
    def score(self: RankedPolicy, store: Store, step: Tensor) -> Tensor:
        return store.position.to(dtype)

    policy = type("Narrow", (RankedPolicy,), {"score": score})(budget=8)
    wide = Decoder(Tiny(), build("window", 8, sinks=0)).generate(PROMPTS[:2])
    assert torch.equal(Decoder(Tiny(), policy).generate(PROMPTS[:2]).tokens, wide.tokens)


@pytest.mark.parametrize("name", ["guidance", "temperature", "top_k", "top_p"])
@pytest.mark.parametrize("value", ["1", True, [1]])
def test_settings_of_a_wrong_type_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ArkvError, match=name):
        decoder().generate(PROMPTS[:1], **{name: value})


def test_tokens_to_force_may_be_of_any_integer_type() -> None:
    model = Tiny()
    tokens = random_tokens(model, 2)
    exact = decoder("full", model).teacher_force(PROMPTS[:2], tokens)
    for other in (tokens.to(torch.uint8), tokens.to(torch.int16), tokens.tolist()):
        assert torch.equal(decoder("full", model).teacher_force(PROMPTS[:2], other).raw, exact.raw)
    with pytest.raises(ArkvError, match="whole numbers"):
        decoder("full", model).teacher_force(PROMPTS[:2], tokens > 3)


@pytest.mark.parametrize("room", [1, 2, 3, 50])
def test_an_automatic_batch_is_the_largest_that_fits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And draws what any other does."""
    model, policy = Tiny(), build("window", 8)
    prompts = [*PROMPTS, (1, 2, 3, 4), (5,)]
    condition = model.condition(prompts, True).mask.shape[1]
    needed = estimate(model, policy, room, True, condition).batch
    free = int(needed / (1 - KEPT_FREE)) + 2
    monkeypatch.setattr("arkv.estimate.available_memory", lambda device: free)
    batches: list[range] = []
    result = Decoder(model, policy).generate(
        prompts, guidance=1.5, batch_size="auto", on_line=lambda batch, line, images: batches.append(batch)
    )
    assert max(map(len, batches)) == min(room, len(prompts))
    monkeypatch.undo()
    assert torch.equal(result.tokens, Decoder(model, policy).generate(prompts, guidance=1.5).tokens)
    if room < 50:
        monkeypatch.setattr("arkv.estimate.available_memory", lambda device: free)
        with pytest.raises(MemoryLimitError, match=f"the largest batch that fits is {room}"):
            Decoder(model, policy).generate(prompts[:1] + prompts, guidance=1.5)


@pytest.mark.parametrize("size", ["auto", 2])
@pytest.mark.parametrize("compile", ["none", "inductor"])
def test_what_a_used_decoder_holds_itself_takes_no_room_from_its_next_batch(
    compile: Any, size: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in ("step", "window"):
        monkeypatch.setattr(f"arkv.decoding.{part}.compiled", lambda function, mode: function)
    made = Decoder(Tiny(layers=24), build("window", N), compile=compile)  # much to hold, and little else
    prompts = [*PROMPTS, (1, 2, 3, 4), (5,)]
    condition = made._condition(prompts, False).mask.shape[1]
    free = int(estimate(made.model, made.policy, 2, False, condition).batch / (1 - KEPT_FREE)) + 2

    def left(device: torch.device) -> int:
        return free - (0 if made._loop is None else made._loop.store.nbytes)

    monkeypatch.setattr("arkv.estimate.available_memory", left)
    sizes = []
    for _ in range(2):
        made.generate(
            prompts, guidance=1, batch_size=size, on_line=lambda batch, line, images: sizes.append(len(batch))
        )
    grid = made.model.spec.grid
    batches = [min(2, len(prompts) - start) for start in range(0, len(prompts), 2)]
    assert sizes == 2 * [pictures for pictures in batches for _ in range(grid.rows)]


# In a notebook


def test_a_decoder_is_one_short_line() -> None:
    model = Tiny()
    text = repr(Decoder(model, load_policy("linear", ratio="1/2", recent=6), kv_dtype="int8"))
    assert text == (
        f"<Decoder: {model.spec.name} in float32 on cpu, LineAR(ratio='1/2', recent=6), compile='none', "
        "kv_dtype='int8'>"
    )


def test_a_result_is_one_short_line_and_in_a_notebook_a_sheet_of_all_pictures() -> None:
    result = decoder().generate(PROMPTS)
    assert "\n" not in repr(result)
    assert str(result.stats) in repr(result)
    html = result._repr_html_()
    assert html is not None
    data = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    sheet = Image.open(io.BytesIO(base64.b64decode(data[0])))
    assert sheet.width > 2 * result.images[0].width
    assert f"{len(PROMPTS)} pictures" in html
    assert "The first" not in html


def test_a_notebook_shows_the_first_of_very_many_pictures_and_says_so() -> None:
    result = decoder().generate(PROMPTS[:1])
    many = replace(result, images=result.images * (SHOWN + 1))
    assert f"The first {SHOWN} are shown" in (many._repr_html_() or "")


def test_a_result_without_pictures_is_its_text_in_a_notebook() -> None:
    assert decoder().generate(PROMPTS, pixels=False)._repr_html_() is None


NUMBERS: dict[str, Any] = {
    "10^400": 10**400,
    "-10^5000": -(10**5000),
    "a fraction beyond all": Fraction(10**400),
    "a decimal beyond all": Decimal(10) ** 400,
    "a decimal that is none": Decimal("sNaN"),
    "digits without end": "9" * 6000,
    "an array": numpy.array([1, 2]),
    "bytes": b"1",
}


@pytest.mark.parametrize("number", NUMBERS.values(), ids=NUMBERS)
def test_numbers_beyond_all_bounds_are_refused_in_one_short_line_wherever_one_is_taken(number: Any) -> None:
    model = Tiny()
    decoder, prompts = Decoder(model, load_policy("full")), [(1,)]
    names = ("guidance", "temperature", "top_k", "top_p", "batch_size", "window", "seed", "seeds")
    calls: dict[str, Any] = {
        name: lambda name=name: decoder.generate(prompts, **{name: number}) for name in names
    }
    calls |= {
        "forced guidance": lambda: decoder.teacher_force(prompts, [[0] * model.spec.grid.tokens], number),
        "forced tokens": lambda: decoder.teacher_force(prompts, number),
        "warm up": lambda: decoder.warm_up(number),
        "warm up for": lambda: decoder.warm_up([number]),
        "ratio": lambda: load_policy("window", ratio=number).plan(model.spec.grid, model.spec),
        "budget": lambda: load_policy("window", budget=number).plan(model.spec.grid, model.spec),
        "anchors": lambda: load_policy("linear", ratio="1/2", anchors=number),
        "compile": lambda: Decoder(model, "full", number),
        "kv_dtype": lambda: Decoder(model, "full", kv_dtype=number),
        "random weights": lambda: load_model("scenes", seed=number),
    }
    if isinstance(number, int):
        calls["guided tokens"] = lambda: decoder.generate(prompts, guided_tokens=-abs(number))
    if isinstance(number, numpy.ndarray):
        del calls["warm up"]  # for a picture and for two
    for name, call in calls.items():
        with pytest.raises(ArkvError) as told:
            call()
        assert len(str(told.value)) < 300, name
        assert "\n" not in str(told.value), name


def test_fractions_and_decimals_are_numbers() -> None:
    assert load_policy("window", ratio=Fraction(1, 2)) == load_policy("window", ratio=0.5)
    decoder = Decoder(Tiny(), load_policy("full"))
    one, other = (decoder.generate([(1,)], guidance=guidance).tokens for guidance in (Decimal("1.5"), 1.5))
    assert torch.equal(one, other)
