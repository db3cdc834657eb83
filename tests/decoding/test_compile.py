"""Eager against compiled, and how many graphs there are."""

from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import GRID, POLICIES, Tiny, build, legal_budgets
from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

from arkv import ArkvError, CachePolicy, Decoder, Grid
from arkv.attention import operators
from arkv.decoding.loop import Loop

PROMPTS = [(1, 2, 3), (4,)]
Kind = Callable[..., CachePolicy]


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    clear_compilation_metrics()
    yield
    torch._dynamo.reset()


def policy(name: str, budget: int = 12) -> CachePolicy:
    """Capacities alike, so that the policies share the graphs that do not depend on them."""
    return build(name, max(budget, legal_budgets(name, Tiny())[0]))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def test_compiled_pictures_are_the_eager_ones_and_one_block_serves_all_layers() -> None:
    """Also: no graph is added after the first line, by another picture, another seed, or more layers."""
    counted = []
    for layers in (2, 3):
        torch._dynamo.reset()
        counters.clear()
        model = Tiny(layers=layers)
        decoder = Decoder(model, policy("linear"), compile="inductor")
        first = decoder.generate(PROMPTS, seeds=[0, 1], guidance=1.5, temperature=1.5, window=1)
        counted.append(graphs())
        with torch.compiler.set_stance("fail_on_recompile"):
            again = decoder.generate(PROMPTS, seeds=[0, 1], guidance=1.5, temperature=1.5, window=1)
            other = decoder.generate(
                [(5, 6), (7, 0, 1)], seeds=[7, 8], guidance=1.5, temperature=1.5, window=1
            )
        assert graphs() == counted[-1]
        assert torch.equal(first.tokens, again.tokens)
        assert not torch.equal(first.tokens, other.tokens)
        eager = Decoder(model, policy("linear"))
        assert torch.equal(
            first.tokens,
            eager.generate(PROMPTS, seeds=[0, 1], guidance=1.5, temperature=1.5, window=1).tokens,
        )
    assert counted[0] == counted[1]
    # Block, head, embedding, eviction, observation, drawing; the head once more for the prefill's layout.
    assert counted[0] <= 7


@pytest.mark.parametrize("shared", [False, True])
def test_unequal_heads_are_compiled_once_and_give_the_eager_logits(sums: Kind, shared: bool) -> None:
    """Slots that change hands are values to a graph, not shapes."""
    model, unequal = Tiny(), sums(budget=1, budgets=((1, 9), (5, 3)), shared=shared)
    compiled, eager = Decoder(model, unequal, compile="inductor"), Decoder(model, unequal)
    tokens = compiled.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens
    assert torch.equal(tokens, eager.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens)
    with torch.compiler.set_stance("fail_on_recompile"):
        other = compiled.generate(
            [(5, 6), (7, 0, 1)], seeds=[7, 8], guidance=1.5, temperature=1.5, window=1
        ).tokens
        forced = compiled.teacher_force(PROMPTS, other, guidance=1.5).raw
    expected = eager.teacher_force(PROMPTS, other, guidance=1.5).raw
    torch.testing.assert_close(forced, expected, atol=1e-4, rtol=1e-4)


def test_what_the_full_cache_reads_grows_within_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the last line, where nothing is left out and which is a shape of its own."""
    monkeypatch.setattr(operators, "available", lambda *_: False)  # kernels leave empty slots out
    model, full = Tiny(Grid(6, 3)), build("full", 18)
    decoder = Decoder(model, full, compile="inductor")
    tokens = decoder.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens
    compiled = [metrics.co_name for metrics in get_compilation_metrics()]
    assert compiled.count("step_block") == 2
    assert torch.equal(
        tokens, Decoder(model, full).generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens
    )


def test_long_pictures_are_read_as_far_as_they_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor makes another graph for more than 4,096 slots; told that one must do, it used to give up."""
    monkeypatch.setattr(operators, "available", lambda *_: False)
    model = Tiny(Grid(66, 64), layers=1)
    with torch.inference_mode():
        condition = model.condition([(1, 2)], guided=False)
        shape = (model, build("full", 1), *condition.mask.shape)
        loops = [Loop(*shape, mode) for mode in ("inductor", "none")]
        for loop in loops:
            loop.prefill_(condition)
        done = 0
        for position in (0, 40 * 64, 64 * 64 + 1, 65 * 64):
            for loop in loops:
                loop.pass_over_(range(done, position))
            logits = [loop.advance_(torch.tensor([3]), position) for loop in loops]
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
            done = position + 1
    blocks = [metrics.co_name for metrics in get_compilation_metrics()].count("step_block")
    assert blocks <= 3  # the last line has one, as ever


def test_eight_bits_are_compiled_and_draw_what_eager_ones_do() -> None:
    model = Tiny()
    compiled = Decoder(model, policy("linear"), compile="inductor", kv_dtype="int8")
    eager = Decoder(model, policy("linear"), kv_dtype="int8")
    tokens = eager.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens
    assert torch.equal(compiled.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens, tokens)


# Inductor is slow. The conformance suite traces the verbs of all policies; these have all kinds of needs.
@pytest.mark.parametrize(
    "name",
    [n if n in ("full", "often", "diagonal") else pytest.param(n, marks=pytest.mark.slow) for n in POLICIES],
)
def test_6_compiled_tokens_and_logits_are_the_eager_ones(name: str) -> None:
    model = Tiny()
    eager = Decoder(model, policy(name))
    compiled = Decoder(model, policy(name), compile="inductor")
    tokens = eager.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens
    assert torch.equal(compiled.generate(PROMPTS, guidance=1.5, temperature=1.5, window=1).tokens, tokens)
    expected = eager.teacher_force(PROMPTS, tokens, guidance=1.5)
    forced = compiled.teacher_force(PROMPTS, tokens, guidance=1.5)
    torch.testing.assert_close(forced.raw, expected.raw, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(forced.guided, expected.guided, atol=1e-4, rtol=1e-4)


def test_an_unknown_way_to_compile_is_refused() -> None:
    with pytest.raises(
        ArkvError, match=r"compile is 'triton': expected 'none' or 'inductor' or 'cudagraphs'"
    ):
        Decoder(Tiny(), build("full", GRID.tokens), compile="triton")  # type: ignore[arg-type]
