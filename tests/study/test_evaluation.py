"""`arkv eval`: what it measures, against naive computations, and how a run is taken up again."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import Tiny, random_tokens
from torch import Tensor

from arkv import CachePlan, CachePolicy, registry
from arkv.cli import main
from arkv.decoder import Decoder
from arkv.decoding.loop import Loop
from arkv.errors import ArkvError, UnknownNameError
from arkv.grid import Grid
from arkv.jobs.journal import Journal
from arkv.model import Condition, ModelSpec
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig
from arkv.policies.full import FullCache
from arkv.policies.window import SlidingWindow
from arkv.policy import RankedPolicy, least_of_layer
from arkv.store import CONDITION, Store
from arkv.study.evaluation import Accuracy, Contender, Evaluation, Settings, evaluate
from arkv.study.evaluation_figure import comparison_figure, draw_comparison
from arkv.study.shadow import compare

PROMPTS = [(1, 2, 3), (4,), (5, 6)]
GUIDANCE = 1.5


class Judged(Tiny):
    """With a judge of sorts, and two groups of prompts."""

    def satisfies(self, prompt: Any, picture: Tensor) -> bool:
        return int(picture.sum()) % 3 > 0

    def group(self, prompt: Any) -> str:
        return "short" if len(prompt) < 3 else "long"


@dataclass(frozen=True, kw_only=True)
class Uneven(SlidingWindow):
    """Every head has a budget of its own."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return CachePlan(budget=((3, 8), (11, 5)), period=5)


@dataclass(frozen=True, kw_only=True)
class Lending(RankedPolicy):
    """The second head takes slots from the first one."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return replace(super().plan(grid, spec), shared=True)

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store.position * (1.0 + store.head)

    def select(self, store: Store, step: Tensor) -> Tensor:
        return least_of_layer(store, self.worth(store, step))


@dataclass(frozen=True, kw_only=True)
class Blinkered(SlidingWindow):
    """Tokens look at every other slot only, be it of the condition or not."""

    def visible(self, store: Store, step: Tensor) -> Tensor:
        return (torch.arange(store.slots) % 2 == 0) | (store.position == step)


POLICIES = {
    "equal heads": SlidingWindow(budget=6),
    "unequal heads": Uneven(budget=8),
    "heads that lend slots": Lending(budget=6),
    "a subset attended to": Blinkered(budget=6),
}


def naive_attention(model: Tiny, condition: Condition, tokens: Tensor) -> Tensor:
    """Attention of every query of the full cache: `[layers, rows, kv_heads, tokens, tokens]`."""
    hidden = torch.cat([condition.embeddings, model.codes(tokens[:, :-1])], dim=1)
    mask = torch.cat([condition.mask, torch.ones_like(tokens[:, :-1], dtype=torch.bool)], dim=1)
    length, layers = hidden.shape[1], []
    allowed = mask[:, None, None] & torch.ones(length, length, dtype=torch.bool).tril()
    for block in model.blocks:
        query, key, value = block.project(hidden, condition.rotation[:, :length])
        groups = query.shape[2] // key.shape[2]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~allowed, -1e30).softmax(-1)
        hidden = block.merge(hidden, (weights @ value).transpose(1, 2))
        layers.append(weights.unflatten(1, (-1, groups)).sum(2))
    return torch.stack(layers)


def looked_at(store: Store, visible: Tensor, layer: int, row: int, head: int) -> set[int]:
    """Tokens that a head may look at, the condition's counted first."""
    found, words = set(), 0
    slots = [i for i, owner in enumerate(store.head.expand_as(visible)[layer, row].tolist()) if owner == head]
    for slot in slots:
        position = int(store.position[layer, row, slot])
        if position <= CONDITION:  # words and their padding stand at a head's beginning
            token, words = words, words + 1
        else:
            token = store.condition + position
        if position != -1 and visible[layer, row, slot]:
            found.add(token)
    return found


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@torch.inference_mode()
def test_attention_lost_is_what_a_naive_computation_finds(policy: CachePolicy) -> None:
    model = Tiny()
    spec, total = model.spec, model.spec.grid.tokens
    tokens = random_tokens(model, len(PROMPTS))
    condition = model.condition(PROMPTS, guided=True)
    rows, words = condition.mask.shape
    attention = naive_attention(model, condition, tokens.repeat(2, 1))

    loop = Loop(model, policy, rows, words, "none", guided=True)
    loop.prefill_(condition)
    lost = torch.zeros(spec.layers)
    for position in range(total - 1):
        loop.advance_(tokens[:, position].repeat(2), position)
        limit = policy.visible(loop.store, torch.tensor(position))
        visible = torch.ones_like(loop.store.position, dtype=torch.bool)
        visible = visible if limit is None else visible & limit
        for layer in range(spec.layers):
            for row in range(rows):
                for head in range(spec.kv_heads):
                    weights = attention[layer, row, head, words + position]
                    kept = looked_at(loop.store, visible, layer, row, head)
                    lost[layer] += (
                        sum(float(w) for t, w in enumerate(weights) if t not in kept) / weights.sum()
                    )
    by_layer = lost / (rows * spec.kv_heads * (total - 1))

    found = compare(model, policy, PROMPTS, tokens, GUIDANCE)
    assert found.attention_lost_by_layer == pytest.approx(by_layer.tolist(), abs=1e-5)
    assert found.attention_lost == pytest.approx(by_layer.mean().item(), abs=1e-5)
    assert found.attention_lost > 0.01


@pytest.mark.parametrize(("guidance", "guided_tokens"), [(GUIDANCE, None), (GUIDANCE, 7), (1.0, None)])
def test_divergence_and_agreement_are_those_of_the_guided_logits(
    guidance: float, guided_tokens: int | None
) -> None:
    model = Tiny(Grid(4, 5, newline=True))  # some tokens are forbidden at some places
    model.spec = replace(model.spec, guided_tokens=guided_tokens)
    tokens, policy = random_tokens(model, len(PROMPTS)), SlidingWindow(budget=6)
    logits = []
    for each in (FullCache(), policy):
        forced = Decoder(model, each).teacher_force(PROMPTS, tokens, guidance)
        first, conditional = guided_tokens or tokens.shape[1], forced.raw[: len(PROMPTS)]
        logits.append(torch.cat([forced.guided[:, :first], conditional[:, first:]], 1).double())
    full, other = logits
    divergence = sum(
        p * (math.log(p) - math.log(q))
        for ps, qs in zip(full.softmax(-1).flatten(0, 1), other.softmax(-1).flatten(0, 1), strict=True)
        for p, q in zip(ps.tolist(), qs.tolist(), strict=True)
        if p > 0
    )
    found = compare(model, policy, PROMPTS, tokens, guidance)
    assert found.kl == pytest.approx(divergence / tokens.numel(), rel=1e-4)
    assert found.kl > 1e-3
    agreed = (full.argmax(-1) == other.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(agreed.item())


@pytest.mark.parametrize("policy", ["full", "linear:ratio=1", "window:ratio=1"])
def test_a_cache_that_keeps_everything_changes_nothing(policy: str) -> None:
    model = Tiny()
    found = compare(model, registry.load_policy(policy), PROMPTS, random_tokens(model, 3), GUIDANCE)
    assert found.attention_lost == 0
    assert found.attention_lost_by_layer == [0, 0]
    assert found.kl == pytest.approx(0, abs=1e-6)
    assert found.top1_agreement == 1


def test_the_interval_is_wilsons() -> None:
    assert Accuracy.of([True] * 8 + [False] * 2) == Accuracy(
        8, 10, 0.8, pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4)
    )
    assert Accuracy.of([False] * 5) == Accuracy(0, 5, 0, 0, pytest.approx(0.4345, abs=1e-4))


@pytest.mark.parametrize("batch_size", [2, 9])
def test_every_policy_draws_the_same_prompts_from_the_same_seeds(batch_size: int) -> None:
    model, settings = Judged(), Settings(9, 3, batch_size, GUIDANCE, seed=4)
    contenders = [Contender.load(text, model) for text in ("full", "window:ratio=1/4")]
    full, window = evaluate(model, contenders, settings)
    prompts = model.example_prompts(9, 4)
    for row, contender in zip((full, window), contenders, strict=True):
        assert contender.policy is not None
        result = Decoder(model, contender.policy).generate(prompts, seeds=range(4, 13), guidance=GUIDANCE)
        pixels = model.pixels(result.tokens)
        verdicts = [model.satisfies(p, picture) for p, picture in zip(prompts, pixels, strict=True)]
        assert row.accuracy == Accuracy.of(verdicts)
        for group in ("short", "long"):
            of_group = [v for p, v in zip(prompts, verdicts, strict=True) if model.group(p) == group]
            assert row.groups[group] == Accuracy.of(of_group)
        if contender.text == "full":
            forced = result.tokens[:3]
        expected = compare(model, contender.policy, prompts[:3], forced, GUIDANCE)
        assert row.attention_lost == pytest.approx(expected.attention_lost, abs=1e-5)
        assert row.attention_lost_by_layer == pytest.approx(expected.attention_lost_by_layer, abs=1e-5)
        assert row.kl == pytest.approx(expected.kl, abs=1e-5)
        assert row.top1_agreement == pytest.approx(expected.top1_agreement)
    assert (full.ratio, window.ratio) == (1, 1 / 4)
    assert full.kv_bytes == full.full_kv_bytes == window.full_kv_bytes
    assert window.kv_bytes < full.kv_bytes
    assert window.tokens_per_second > 0


def test_without_a_judge_and_without_forced_prompts_those_scores_are_none() -> None:
    model = Tiny()
    settings = Settings(prompts=2, forced_prompts=0, guidance=1.0)
    (row,) = evaluate(model, [Contender.load("window:ratio=1/4", model)], settings)
    assert row.accuracy is None
    assert not row.groups
    assert row.attention_lost is row.attention_lost_by_layer is row.kl is row.top1_agreement is None
    assert row.tokens_per_second is not None


def test_the_ratio_is_the_mean_over_unequal_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arkv.study.evaluation.load_policy", lambda text: Uneven(budget=8))
    assert Contender.load("uneven", Tiny()).ratio == (3 + 8 + 11 + 5) / 4 / 20


def test_a_budget_that_a_policy_refuses_is_a_row_and_a_wrong_parameter_an_error() -> None:
    model = Tiny()
    refused = Contender.load("linear:ratio=1/10", model)
    assert refused.policy is None
    (row,) = evaluate(model, [refused], Settings(prompts=1))
    assert row == Evaluation("linear:ratio=1/10", None, refused.error)
    assert "smallest ratio" in str(row.error)
    with pytest.raises(UnknownNameError, match="anchors"):
        Contender.load("linear:anchor=2,ratio=1", model)


def test_settings_out_of_range() -> None:
    for wrong in ({"prompts": 0}, {"forced_prompts": -1}, {"batch_size": 0}):
        with pytest.raises(ArkvError, match=f"{next(iter(wrong))} is"):
            Settings(**wrong)
    assert Settings(prompts=3).forced_prompts == 3, "there are no more"


@pytest.mark.parametrize(
    ("policy", "name"),
    [
        ("full", "full"),
        ("linear:ratio=1/6", "linear"),
        ("linear:anchors=24,ratio=1/6", "linear:anchors=24"),
        ("ssd:sizes=(1,2),ratio=1/6,buffer=1", "ssd:sizes=(1,2),buffer=1"),
    ],
)
def test_the_rows_of_a_policy_have_its_name_in_common(policy: str, name: str) -> None:
    assert Evaluation(policy, 1.0).name == name


def test_scenes_knows_the_groups_of_its_prompts() -> None:
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    model = Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config)
    groups = [model.group(prompt) for prompt in model.example_prompts(5, 0)]
    assert groups == ["single", "counting", "two_objects", "color_attribution", "position"]
    assert Tiny().group((1,)) is None


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    model = Judged()
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: model)
    return model


def eval_command(out: Path, *more: str | Path) -> list[str]:
    few = ["--prompts", "4", "--forced-prompts", "2"]
    return [
        "eval",
        "--policies",
        "full,window",
        "--ratios",
        "1,1/4",
        *few,
        "--out",
        str(out),
        *map(str, more),
    ]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_speed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def test_a_run_writes_header_rows_and_plot_and_prints_a_table(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plot = tmp_path / "new" / "results.jsonl", tmp_path / "plot.png"
    policies = ["--policies", "full,linear,window:sinks=1", "--ratios", "1,1/10", "--seed", "3"]
    command = eval_command(out, *policies, "--plot", plot, "--quiet")
    assert main(command) == 0
    printed, complaints = capsys.readouterr()
    assert not complaints, "quiet"
    header, *rows = lines_of(out)
    run = header["run"]
    assert run["command"] == " ".join(["arkv", *command])
    told = {"model": "tiny", "dtype": "float32", "device": "cpu", "seed": 3, "prompts": 4, "guidance": 1.5}
    assert told.items() <= run.items()
    assert {"arkv", "torch", "commit", "date", "forced_prompts", "batch_size", "compile"} <= run.keys()
    policies = ["full", *(f"{p}ratio={r}" for p in ("linear:", "window:sinks=1,") for r in ("1", "1/10"))]
    assert [row["policy"] for row in rows] == policies
    assert [row["error"] is None for row in rows] == [True, True, False, True, True]
    assert rows[0]["accuracy"]["judged"] == 4
    assert rows[4]["attention_lost"] > 0
    for policy in policies:
        assert policy in printed
    for heading in (
        "right [95%]",
        "attention lost",
        "KL, nats",
        "top-1",
        "tokens/s",
        "of full",
        "short",
        "long",
    ):
        assert heading in printed
    assert "linear:ratio=1/10 cannot be: " in printed
    image = Image.open(plot)
    assert image.format == "PNG"
    assert image.width > 800


def test_an_interrupted_run_goes_on_where_it_was(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
    assert main(eval_command(whole)) == 0
    assert "picture" in capsys.readouterr().err, "progress is shown unless --quiet"

    generate, drawn = Decoder.generate, []

    def interrupted(self: Decoder, *arguments: Any, **named: Any) -> Any:
        if self.plan.budget == 5:
            raise KeyboardInterrupt
        return generate(self, *arguments, **named)

    def noted(self: Decoder, *arguments: Any, **named: Any) -> Any:
        drawn.append(self.plan.budget)
        return generate(self, *arguments, **named)

    monkeypatch.setattr(Decoder, "generate", interrupted)
    assert main(eval_command(out)) == 130
    assert len(lines_of(out)) == 3
    with out.open("a") as file:
        file.write('{"policy": "window:ratio=1/4", "ratio": 0.2')

    monkeypatch.setattr(Decoder, "generate", noted)
    assert main(eval_command(out)) == 0
    assert without_speed(lines_of(out)[1:]) == without_speed(lines_of(whole)[1:])
    assert drawn == [5, 20], "one policy, and the full cache's own pictures"
    drawn.clear()
    content = out.read_bytes()
    capsys.readouterr()
    assert main(eval_command(out)) == 0
    assert out.read_bytes() == content
    assert not drawn
    assert "window:ratio=1/4" in capsys.readouterr().out, "the table has finished rows, too"


def test_more_policies_may_join_a_file(judged: Judged, tmp_path: Path) -> None:
    out = tmp_path / "results.jsonl"
    assert main(eval_command(out, "--policies", "window", "--ratios", "1/4")) == 0
    assert main(eval_command(out)) == 0
    policies = [row["policy"] for row in lines_of(out)[1:]]
    assert policies == ["window:ratio=1/4", "full", "window:ratio=1"]


def test_other_settings_are_refused(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    assert main(eval_command(out)) == 0
    content = out.read_bytes()
    capsys.readouterr()
    assert main(eval_command(out, "--prompts", "5", "--guidance", "1")) == 1
    told = capsys.readouterr().err
    assert "prompts is 4 there and 5 here" in told
    assert "guidance is 1.5 there and 1.0 here" in told
    assert "seed" not in told
    assert out.read_bytes() == content


FOREIGN = {
    "text": b"dear diary\n",
    "text without a line end": b"dear diary",
    "lines of something else": b'{"policy": "full"}\n{"poli',
    "a list": b"[1, 2]\n",
    "a row of something else": b'{"run": {}}\n3\n',
    "bytes": b"\xff\xfe\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_somebody_else_is_left_alone(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "diary.txt"
    path.write_bytes(content)
    with pytest.raises(ArkvError, match="holds something else"):
        Journal(path, {}, {})
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--policies", "linear:anchor=2"], "did you mean anchors?"),
        (["--policies", "linaer"], "did you mean linear?"),
        (["--plot", "plot.jpg"], "ends in .png"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--seed", "-1"], "seed is -1"),
    ],
)
def test_what_cannot_be_run_is_told_before_a_file_is_begun(
    more: list[str],
    complaint: str,
    judged: Judged,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "results.jsonl"
    assert main(eval_command(out, *more)) == 1
    assert complaint in capsys.readouterr().err
    assert not out.exists()


def test_no_matplotlib_is_told_before_the_first_picture(
    judged: Judged, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "results.jsonl"
    assert main(eval_command(out, "--plot", tmp_path / "plot.png")) == 1
    assert "pip install 'arkv[viz]'" in capsys.readouterr().err
    assert not out.exists()


def test_a_plot_has_a_panel_for_what_was_measured_only() -> None:
    accuracy = Accuracy.of([True, False])
    both = [
        Evaluation("full", 1.0, accuracy=accuracy, attention_lost=0.0),
        Evaluation("linear:ratio=1/6", 1 / 6, accuracy=accuracy, attention_lost=0.1),
        Evaluation("linear:ratio=1/99", None, "too small"),
    ]
    two = draw_comparison(both, "both")
    one = draw_comparison([replace(row, accuracy=None) for row in both], "one")
    none = draw_comparison([replace(row, accuracy=None, attention_lost=None) for row in both], "none")
    assert two.width > one.width >= none.width


def panels(rows: list[Evaluation]) -> dict[str, set[str]]:
    """Labels of the lines by the title of their panel."""
    return {
        axes.get_title(): set(axes.get_legend_handles_labels()[1])
        for axes in comparison_figure(rows, "a title").axes
        if axes.get_visible()
    }


def test_without_a_judge_the_plot_has_the_divergence() -> None:
    rows = [
        Evaluation("full", 1.0, attention_lost=0.0, kl=0.0),
        Evaluation("linear:ratio=1/6", 1 / 6, attention_lost=0.1, kl=0.02),
    ]
    drawn = panels(rows)
    assert len(drawn) == 2
    (divergence,) = [labels for title, labels in drawn.items() if "KL" in title]
    assert divergence == {"linear"}


@pytest.mark.parametrize("judged", [True, False])
def test_more_policies_than_colours_get_a_panel_each_the_best_first(judged: bool) -> None:
    names = ["h2o", "linear", "random", "rkv", "snapkv", "tova", "window"]
    rows = [Evaluation("full", 1.0, accuracy=Accuracy.of([True] * 8) if judged else None, attention_lost=0.0)]
    for worth, name in enumerate(names):
        right = Accuracy.of([True] * worth + [False] * (8 - worth)) if judged else None
        rows.append(Evaluation(f"{name}:ratio=1/6", 1 / 6, accuracy=right, attention_lost=0.9 - worth / 10))
    assert list(panels(rows)) == names[::-1]
