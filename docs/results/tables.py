"""The tables of the results pages, in Markdown, from the JSON lines beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from statistics import median

from front import LINEAR_BESIDE, TWENTY_FOURTH, WITHOUT

from arkv.estimate import format_bytes
from arkv.jobs.journal import read_journal
from arkv.speed.measurement import Line, Measurement, from_dict, speedups
from arkv.study.evaluation import Accuracy, Evaluation
from arkv.study.labels import unlabelled
from arkv.study.pairs import Pair, pair

HERE = Path(__file__).parent
CLOSELY = "1/6"
"""The ratio that groups of prompts are shown for."""
CALLED = {
    "full": "full cache",
    "linear": "LineAR",
    "ssd": "SSD",
    "headkv": "HeadKV",
    "adakv": "Ada-KV",
    "transformers-dynamic": "transformers, `DynamicCache`",
    "transformers-static": "transformers, `StaticCache`, compiled",
}
"""What the page on speed calls a policy."""


@cache
def evaluated(name: str) -> Mapping[str, Evaluation]:
    """Rows of `arkv eval` by policy."""
    _, rows, _ = read_journal(HERE / f"{name}.jsonl")
    return {policy: Evaluation.from_dict(row) for policy, row in rows.items()}


@cache
def timed(name: str) -> Sequence[Measurement]:
    """Rows of `arkv bench`, those left out that could not be measured."""
    _, rows, _ = read_journal(HERE / f"{name}.jsonl", "case")
    return [row for row in map(from_dict, rows.values()) if isinstance(row, Measurement)]


def by_policy(name: str) -> dict[str, dict[str, Evaluation]]:
    """Rows by policy, the best first, and by ratio; those without a ratio left out."""
    found: dict[str, dict[str, Evaluation]] = {}
    for row in evaluated(name).values():
        if row.asked_ratio is not None:
            found.setdefault(row.name, {})[row.asked_ratio] = row
    return dict(sorted(found.items(), key=lambda item: -share(item[1].get(CLOSELY))))


def ratios_of(name: str) -> list[str]:
    """The ratios of a file, the greatest first."""
    ratios = {row.asked_ratio for row in evaluated(name).values() if row.asked_ratio is not None}
    return sorted(ratios, key=Fraction, reverse=True)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown."""
    head = list(head)
    lines = [head, *map(list, rows)]
    text = ["|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(head), *text[1:]]) + "\n"


def of_ratios(name: str, cell: Callable[[Evaluation], str], full: str) -> str:
    """A policy a line, a ratio a column."""
    ratios = ratios_of(name)
    rows = [
        [f"`{policy}`", *(cell(cells[ratio]) if ratio in cells else "" for ratio in ratios)]
        for policy, cells in by_policy(name).items()
    ]
    return table(["policy", *ratios], [["`full`, all tokens", full, *[""] * (len(ratios) - 1)], *rows])


def right_by_ratio(name: str) -> str:
    """Shares of pictures that are right, with their intervals."""
    return of_ratios(name, lambda row: right(row.accuracy), right(evaluated(name)["full"].accuracy))


def lost_by_ratio(name: str) -> str:
    """Attention lost, and divergence."""

    def cell(row: Evaluation) -> str:
        return "" if row.attention_lost is None else f"{row.attention_lost:.1%}, {row.kl:.1g}"

    return of_ratios(name, cell, "0, 0")


def groups_closely(name: str) -> str:
    """Groups of prompts, the likeliest token, and bytes, at one ratio."""
    full = evaluated(name)["full"]
    rows = {"full": full} | {policy: cells[CLOSELY] for policy, cells in by_policy(name).items()}
    return table(
        ["policy", *(group.replace("_", " ") for group in full.groups), "top 1", "KV"],
        [
            [
                f"`{policy}`",
                *(f"{group.share:.0%}" for group in row.groups.values()),
                f"{row.top1_agreement:.1%}",
                f"{(row.kv_bytes or 0) / 1e6:.0f} MB",
            ]
            for policy, row in rows.items()
        ],
    )


def ssd_at_its_ratio(name: str) -> str:
    """SSD beside others and its own variants, prompt by prompt."""
    rows = evaluated(name)
    ssd = next(row for row in rows.values() if row.name == "ssd")
    return table(
        ["policy", "right", "less `ssd`"],
        [
            [f"`{row.name}`", right(row.accuracy), "" if row is ssd else points(pair(ssd, row))]
            for row in sorted(rows.values(), key=lambda row: -share(row))
        ],
    )


def choices_of_linear(name: str) -> str:
    """LineAR by what its paper leaves open."""
    rows = [row for row in evaluated(name).values() if row.name.startswith("linear:")]
    cells = {(*choice_of(row), row.asked_ratio): row for row in rows}
    scores = list(dict.fromkeys((scoring, ratio) for _, _, scoring, ratio in cells))
    lines = dict.fromkeys((anchors, recent) for anchors, recent, _, _ in cells)

    def cell(*choice: str | None) -> str:
        row = cells.get(choice)  # type: ignore[call-overload]
        return "" if row is None else right(row.accuracy)

    return table(
        ["anchors", "recent", *(f"{scoring}, {ratio}" for scoring, ratio in scores)],
        [[a, r, *(cell(a, r, scoring, ratio) for scoring, ratio in scores)] for a, r in lines],
    )


def at_equal_bytes(name: str) -> str:
    """Policies by the bytes that they take, beside LineAR and the full cache prompt by prompt."""
    rows = evaluated(name)
    full = rows["full"]
    beside = {f"{policy}@int4": rows[f"{linear}@int4"] for policy, linear in LINEAR_BESIDE.items()}

    def less(row: Evaluation, other: Evaluation | None) -> str:
        return "" if other is None or other is row else points(pair(other, row))

    def lost_and_won(row: Evaluation) -> str:
        return "" if row is full else f"{pair(full, row).first_only}, {pair(full, row).second_only}"

    return table(
        [
            *("policy", "of the full cache's bytes", "right", "less the full cache", "prompts lost, won"),
            *("less LineAR", "attention lost, KL"),
        ],
        [
            [
                called_in_full(row),
                f"{row.share_of_bytes or 0:.1%}",
                right(row.accuracy),
                less(row, full),
                lost_and_won(row),
                less(row, beside.get(row.policy)),
                "" if row.attention_lost is None else f"{row.attention_lost:.1%}, {row.kl:.1g}",
            ]
            for row in sorted(rows.values(), key=lambda row: row.share_of_bytes or 0)
            if row.policy not in [f"{policy}@int4" for policy in WITHOUT.values()]
        ],
    )


def parts_of_front(name: str) -> str:
    """What is lost without each part of `front`, in as many slots, prompt by prompt."""
    rows = evaluated(name)
    whole = rows[f"{TWENTY_FOURTH}@int4"]
    found = {part: rows.get(f"{policy}@int4") for part, policy in WITHOUT.items()}
    return table(
        ["without", "", "right", "less the whole"],
        [
            ["nothing", called_in_full(whole), right(whole.accuracy), ""],
            *(
                [part, called_in_full(row), right(row.accuracy), points(pair(whole, row))]
                for part, row in found.items()
                if row is not None
            ),
        ],
    )


def called_in_full(row: Evaluation) -> str:
    """A policy and how its keys and values are stored."""
    policy, kv_dtype = unlabelled(row.policy)
    return f"`{policy}`, {kv_dtype or 'bfloat16'}"


def points(two: Pair) -> str:
    """How much more often the second is right, in points, with the interval."""
    return f"{100 * two.difference:+.1f} [{100 * two.low:+.1f}, {100 * two.high:+.1f}]"


def choice_of(row: Evaluation) -> tuple[str, str, str]:
    """Anchors, recent tokens and score of a row."""
    given = dict(part.split("=") for part in row.name.partition(":")[2].split(","))
    return given["anchors"], given["recent"], given["scoring"]


def beside_transformers(name: str) -> str:
    """Speed beside another library's."""
    rows = sorted(timed(name), key=lambda row: row.tokens_per_second)
    best = rows[-1]
    first = best.by_line[0].line + 1
    others = ", ".join(str(line.line + 1) for line in best.by_line[1:])
    return table(
        ["", "tokens/s", f"ms a step, line {first}, {others}", "LineAR is faster by", "KV", "peak"],
        [
            [
                called(row),
                number(row.tokens_per_second),
                of_lines(row, lambda line: line.milliseconds),
                "" if row is best else f"{best.tokens_per_second / row.tokens_per_second:.3g}",
                *sizes(row),
            ]
            for row in rows
        ],
    )


def few_pictures(name: str) -> str:
    """One picture and four."""
    rows = sorted(timed(name), key=lambda row: (row.batch_size, row.tokens_per_second))
    head = ["pictures", "", "tokens/s", "ms a step, median and 95%", "share of the roofline", "KV", "peak"]
    return table(
        head,
        [
            [
                str(row.batch_size),
                called(row),
                f"{row.tokens_per_second:#.3g}",
                f"{row.milliseconds_per_step:.0f}, {row.milliseconds_per_step_p95:.0f}",
                f"{row.roofline_share:.0%}",
                *sizes(row),
            ]
            for row in rows
        ],
    )


def one_picture(name: str) -> str:
    """Seconds of one picture, and how much faster than transformers' loop: ratios of the same round."""
    run, by_contender, _ = read_journal(HERE / f"{name}.jsonl", "contender")
    tokens, rows = run["tokens"], list(by_contender.values())
    others = rows[0]["seconds"]

    def faster(seconds: list[float]) -> str:
        return number(median(other / own for other, own in zip(others, seconds, strict=True)))

    return table(
        ["", "s a picture", "tokens/s", "times as fast"],
        [
            [
                row["contender"],
                f"{median(row['seconds']):.2f} ({min(row['seconds']):.2f} to {max(row['seconds']):.2f})",
                number(tokens / median(row["seconds"])),
                "" if row is rows[0] else faster(row["seconds"]),
            ]
            for row in rows
        ],
    )


def at_equal_memory(name: str) -> str:
    """The largest batches."""
    head = ["memory", "", "pictures at a time", "pictures a minute", "ms a step", "peak"]
    return table(
        head,
        [
            [
                format_bytes(row.memory or 0),
                called(row),
                str(row.batch_size),
                f"{60 * (row.pictures_per_second or 0):.1f}",
                f"{row.milliseconds_per_step:,.0f}",
                format_bytes(row.peak_bytes or 0),
            ]
            for row in timed(name)
        ],
    )


def growth(name: str) -> str:
    """What a step takes against what heads hold."""
    rows = timed(name)
    return table(
        ["ratio", *(row.policy.partition("ratio=")[2] for row in rows)],
        [
            ["KV", *(format_bytes(row.kv_bytes) for row in rows)],
            ["ms a step, median", *(f"{row.milliseconds_per_step:.0f}" for row in rows)],
            ["95%", *(f"{row.milliseconds_per_step_p95:.0f}" for row in rows)],
        ],
    )


def of_a_large_grid(name: str) -> str:
    """Time and slots by line."""
    lines = ", ".join(str(line.line + 1) for line in timed(name)[0].by_line)
    head = ["", f"ms a step, line {lines}", "slots of a head then", "share of the roofline", "KV", "peak"]
    return table(
        head,
        [
            [
                called(row),
                of_lines(row, lambda line: line.milliseconds),
                of_lines(row, lambda line: line.slots),
                f"{row.roofline_share:.0%}",
                *sizes(row),
            ]
            for row in timed(name)
        ],
    )


def unequal_heads(name: str) -> str:
    """Policies whose heads are of different sizes."""
    rows = timed(name)
    return table(
        ["", "tokens/s", "of the full cache's", "ms a step", "KV"],
        [
            [
                called(row).partition(",")[0],
                f"{row.tokens_per_second:,.0f}",
                f"{faster:.2f}",
                f"{row.milliseconds_per_step:.2f}",
                format_bytes(row.kv_bytes),
            ]
            for row, faster in zip(rows, speedups(rows), strict=True)
        ],
    )


def called(row: Measurement) -> str:
    """A policy in words, with its ratio."""
    name, _, ratio = row.policy.partition(":ratio=")
    return ", ".join(filter(None, (CALLED[name], ratio)))


def of_lines(row: Measurement, what: Callable[[Line], float]) -> str:
    """A number a line of the picture."""
    return ", ".join(f"{what(line):,.0f}" for line in row.by_line)


def sizes(row: Measurement) -> tuple[str, str]:
    """Bytes of keys and values, and the most in all."""
    return format_bytes(row.kv_bytes), format_bytes(row.peak_bytes or 0)


def number(value: float) -> str:
    """Three digits, and all of them before the point."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:#.3g}".rstrip(".")


def share(row: Evaluation | None) -> float:
    """The share of pictures that are right; less than any of them if there is none."""
    return -1.0 if row is None or row.accuracy is None else row.accuracy.share


def right(accuracy: Accuracy | None) -> str:
    """A share and its interval in percent."""
    if accuracy is None:
        return "refused"
    # The space is one that does not break: in a narrow cell an interval stays in one piece.
    return f"{accuracy.share:.1%} [{100 * accuracy.low:.0f},\N{NO-BREAK SPACE}{100 * accuracy.high:.0f}]"
