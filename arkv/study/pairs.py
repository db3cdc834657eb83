"""Two policies on the same prompts and seeds: how much more often one is right, and how sure that is.

Two intervals that overlap say little: most pictures are right, or wrong, under both policies. What tells them
apart are the pictures that are right under one of them only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from scipy.stats import binomtest  # type: ignore[import-untyped]

from arkv.errors import ArkvError
from arkv.study.evaluation import CONFIDENCE, Evaluation


@dataclass(frozen=True)
class Pair:
    """The pictures of two policies, prompt by prompt.

    Attributes:
        first: a policy, with its parameters.
        second: the other one.
        judged: prompts whose pictures were judged under both.
        first_only: those right under the first alone.
        second_only: those right under the second alone.
        difference: share right under the second less share right under the first.
        low: lower end of the 95% interval of the difference: Wald's for paired shares, half a picture
            added to each of the four cells (Agresti and Min, Statistics in Medicine 24, 2005).
        high: upper end.
        p: of McNemar's exact test, that both are right equally often.
    """

    first: str
    second: str
    judged: int
    first_only: int
    second_only: int
    difference: float
    low: float
    high: float
    p: float


def pair(first: Evaluation, second: Evaluation) -> Pair:
    """Compare two policies picture by picture.

    Raises:
        ArkvError: one of them is refused, they did not draw the same prompts from the same seeds, or nobody
            judged them.
    """
    for row in (first, second):
        if row.error is not None:
            raise ArkvError(f"{row.policy} cannot be: {row.error}")
    prompts = [row.decided_by and row.decided_by.get("prompts") for row in (first, second)]
    seeds = [[outcome.seed for outcome in row.outcomes] for row in (first, second)]
    if prompts[0] != prompts[1] or seeds[0] != seeds[1]:
        raise ArkvError(
            f"{first.policy} and {second.policy} did not draw the same prompts from the same seeds: "
            "evaluate both in one file"
        )
    both = zip(first.outcomes, second.outcomes, strict=True)
    verdicts = [(a.right, b.right) for a, b in both if a.right is not None and b.right is not None]
    if not verdicts:
        raise ArkvError(f"no pictures of {first.policy} and {second.policy} were judged")
    n, only = len(verdicts), (verdicts.count((True, False)), verdicts.count((False, True)))
    centre, reach = _interval(n, *only)
    return Pair(
        first.policy,
        second.policy,
        n,
        *only,
        difference=(only[1] - only[0]) / n,
        low=max(-1.0, centre - reach),
        high=min(1.0, centre + reach),
        p=float(binomtest(only[0], sum(only)).pvalue) if sum(only) else 1.0,
    )


def _interval(n: int, first_only: int, second_only: int) -> tuple[float, float]:
    """Middle and half the width of the interval of the difference."""
    total, b, c = n + 2, first_only + 0.5, second_only + 0.5
    centre = (c - b) / total
    quantile = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    return centre, quantile * math.sqrt(max(0.0, b + c - (c - b) ** 2 / total)) / total
