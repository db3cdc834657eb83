"""Policies compared at one desk: rows that are kept in a file, told when they are stale, set side by side.

model = arkv.load_model("scenes")
found = arkv.study.compare_policies(model, ["linear", "snapkv"], ratios=["1/6"], out="results.jsonl")
found.pair("snapkv:ratio=1/6", "linear:ratio=1/6").difference
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from arkv.attention.quantization import KvDtype
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError
from arkv.jobs.journal import Journal
from arkv.jobs.provenance import changes, facts_of_model, prompts_digest
from arkv.model import Model
from arkv.pictures.prompts import read_prompts
from arkv.registry import at_ratios
from arkv.study.evaluation import Contender, Evaluation, Settings, describe, evaluate
from arkv.study.labels import without_ratio
from arkv.study.pairs import Pair, pair


@dataclass(frozen=True)
class Comparison:
    """What policies score on the same prompts.

    Attributes:
        run: settings, versions and machine.
        rows: by policy with its parameters, in the order asked for.
        stale: rows of the file that were run again, and why.
    """

    run: Mapping[str, Any]
    rows: Mapping[str, Evaluation]
    stale: Mapping[str, str]

    def pair(self, first: str, second: str) -> Pair:
        """Two policies picture by picture.

        Args:
            first: with its parameters, as in `rows`.
            second: likewise; the difference is its share right less the first one's.

        Raises:
            ArkvError: there is no such row, or as `arkv.study.pairs.pair`.
        """
        for text in (first, second):
            if text not in self.rows:
                raise ArkvError(f"there is no row of {text!r}: there are {', '.join(self.rows)}")
        return pair(self.rows[first], self.rows[second])

    def pairs(self, first: str, second: str) -> list[Pair]:
        """Two policies at every ratio that both were asked for, picture by picture.

        Args:
            first: a row by its whole name, or a policy without its ratio, which stands for its rows at all
                ratios.
            second: likewise. One row beside several, such as the full cache's, is paired with each of them.

        Raises:
            ArkvError: there is no such row, no ratio that both have, or as `pair`.
        """
        found, alone = {}, False
        for text in (first, second):
            rows = [self.rows[text]] if text in self.rows else self.rows.values()
            named = [row for row in rows if text in (row.policy, row.name)]
            if not named:
                raise ArkvError(f"there is no row of {text!r}: there are {', '.join(self.rows)}")
            found[text] = [row for row in named if row.error is None]
            if not found[text]:
                raise ArkvError(f"{named[0].policy} cannot be: {named[0].error}")
            alone |= text in self.rows or all(row.asked_ratio is None for row in named)
        both = [
            (a, b) for a in found[first] for b in found[second] if alone or a.asked_ratio == b.asked_ratio
        ]
        if not both:
            raise ArkvError(f"{first!r} and {second!r} have no ratio in common")
        return [pair(a, b) for a, b in both]

    def by_ratio(self) -> dict[str, dict[str, Evaluation]]:
        """The rows by ratio, the greatest first, and then by policy without its ratio.

        Policies that were not asked for a ratio stand under "", before the others.
        """
        found: dict[str, dict[str, Evaluation]] = {}
        for row in self.rows.values():
            found.setdefault(row.asked_ratio or "", {})[row.name] = row
        ratios = sorted(found, key=lambda ratio: (ratio != "", -_number(ratio)))
        return {ratio: found[ratio] for ratio in ratios}

    def by_bytes(self) -> list[Evaluation]:
        """The rows from the fewest bytes of keys and values to the most, those that are refused left out."""
        return sorted(
            (row for row in self.rows.values() if row.kv_bytes is not None),
            key=lambda row: row.kv_bytes or 0,
        )


def _number(ratio: str) -> Fraction:
    """A ratio as it was asked for; less than any of them where it is none."""
    try:
        return Fraction(ratio.strip("'\""))
    except (ValueError, ZeroDivisionError):
        return Fraction(-1)


def check_pairs(pairs: Sequence[Sequence[str]], labels: Sequence[str]) -> None:
    """Refuse pairs that no rows will be found for.

    Args:
        pairs: of names, as for `Comparison.pairs`.
        labels: what the rows will be called.

    Raises:
        ArkvError: there will be no such row.
    """
    names = {without_ratio(label) for label in labels}
    for text in (text for two in pairs for text in two):
        if text not in names and text not in labels:
            raise ArkvError(f"there is no row of {text!r}: there are {', '.join(labels)}")


def compare_policies(
    model: Model,
    policies: Sequence[str],
    *,
    ratios: Sequence[str] = ("1/6",),
    settings: Settings | None = None,
    kv_dtypes: Sequence[KvDtype | None] = (None,),
    prompts: Sequence[Any] | Path | None = None,
    out: Path | str | None = None,
    pictures_to: Path | None = None,
    pairs: Sequence[Sequence[str]] = (),
    shared: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> Comparison:
    """Evaluate policies at ratios, or take from a file what has been evaluated.

    A row of the file counts if the same code, weights, prompts and settings would make it again. One that
    something else has made is stale: it is told and run again.

    Args:
        model: what draws.
        policies: names, with parameters if any.
        ratios: for those policies that have a ratio and are not given their budget.
        settings: None for the usual ones, with the model's own guidance and as many prompts as are given.
        kv_dtypes: every policy is evaluated with each, None for what the settings say; the rows of the others
            are called "linear:ratio=1/6@int8".
        prompts: what to draw, or a file of prompts (see `arkv.pictures.prompts`); None for the model's own.
        out: JSON lines, a row as soon as it is done; of an earlier run, what it has is not run again.
        pictures_to: folder for the pictures; None to keep none.
        pairs: what will be asked of `Comparison.pairs`: names that no row has are refused at once.
        shared: what else has to be the same for rows to stand in one file; ready for JSON.
        facts: what else is to be known of the run; ready for JSON.
        progress: show a bar, in pictures.
        tell: is given a line about each stale row, and about how many rows are done.

    Raises:
        ArkvError: a policy, a prompt or a setting is wrong, the file was begun with other settings, or as
            `arkv.study.evaluation.evaluate`.
    """
    if isinstance(prompts, Path):
        prompts = [each.prompt for each in read_prompts(prompts)[1]]
    if settings is None:
        count = Settings.prompts if prompts is None else len(prompts)
        settings = Settings(count, guidance=model.spec.guidance)
    Sampling(settings.guidance).check(model.spec.vocabulary)
    if prompts is None:
        prompts = model.example_prompts(settings.prompts, settings.seed)
    model.check_prompts(prompts)
    texts = at_ratios(policies, ratios)
    contenders = [Contender.load(text, model, kv_dtype) for text in texts for kv_dtype in kv_dtypes]
    check_pairs(pairs, [one.text for one in contenders])
    own, of_run = describe(model, settings)
    own, of_run = own | dict(shared or {}), of_run | dict(facts or {}) | {"prompt_list": list(prompts)}
    journal = None if out is None else Journal(Path(out), own, of_run)
    found = {} if journal is None else journal.rows
    others = {"model": facts_of_model(model), "prompts": prompts_digest(prompts)}
    decided_by = {one.text: one.decided_by(model, others) for one in contenders}
    stale, rows = {}, {}
    for text, here in decided_by.items():
        if text not in found:
            continue
        try:
            row = Evaluation.from_dict(found[text])
        except ArkvError as error:
            stale[text] = str(error)
            continue
        if told := changes(row.decided_by, here):
            stale[text] = "; ".join(told)
        else:
            rows[text] = row
    if tell is not None:
        for text, reason in stale.items():
            tell(f"{out}: the row of {text} is stale and is run again: {reason}")
        if rows:
            tell(f"{out}: {len(rows)} of {len(contenders)} are done")
    pending = [one for one in contenders if one.text not in rows]
    if journal is not None and pending and journal.run.get("prompt_list") != of_run["prompt_list"]:
        journal.run |= {"prompt_list": of_run["prompt_list"]}  # what the newest rows are of
        journal.replace(journal.rows.values())
    for row in evaluate(model, pending, settings, progress, prompts=prompts, pictures_to=pictures_to):
        rows[row.policy] = row = dataclasses.replace(row, decided_by=decided_by[row.policy])
        if journal is not None:
            # A file may be finished by another commit than it was begun with.
            journal.append(dataclasses.asdict(row) | {"commit": of_run.get("commit")})
    return Comparison(own | of_run, {one.text: rows[one.text] for one in contenders}, stale)
