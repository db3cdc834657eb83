"""What a cache holds, line by line: the notes against plain lists, and the figures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import oracle
import pytest
import torch
from oracle import Linear
from PIL import Image
from tiny import GRID, WORDS, Tiny
from torch import Tensor

import arkv
from arkv import CachePlan, Decoder, Grid, ModelSpec, RankedPolicy, Store, registry
from arkv.cli import main
from arkv.errors import ArkvError, PromptError
from arkv.model import Condition
from arkv.policies.linear import LineAR
from arkv.policies.window import SlidingWindow
from arkv.policy import least_of_layer
from arkv.study.inspection import Recording, choose, record
from arkv.study.inspection_figure import AHEAD, HIDDEN, animate, draw_sheet
from arkv.testing.oracle import Oracle
from arkv.testing.stores import positions

PROMPT = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Newest(RankedPolicy):
    """Keeps the newest tokens, in every head another number of them."""

    sizes: tuple[tuple[int, ...], ...] = ((3, 7), (5, 11))

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(self.sizes, grid.line)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position.float()


@dataclass(frozen=True, kw_only=True)
class Lending(Newest):
    """Heads lend each other slots; the tokens whose index is even stay, most of them in the first head."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(5, grid.line, shared=True)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return (store.position % 2 == 0).float() - store.head.float()

    def select(self, store: Store, step: Tensor) -> Tensor:
        return least_of_layer(store, self.worth(store, step))


@dataclass(frozen=True, kw_only=True)
class Squinting(SlidingWindow):
    """Looks at three tokens only, whatever is held."""

    def visible(self, store: Store, step: Tensor) -> Tensor:
        return (store.position > step - 3) | (store.position < -1)


def oracle_residents(model: Tiny, rule: oracle.Rule, tokens: Tensor, row: int) -> Tensor:
    """Bool `[lines, layers, kv_heads, N]` from Python lists, for the only picture of a guided batch."""
    spec, grid = model.spec, model.spec.grid
    lists = Oracle(model, model.condition([PROMPT], True))
    lists.prefill()
    residents = torch.zeros(grid.rows, spec.layers, spec.kv_heads, grid.tokens, dtype=torch.bool)
    for position in range(grid.tokens - 1):
        if position % grid.line == 0:
            lists.evict(rule, position)
        lists.advance(tokens[:, position].repeat(2), position)
        line = residents[position // grid.line]
        for layer in range(spec.layers):
            for head in range(spec.kv_heads):
                line[layer, head] = False
                line[layer, head, lists.visual(layer, row, head)] = True
    return residents


@pytest.mark.parametrize("grid", [GRID, Grid(6, 3, newline=True)], ids=["plain", "newline"])
@pytest.mark.parametrize("unconditional", [False, True])
@pytest.mark.parametrize("name", ["linear", "window", "full"])
@torch.inference_mode()
def test_residents_are_those_of_plain_lists(name: str, unconditional: bool, grid: Grid) -> None:
    model = Tiny(grid)
    policy, rule = {
        "linear": (LineAR(budget=9, anchors=2, recent=4), Linear(9, 2, 4)),
        "window": (SlidingWindow(budget=6, sinks=2), oracle.window(6, 2)),
        "full": (arkv.load_policy("full"), oracle.keep_all),
    }[name]
    recording = record(model, policy, PROMPT, seed=5, unconditional=unconditional)
    drawn = Decoder(model, policy).generate([PROMPT], seeds=[5])
    assert torch.equal(
        recording.residents, oracle_residents(model, rule, drawn.tokens, row=int(unconditional))
    )
    assert torch.equal(recording.attended, recording.residents)
    assert recording.images[-1].tobytes() == drawn.images[0].tobytes()
    assert len(recording.images) == grid.rows


def test_unequal_heads_are_told_apart() -> None:
    policy = Newest()
    recording = record(Tiny(), policy, PROMPT)
    for line, layer, head in torch.cartesian_prod(torch.arange(4), torch.arange(2), torch.arange(2)).tolist():
        cached = min((line + 1) * GRID.line, GRID.tokens - 1)
        # The slots of the newest line's missing last token are free already when the picture ends.
        held = policy.sizes[layer][head] + GRID.line - ((line + 1) * GRID.line - cached)
        expected = list(range(max(0, cached - held), cached))
        assert recording.residents[line, layer, head].nonzero()[:, 0].tolist() == expected


def test_heads_that_share_a_pool_hold_what_the_store_says() -> None:
    model, policy = Tiny(), Lending()
    recording = record(model, policy, PROMPT, guidance=1.0)
    decoder = Decoder(model, policy)
    decoder.generate([PROMPT], guidance=1.0)
    assert decoder.store is not None
    held = positions(decoder.store)
    counts = recording.residents[-1].sum(-1)
    assert (counts[:, 0] > counts[:, 1]).all()
    for layer in range(2):
        for head in range(2):
            assert recording.residents[-1, layer, head].nonzero()[:, 0].tolist() == held[layer, 0, head]


def test_what_may_not_be_looked_at_is_resident_and_not_attended() -> None:
    recording = record(Tiny(), Squinting(budget=6, sinks=2), PROMPT)
    assert recording.residents[1].sum(-1).tolist() == [[10, 10], [10, 10]]
    assert recording.attended[1].sum(-1).tolist() == [[3, 3], [3, 3]]
    assert recording.attended[1, 0, 0].nonzero()[:, 0].tolist() == [7, 8, 9]
    assert not (recording.attended & ~recording.residents).any()


def test_ages_count_lines_back_from_the_newest() -> None:
    recording = record(Tiny(), SlidingWindow(budget=6, sinks=2), PROMPT)
    # Lines of five: two sinks in the first, four newest, and the line that was decoded since.
    assert recording.ages(2)[0, 0].tolist() == [5, 4, 2]
    assert recording.ages(0).tolist() == [[[5], [5]], [[5], [5]]]
    assert torch.equal(recording.ages(3).sum(-1), recording.residents[3].sum(-1))


def test_there_is_no_unconditional_row_without_guidance() -> None:
    with pytest.raises(ArkvError, match="no unconditional row"):
        record(Tiny(), arkv.load_policy("full"), PROMPT, guidance=1.0, unconditional=True)


def test_choices() -> None:
    assert choose("line", None, 24, [8, 16, 23]) == [8, 16, 23]
    assert choose("line", None, 1, [0, 0, 0]) == [0]
    assert choose("line", [3, 1, 3], 4, [0]) == [3, 1]
    with pytest.raises(ArkvError, match="there is no layer 4: expected 0 to 3"):
        choose("layer", [1, 4], 4, [0])


@pytest.fixture(scope="module")
def recording() -> Recording:
    pytest.importorskip("matplotlib")
    return record(Tiny(), SlidingWindow(budget=6, sinks=2), PROMPT)


def colours(image: Image.Image) -> set[tuple[int, int, int]]:
    return {colour for _, colour in image.convert("RGB").getcolors(image.width * image.height)}


def count(image: Image.Image, colour: tuple[int, int, int]) -> int:
    found = {colour: n for n, colour in image.getcolors(image.width * image.height)}
    return found.get(colour, 0)


def test_a_sheet_grows_with_what_it_shows(recording: Recording) -> None:
    small = draw_sheet(recording, [0], [0], [0])
    large = draw_sheet(recording, [0, 2, 3], [0, 1], [0, 1], "a title with $ signs $", "a note")
    assert large.width > small.width > 400
    assert large.height > small.height > 200
    assert small.mode == "RGB"


def test_a_sheet_shows_what_is_ahead_and_what_is_hidden(recording: Recording) -> None:
    early, late = (draw_sheet(recording, [line], [0], [0]) for line in (0, 3))
    assert count(early, AHEAD) > count(late, AHEAD) > 0, "the legend has a patch of it"
    assert HIDDEN not in colours(late)
    nothing = replace(recording, attended=torch.zeros_like(recording.attended))
    assert HIDDEN in colours(draw_sheet(nothing, [3], [0], [0]))


def test_a_sheet_shows_who_is_resident(recording: Recording) -> None:
    before = draw_sheet(recording, [3], [0], [0])
    other = recording.residents.clone()
    other[3, 0, 0, 7] ^= True
    after = draw_sheet(replace(recording, residents=other, attended=other), [3], [0], [0])
    assert before.tobytes() != after.tobytes()


def test_an_animation_has_a_frame_a_line(recording: Recording) -> None:
    animation = Image.open(BytesIO(animate(recording, [0, 1], [0], "title", "note")))
    assert (animation.format, animation.n_frames) == ("GIF", GRID.rows)
    frames, durations = [], []
    for index in range(animation.n_frames):
        animation.seek(index)
        frames.append(animation.convert("RGB").tobytes())
        durations.append(animation.info["duration"])
    assert len(set(frames)) == GRID.rows
    assert animation.size == draw_sheet(recording, [3], [0, 1], [0], "title", "note").size
    assert durations[-1] > durations[0] == durations[1]


class Reading(Tiny):
    """A tiny model whose prompts are texts, which it counts the letters of."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        if "dragon" in prompts:
            raise PromptError("unknown word 'dragon'")

    def condition(self, prompts: Sequence[str], guided: bool) -> Condition:
        return super().condition([(len(prompt) % WORDS,) for prompt in prompts], guided)


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: Reading())


@pytest.mark.usefixtures("reading")
def test_the_command_writes_a_sheet_and_an_animation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    sheet, animation = tmp_path / "new" / "sheet.png", tmp_path / "sheet.gif"
    flags = ["--policy", "window:sinks=2", "--ratio", "3/10", "--prompt", "a circle", "--quiet"]
    assert main(["inspect", *flags, "--out", str(sheet), "--animation", str(animation)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{sheet} and {animation}: at the end 10 to 10 of 20")
    image = Image.open(sheet)
    assert image.width > image.height > 300
    assert image.text["prompt"] == "a circle"
    assert image.text["policy"].startswith("window:ratio=3/10")
    assert Image.open(animation).n_frames == GRID.rows
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["new", "sheet.gif", "sheet.png"]


BAD = {
    "no such line": (["--lines", "3,4"], "there is no line 4: expected 0 to 3"),
    "no such layer": (["--layers", "2"], "there is no layer 2: expected 0 to 1"),
    "no such head": (["--heads", "2"], "there is no key head 2: expected 0 to 1"),
    "another format": (["--out", "sheet.jpg"], "expected a name that ends in .png"),
    "another format of animation": (["--animation", "sheet.mp4"], "expected a name that ends in .gif"),
    "no unconditional row": (["--unconditional", "--guidance", "1"], "there is no unconditional row"),
    "unknown word": (["--prompt", "dragon"], "unknown word 'dragon'"),
    "unknown policy": (["--policy", "windw"], "did you mean window?"),
    "ratio too small": (["--policy", "linear:ratio=1/20"], "the smallest ratio that does is"),
}


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize(("flags", "complaint"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_no_file(
    flags: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--prompt", "a red circle", "--quiet", *flags]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("arkv: error: ")
    assert err.count("\n") == 1
    assert complaint in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", [["--lines", "one"], ["--lines=-1"], ["--heads", ","], []])
def test_usage_errors_leave_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["--prompt", "a red circle"] if flags else []
    with pytest.raises(SystemExit) as stop:
        main(["inspect", *prompt, *flags])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("usage: arkv")
