"""`arkv eval`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import arkv
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.cli.tables import print_table
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption, KvDtypeOption
from arkv.options import Count, FilePath, Policies, Positive, Ratios, Seed, option, options

if TYPE_CHECKING:
    from arkv.study.evaluation import Accuracy, Evaluation


@options
class EvalOptions(GuidanceOption, ModelOptions, CompileOption, DeviceOptions, KvDtypeOption, QuietOption):
    """Options of `arkv eval`."""

    SECTION = "What to score, and where to"

    policies: Policies = option(
        default=("full", "linear", "streaming"), metavar="NAME,NAME", help="comma list"
    )
    ratios: Ratios = option(
        default=("1", "1/2", "1/6"), metavar="R,R", help="comma list, for the policies that have a ratio"
    )
    prompts: Positive = option(
        default=200, metavar="N", help="of the model's example prompts, one picture each"
    )
    forced_prompts: Count = option(
        default=8, metavar="N", help="the first of them, compared with the full cache step by step; 0: none"
    )
    out: FilePath = option(
        metavar="FILE",
        help="JSON lines, a policy a line as it is done; if the file is there, what it has is not run again",
    )
    plot: FilePath | None = option(
        default=None, metavar="FILE", help="also draw accuracy and lost attention, as a PNG file"
    )
    seed: Seed = option(default=0, metavar="N", help="of prompts and pictures")
    batch_size: Positive = option(default=40, metavar="N", help="pictures decoded at a time")


def run(given: EvalOptions, typed: str) -> None:
    """Score."""
    check_outputs(out=given.out, plot=given.plot)
    check_figure(given.plot, ".png")
    from arkv.pictures.files import png, write_whole
    from arkv.study.comparison import compare_policies
    from arkv.study.evaluation import Settings

    model = given.load_model()
    settings = Settings(
        prompts=given.prompts,
        forced_prompts=given.forced_prompts,
        batch_size=given.batch_size,
        guidance=model.spec.guidance if given.guidance is None else given.guidance,
        seed=given.seed,
        compile=given.compile,
        kv_dtype=given.kv_dtype,
    )
    found = compare_policies(
        model,
        given.policies,
        ratios=list(map(str, given.ratios)),
        settings=settings,
        out=given.out,
        shared={"loading": given.described()},
        facts={"command": typed},
        progress=not given.quiet,
        tell=None if given.quiet else lambda line: print(line, file=sys.stderr),
    )
    rows, shared = list(found.rows.values()), found.run
    title = (
        f"{shared['model']}, {settings.prompts} prompts, guidance {settings.guidance:g}, "
        f"{shared['dtype']}, {shared['device']}"
    )
    print(title)
    _print_evaluations(rows)
    if given.plot is not None:
        from arkv.study.evaluation_figure import draw_comparison

        software = {"Software": f"arkv {arkv.__version__}"}
        write_whole({given.plot: png(draw_comparison(rows, title), software)})
    print(" and ".join(str(path) for path in (given.out, given.plot) if path is not None))


def _print_evaluations(rows: Sequence[Evaluation]) -> None:
    """Tables of what was measured; a score that there is none of is a dash."""
    from arkv.estimate import format_bytes

    def told(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    def right(accuracy: Accuracy | None) -> str:
        if accuracy is None:
            return "-"
        return f"{accuracy.share:.1%} [{100 * accuracy.low:.1f}, {100 * accuracy.high:.1f}]"

    done = [row for row in rows if row.error is None]
    header = ("policy", "right [95%]", "attention lost", "KL, nats", "top-1", "tokens/s", "KV", "of full")
    lines = [
        (
            row.policy,
            right(row.accuracy),
            told(row.attention_lost, ".2%"),
            told(row.kl, ".4f"),
            told(row.top1_agreement, ".1%"),
            told(row.tokens_per_second, ",.0f"),
            format_bytes(row.kv_bytes or 0),
            f"{(row.kv_bytes or 0) / (row.full_kv_bytes or 1):.0%}",
        )
        for row in done
    ]
    if done:
        print_table(header, lines, right=range(1, len(header)))
    groups = list(dict.fromkeys(group for row in done for group in row.groups))
    if groups:
        lines_of_groups = [(row.policy, *(right(row.groups.get(group)) for group in groups)) for row in done]
        print()
        print_table(("right [95%]", *groups), lines_of_groups, right=range(1, len(groups) + 1))
    for row in rows:
        if row.error is not None:
            print(f"\n{row.policy} cannot be: {row.error}")


COMMAND = Command(
    EvalOptions,
    run,
    (
        "arkv eval --policies full,linear,streaming --ratios 1,1/2,1/6 --prompts 200 --out results.jsonl",
        "arkv eval --policies full,linear:anchors=24 --ratios 1/4,1/8 --out results.jsonl --plot results.png",
    ),
)
