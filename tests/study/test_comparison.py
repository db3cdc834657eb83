"""Policies side by side: pairs, ratios, and rows of a file that other code has made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import norm
from tiny import Tiny
from torch import Tensor

import arkv
from arkv import study
from arkv.decoder import Decoder
from arkv.errors import ArkvError
from arkv.jobs import provenance
from arkv.policies.linear import LineAR
from arkv.study import Evaluation, Settings, compare_policies
from arkv.study.evaluation import Outcome
from arkv.study.labels import labelled, unlabelled
from arkv.study.pairs import pair

QUICK = Settings(prompts=4, forced_prompts=0, guidance=1.5)


class Judged(Tiny):
    """With a judge of sorts."""

    def satisfies(self, prompt: Any, picture: Tensor) -> bool:
        return int(picture.sum()) % 3 > 0


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The budgets of what is drawn from now on, one a batch."""
    generate, budgets = Decoder.generate, []

    def noted(self: Decoder, *arguments: Any, **named: Any) -> Any:
        budgets.append(self.plan.budget)
        return generate(self, *arguments, **named)

    monkeypatch.setattr(Decoder, "generate", noted)
    return budgets


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def test_every_picture_is_in_the_file_with_its_seed_and_verdict(tmp_path: Path) -> None:
    model, out = Judged(), tmp_path / "rows.jsonl"
    found = compare_policies(model, ["window"], ratios=["1/4"], settings=replace(QUICK, seed=7), out=out)
    row = found.rows["window:ratio=1/4"]
    prompts = model.example_prompts(4, 7)
    pictures = Decoder(model, arkv.load_policy("window:ratio=1/4")).generate(
        prompts, seeds=range(7, 11), guidance=1.5
    )
    verdicts = [model.satisfies(p, x) for p, x in zip(prompts, model.pixels(pictures.tokens), strict=True)]
    assert row.outcomes == tuple(Outcome(7 + i, right) for i, right in enumerate(verdicts))
    header = json.loads(out.read_text().splitlines()[0])["run"]
    assert header["prompt_list"] == [list(prompt) for prompt in prompts]
    again = compare_policies(model, ["window"], ratios=["1/4"], settings=replace(QUICK, seed=7), out=out)
    assert again.rows == found.rows, "back from the file"


def test_a_row_that_other_code_has_made_is_told_and_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, told = Judged(), tmp_path / "rows.jsonl", list[str]()

    def run(policies: list[str]) -> study.Comparison:
        return compare_policies(
            model, policies, ratios=["1/2", "1/9"], settings=QUICK, out=out, tell=told.append
        )

    both = ["window", "linear:anchors=1,recent=4"]
    run(both)
    budgets = drawn(monkeypatch)
    assert not run(both).stale
    assert not budgets
    source = provenance._source
    monkeypatch.setattr(
        provenance, "_source", lambda name, kinds: source(name, kinds) + "x" * (name == LineAR.__module__)
    )
    told.clear()
    found = run(both)
    # The one that refuses a ninth is stale as well: it may refuse no longer.
    assert list(found.stale) == [f"{both[1]},ratio=1/2", f"{both[1]},ratio=1/9"]
    assert budgets == [10]
    assert "is stale and is run again: policy source was " in told[0]
    assert told[-1].endswith("2 of 4 are done")
    assert not run(both).stale, "once is enough"
    assert [row["policy"] for row in rows_of(out)].count(f"{both[1]},ratio=1/2") == 2


def test_other_weights_and_other_prompts_make_rows_stale(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"

    def run(model: Tiny, prompts: list[Any]) -> dict[str, str]:
        found = compare_policies(model, ["full"], settings=QUICK, prompts=prompts, out=out)
        return dict(found.stale)

    prompts = [(1,), (2,), (3, 4), (5,)]
    assert not run(Judged(), prompts)
    assert run(Judged(seed=1), prompts)["full"].startswith("model weights was ")
    assert run(Judged(seed=1), prompts[::-1])["full"].startswith("prompts was ")


def test_rows_from_before_are_stale(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    compare_policies(Judged(), ["full"], settings=QUICK, out=out)
    header, row = out.read_text().splitlines()
    old = {key: value for key, value in json.loads(row).items() if key not in ("decided_by", "outcomes")}
    out.write_text(f"{header}\n{json.dumps(old)}\n")
    found = compare_policies(Judged(), ["full"], settings=QUICK, out=out)
    assert found.stale == {"full": "it does not say whose code made it"}
    assert found.rows["full"].outcomes


def test_prompts_come_from_a_file_and_pictures_go_to_a_folder(tmp_path: Path) -> None:
    class Numbers(Tiny):
        """Prompts as a file has them."""

        def condition(self, prompts: Any, guided: bool) -> Any:
            return super().condition([(int(prompt),) for prompt in prompts], guided)

        def check_prompts(self, prompts: Any) -> None:
            super().check_prompts([(int(prompt),) for prompt in prompts])

    file = tmp_path / "prompts.txt"
    file.write_text("3\n1\n7\n")
    settings = replace(QUICK, prompts=3, seed=5)
    compare_policies(Numbers(), ["window"], settings=settings, prompts=file, pictures_to=tmp_path / "to")
    images = sorted((tmp_path / "to" / "window-ratio=1-6").iterdir())
    assert [image.name for image in images] == ["5.png", "6.png", "7.png"]
    policy = arkv.load_policy("window:ratio=1/6")
    expected = Decoder(Numbers(), policy).generate(["3", "1", "7"], seeds=range(5, 8), guidance=1.5).images
    assert [Image.open(image).tobytes() for image in images] == [image.tobytes() for image in expected]
    with pytest.raises(ArkvError, match="the settings are for 4 prompts, and 3 are given"):
        compare_policies(Numbers(), ["window"], settings=QUICK, prompts=file)


def judged(policy: str, verdicts: str, first_seed: int = 0) -> Evaluation:
    """A row with these verdicts: 1, 0, or ? where nobody can tell."""
    right = {"1": True, "0": False, "?": None}
    outcomes = tuple(Outcome(first_seed + i, right[v]) for i, v in enumerate(verdicts))
    return Evaluation(policy, 0.5, outcomes=outcomes)


def test_a_pair_counts_the_pictures_that_one_alone_gets_right() -> None:
    found = pair(judged("a", "110010?1"), judged("b", "1011101?"))
    # Two are judged under one only.
    assert (found.judged, found.first_only, found.second_only) == (6, 1, 2)
    assert found.difference == 1 / 6
    # Half a picture more in each cell: 1.5 and 2.5 of 8.
    spread = norm.ppf(0.975) * (4 - 1 / 8) ** 0.5 / 8
    assert (found.low, found.high) == (pytest.approx(1 / 8 - spread), pytest.approx(1 / 8 + spread))


def test_pictures_that_are_alike_under_both_say_nothing() -> None:
    verdicts = [("1", "1")] * 53 + [("1", "0")] * 8 + [("0", "1")] * 16 + [("0", "0")] * 9
    first, second = ("".join(v) for v in zip(*verdicts, strict=True))
    found = pair(judged("a", first), judged("b", second))
    assert found.difference == pytest.approx(8 / 86)
    assert found.low < 0 < found.high
    assert found.p == pytest.approx(0.1516, abs=1e-4), "8 of 24, two-sided"
    fewer = pair(judged("a", first[50:]), judged("b", second[50:]))
    assert fewer.p == found.p
    assert fewer.high - fewer.low > found.high - found.low


def test_a_policy_beside_itself_differs_by_nothing() -> None:
    found = pair(judged("a", "1101"), judged("a", "1101"))
    assert (found.difference, found.p) == (0, 1)
    assert found.low == -found.high < 0


def test_what_cannot_be_paired_is_told() -> None:
    with pytest.raises(ArkvError, match="did not draw the same prompts from the same seeds"):
        pair(judged("a", "11"), judged("b", "11", first_seed=4))
    with pytest.raises(ArkvError, match="were judged"):
        pair(judged("a", "??"), judged("b", "11"))
    found = compare_policies(Judged(), ["full"], settings=QUICK)
    with pytest.raises(ArkvError, match="there is no row of 'window': there are full"):
        found.pair("full", "window")


def test_rows_stand_by_ratio_and_by_policy() -> None:
    found = compare_policies(
        Judged(), ["full", "window", "linear:anchors=1,recent=4"], ratios=["1/4", "1/2"], settings=QUICK
    )
    table = found.by_ratio()
    assert list(table) == ["", "1/2", "1/4"]
    assert list(table["1/2"]) == ["window", "linear:anchors=1,recent=4"]
    assert table["1/4"]["window"] is found.rows["window:ratio=1/4"]
    assert found.pair("window:ratio=1/4", "full").judged == 4


def test_precision_is_swept_and_counted_in_bytes(tmp_path: Path) -> None:
    model, out = Judged(), tmp_path / "rows.jsonl"

    def run() -> study.Comparison:
        return compare_policies(
            model, ["full", "window"], ratios=["1/2"], kv_dtypes=[None, "int8"], settings=QUICK, out=out
        )

    found = run()
    assert list(found.rows) == ["full", "full@int8", "window:ratio=1/2", "window:ratio=1/2@int8"]
    assert [row.policy for row in found.by_bytes()] == [
        "window:ratio=1/2@int8",
        "full@int8",
        "window:ratio=1/2",
        "full",
    ]
    exact, stored = found.rows["window:ratio=1/2"], found.rows["window:ratio=1/2@int8"]
    assert (stored.name, stored.asked_ratio) == ("window@int8", "1/2")
    expected = Decoder(model, arkv.load_policy("window:ratio=1/2"), kv_dtype="int8").generate(
        model.example_prompts(4, 0), seeds=range(4), guidance=1.5
    )
    assert stored.kv_bytes == expected.stats.kv_bytes
    assert stored.share_of_bytes < exact.share_of_bytes < found.rows["full"].share_of_bytes == 1
    assert run().rows == found.rows, "back from the file"


@pytest.mark.parametrize("label", ["linear:ratio=1/6", "ssd:profile='a@b.json',ratio=1/6"])
def test_a_label_says_how_keys_are_stored(label: str) -> None:
    assert unlabelled(label) == (label, None)
    assert unlabelled(labelled(label, "fp8")) == (label, "fp8")


def test_the_front_door_has_what_it_says() -> None:
    assert [getattr(study, name).__name__ for name in study.__all__] == list(study.__all__)
    with pytest.raises(AttributeError, match=r"'arkv\.study' has no attribute 'compare_polices'"):
        study.compare_polices  # noqa: B018


def test_a_refused_row_is_told_as_such_and_does_not_stand_for_another_ratio() -> None:
    found = compare_policies(Judged(), ["linear:anchors=9", "window"], ratios=["1", "1/2"], settings=QUICK)
    (only,) = found.pairs("linear:anchors=9", "window")
    assert (only.first, only.second) == ("linear:anchors=9,ratio=1", "window:ratio=1")
    refused = "linear:anchors=9,ratio=1/2"
    with pytest.raises(ArkvError, match=f"^{refused} cannot be: LineAR"):
        found.pairs(refused, "window")
    with pytest.raises(ArkvError, match=f"^{refused} cannot be: LineAR"):
        found.pair("window:ratio=1/2", refused)


def test_a_pair_that_no_row_will_be_of_is_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(ArkvError, match="there is no row of 'widnow': there are window:ratio=1/2, full"):
        compare_policies(Tiny(), ["window", "full"], ratios=["1/2"], pairs=[("widnow", "full")], out=out)
    assert not out.exists()


@pytest.mark.parametrize(("ratio", "place"), [("abc", 1), ("1/0", 1), ("'1/2'", 0)])
def test_ratios_that_are_no_fractions_stand_last(ratio: str, place: int) -> None:
    settings = Settings(prompts=1, forced_prompts=0)
    found = compare_policies(Tiny(), [f"window:ratio={ratio}", "window"], ratios=["1/4"], settings=settings)
    assert list(found.by_ratio()).index(ratio) == place


@pytest.mark.parametrize(
    ("field", "edited"),
    [
        ("ratio", "half"),
        ("accuracy", 5),
        ("accuracy", {"right": 1}),
        ("accuracy", {"right": 1, "judged": 1, "share": "all", "low": 0.2, "high": 1.0}),
        ("groups", {"single": None}),
        ("outcomes", [[1]]),
        ("outcomes", [[1, "maybe"]]),
        ("decided_by", "me"),
        ("kv_bytes", "abc"),
    ],
)
def test_a_row_that_somebody_edited_is_run_again(tmp_path: Path, field: str, edited: object) -> None:
    out, settings = tmp_path / "rows.jsonl", Settings(prompts=1, forced_prompts=0)
    first = compare_policies(Tiny(), ["window"], ratios=["1/2"], settings=settings, out=out)
    header, row = map(json.loads, out.read_text().splitlines())
    out.write_text("".join(json.dumps(line) + "\n" for line in (header, row | {field: edited})))
    again = compare_policies(Tiny(), ["window"], ratios=["1/2"], settings=settings, out=out)
    assert again.stale["window:ratio=1/2"].startswith("it is damaged: ")
    assert again.rows["window:ratio=1/2"].outcomes == first.rows["window:ratio=1/2"].outcomes


def test_the_first_line_names_the_prompts_of_the_newest_rows(tmp_path: Path) -> None:
    out, settings = tmp_path / "rows.jsonl", Settings(prompts=1, forced_prompts=0)
    for prompt in Tiny().example_prompts(2, seed=0):
        compare_policies(Tiny(), ["window"], ratios=["1/2"], settings=settings, prompts=[prompt], out=out)
        header = json.loads(out.read_text().splitlines()[0])
        assert header["run"]["prompt_list"] == json.loads(json.dumps([prompt]))
