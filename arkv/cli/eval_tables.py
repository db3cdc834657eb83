"""The tables of `arkv eval`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from arkv.cli.tables import print_table

if TYPE_CHECKING:
    from arkv.study.comparison import Comparison
    from arkv.study.evaluation import Accuracy, Evaluation
    from arkv.study.pairs import Pair

Order = Literal["policy", "ratio", "bytes"]
"""What the rows of a table are ordered by."""


def print_evaluations(found: Comparison, by: Order) -> None:
    """Tables of what was measured; a score that there is none of is a dash."""
    from arkv.estimate import format_bytes

    done = [row for row in ordered(found, by) if row.error is None]
    header = ("policy", "right [95%]", "attention lost", "KL, nats", "top-1", "tokens/s", "KV", "of full")
    lines = [
        (
            row.policy,
            _right(row.accuracy),
            _told(row.attention_lost, ".2%"),
            _told(row.kl, ".4f"),
            _told(row.top1_agreement, ".1%"),
            _told(row.tokens_per_second, ",.0f"),
            format_bytes(row.kv_bytes or 0),
            _told(row.share_of_bytes, ".1%"),
        )
        for row in done
    ]
    if done:
        print_table(header, lines, right=range(1, len(header)))
    groups = list(dict.fromkeys(group for row in done for group in row.groups))
    if groups:
        lines_of_groups = [(row.policy, *(_right(row.groups.get(group)) for group in groups)) for row in done]
        print()
        print_table(("right [95%]", *groups), lines_of_groups, right=range(1, len(groups) + 1))
    for row in found.rows.values():
        if row.error is not None:
            print(f"\n{row.policy} cannot be: {row.error}")


def ordered(found: Comparison, by: Order) -> list[Evaluation]:
    """The rows as they were asked for; the best of each ratio first; or from the fewest bytes."""
    if by == "bytes":
        return found.by_bytes()
    if by == "ratio":
        of_ratios = (list(rows.values()) for rows in found.by_ratio().values())
        return [row for rows in of_ratios for row in sorted(rows, key=_share, reverse=True)]
    return list(found.rows.values())


def print_pairs(pairs: Sequence[Pair]) -> None:
    """Two policies a line: how much more often the second is right, by the pictures that tell them apart."""
    header = ("first", "second", "prompts", "first only", "second only", "second less first [95%]", "p")
    lines = [
        (
            each.first,
            each.second,
            each.judged,
            each.first_only,
            each.second_only,
            f"{100 * each.difference:+.1f} [{100 * each.low:+.1f}, {100 * each.high:+.1f}]",
            f"{each.p:.2g}",
        )
        for each in pairs
    ]
    print()
    print_table(header, lines, right=range(2, len(header)))


def _share(row: Evaluation) -> float:
    return -1.0 if row.accuracy is None else row.accuracy.share


def _told(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _right(accuracy: Accuracy | None) -> str:
    if accuracy is None:
        return "-"
    return f"{accuracy.share:.1%} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"
