"""Which rows other code, weights or prompts have made than there are now."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import arkv
from arkv.errors import ArkvError
from arkv.jobs.journal import read_journal
from arkv.jobs.provenance import changes, facts_of_model, prompts_digest
from arkv.model import Model
from arkv.study.evaluation import Contender
from arkv.study.labels import unlabelled


def stale_rows(path: Path) -> dict[str, list[str]]:
    """Rows of a file that would be run again, by the reason.

    Args:
        path: JSON lines of `arkv eval` or `arkv bench`.
    """
    key = "case" if '"case":' in path.read_text(encoding="utf-8") else "policy"
    run, rows, _ = read_journal(path, key)
    told: dict[str, list[str]] = {}
    for name, row in rows.items():
        there = row.get("decided_by")
        here = {} if there is None else decided_by_here(run, row["policy"], row.get("model"))
        if reasons := changes(there, here):
            told.setdefault("; ".join(reasons), []).append(name)
    return told


def decided_by_here(run: dict[str, Any], policy: str, model: str | None) -> dict[str, Any]:
    """What would decide on a row now."""
    text, kv_dtype = unlabelled(policy)
    loaded, facts = loaded_model(model or run["model"])
    prompts = loaded.example_prompts(run["prompts"], run["seed"])
    if json.loads(json.dumps(prompts)) != run["prompt_list"]:
        prompts = run["prompt_list"]  # those of a file, which are texts
    others = {"model": facts, "prompts": prompts_digest(prompts)}
    try:
        return dict(Contender.load(text, loaded, kv_dtype).decided_by(loaded, others))
    except ArkvError as error:
        return {"policy": f"gone: {error}", **others}


@cache
def loaded_model(name: str) -> tuple[Model, Any]:
    """A model, and whose code and weights it is."""
    model = arkv.load_model(name)
    return model, facts_of_model(model)
