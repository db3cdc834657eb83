"""The results pages have what their rows print, and say what their rows say."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from tiny import Tiny

from arkv import registry
from arkv.study import Settings, compare_policies

RESULTS = Path(__file__).parents[2] / "docs/results"


@pytest.fixture(scope="module")
def room() -> Iterator[dict[str, ModuleType]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(RESULTS))
        yield {name: importlib.import_module(name) for name in ("pages", "claims", "stale")}


def test_pages_are_what_their_rows_print(room: dict[str, ModuleType]) -> None:
    for name, text in room["pages"].pages().items():
        assert (RESULTS / name).read_text() == text, "make results"
        assert len(room["pages"].PRINTED.findall(text)) == len(room["pages"].PAGES[name])
    changed = (RESULTS / "scenes.md").read_text().replace("79.5%", "00.1%")
    assert "00.1%" not in room["pages"].with_tables("scenes.md", changed), "a table is not taken over"


def test_every_sentence_is_held_by_numbers(room: dict[str, ModuleType]) -> None:
    page, wrong = (RESULTS / "scenes.md").read_text(), room["claims"].wrong_claims
    for each, rows in room["claims"].SAID.items():
        assert not wrong((RESULTS / each).read_text(), rows)
    (told,) = wrong(page.replace("159 of 200", "165 of 200"), "scenes")
    assert told.startswith('the rows do not say "At ratio 1 nothing is lost')
    (told,) = wrong(page.replace("**A window is", "**A window of a line is"), "scenes")
    assert told.startswith("nothing holds '- **A window of a line is not enough.**")
    for lead, claim in room["claims"].CLAIMS.items():
        if lead not in " ".join(page.split()):
            continue
        rows = dict(room["claims"].evaluated("scenes"))
        said = page[page.index(f"**{lead[:20]}") :].partition("\n- **")[0].partition("\n## ")[0]
        said = " ".join(said.split())
        assert claim(rows, said)
        for policy, row in rows.items():
            if ("linear" not in policy or lead.startswith("LineAR")) and row.asked_ratio:
                rows[policy] = replace(row, accuracy=rows["full"].accuracy, kl=9.0)
        assert not claim(rows, said), f"{lead} would be said of anything"


def test_rows_that_are_older_than_the_code_are_named(
    room: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = Tiny(), tmp_path / "rows.jsonl"
    room["stale"].loaded_model.cache_clear()
    loaded = []

    def load(name: str, dtype: str, weights: str | None) -> Tiny:
        loaded.append((dtype, weights))
        return model

    monkeypatch.setattr(room["stale"].arkv, "load_model", load)
    monkeypatch.setattr(registry, "load_model", lambda *_, **__: model)  # after arkv's, found through it
    settings = Settings(prompts=1, forced_prompts=0)
    compare_policies(
        model,
        ["window", "full"],
        ratios=["1/2"],
        kv_dtypes=[None, "int8"],
        settings=settings,
        out=out,
        shared={"loading": {"weights": "int4"}},
    )
    assert not room["stale"].stale_rows(out)
    header, *rows = map(json.loads, out.read_text().splitlines())
    assert loaded == [(header["run"]["dtype"], "int4")]
    rows[0]["decided_by"]["policy"]["source"] = "other"
    del rows[3]["decided_by"]
    out.write_text("".join(json.dumps(line) + "\n" for line in [header, *rows]))
    here = rows[1]["decided_by"]["policy"]["source"]
    assert room["stale"].stale_rows(out) == {
        f"policy source was other and is {here}": ["window:ratio=1/2"],
        "it does not say whose code made it": ["full@int8"],
    }


def test_files_of_other_scripts_have_no_rows_that_could_be_older(
    room: dict[str, ModuleType], tmp_path: Path
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text('{"model": "scenes", "kl": 0.1}\n')
    assert room["stale"].stale_rows(out) == {}
