"""Which rows other code, weights or prompts have made than there are now."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import arkv
from arkv.errors import ArkvError
from arkv.jobs.journal import NoHeader, read_journal
from arkv.jobs.provenance import Facts, changes, facts_of_class, facts_of_model, prompts_digest
from arkv.model import Model
from arkv.speed.contestant import Configuration
from arkv.study.evaluation import Contender
from arkv.study.labels import unlabelled
from arkv.weights.quantization import WeightDtype


def stale_rows(path: Path) -> dict[str, list[str]]:
    """Rows of a file that would be run again, by the reason.

    Args:
        path: JSON lines of `arkv eval` or `arkv bench`; in others there are none.
    """
    timed = '"case":' in path.read_text(encoding="utf-8")
    try:
        run, rows, _ = read_journal(path, "case" if timed else "policy")
    except NoHeader:
        return {}
    told: dict[str, list[str]] = {}
    for name, row in rows.items():
        there = row.get("decided_by")
        try:
            here = {} if there is None else (timed_here if timed else evaluated_here)(run, row)
            reasons = changes(there, here)
        except ArkvError as error:
            reasons = [str(error)]
        if reasons:
            told.setdefault("; ".join(reasons), []).append(name)
    return told


def evaluated_here(run: Mapping[str, Any], row: Mapping[str, Any]) -> Facts:
    """What would decide on a row of `arkv eval` now."""
    text, kv_dtype = unlabelled(row["policy"])
    loading = run.get("loading") or {}
    model, facts = loaded_model(run["model"], run.get("dtype"), False, loading.get("weights"))
    prompts = model.example_prompts(run["prompts"], run["seed"])
    if json.loads(json.dumps(prompts)) != run["prompt_list"]:
        prompts = run["prompt_list"]  # those of a file, which are texts
    others = {"model": facts, "prompts": prompts_digest(prompts)}
    return Contender.load(text, model, kv_dtype).decided_by(model, others)


def timed_here(run: Mapping[str, Any], row: Mapping[str, Any]) -> Facts:
    """What would decide on a row of `arkv bench` now."""
    loading = run.get("loading") or {}
    random = bool(loading.get("random_weights"))
    model, facts = loaded_model(row["model"], run.get("dtype"), random, loading.get("weights"))
    return Configuration(row["policy"], row["batch_size"], row["memory"]).decided_by(model, {"model": facts})


@cache
def loaded_model(
    name: str, dtype: str | None, random: bool, weights: WeightDtype | None = None
) -> tuple[Model, Facts]:
    """A model, and whose code and weights it is; without numbers where they are drawn anyway."""
    if random:
        model = arkv.load_model(name, random_weights=True, device="meta")
        return model, facts_of_class(type(model))
    model = arkv.load_model(name, dtype=dtype, weights=weights)  # rounded weights are others
    return model, facts_of_model(model)
