"""`arkv eval`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Literal

import arkv
from arkv.cli.eval_tables import Order, print_evaluations, print_pairs
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption, KvDtype, KvDtypeOption
from arkv.options import (
    AtLeastOne,
    CommaList,
    Count,
    FilePath,
    OptionError,
    Policies,
    Positive,
    Ratios,
    Says,
    Seed,
    option,
    options,
)

if TYPE_CHECKING:
    from arkv.study.evaluation_figure import Against

KvDtypes = Annotated[
    tuple[Literal["own"] | KvDtype, ...],
    AtLeastOne,
    CommaList,
    Says("own, int8, fp8 or int4, as in own,int8"),
]


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
    kv_dtypes: KvDtypes | None = option(
        default=None,
        metavar="TYPE,TYPE",
        help="comma list instead of --kv-dtype: every policy with each of them; own is as the weights",
    )
    prompts: Positive | None = option(
        default=None,
        metavar="N",
        help="a picture each (default: 200 of the model's example prompts, or all of --prompts-file)",
    )
    prompts_file: FilePath | None = option(
        default=None, metavar="FILE", help="draw the prompts of a file, as 'arkv generate' reads it"
    )
    forced_prompts: Count = option(
        default=8, metavar="N", help="the first of them, compared with the full cache step by step; 0: none"
    )
    out: FilePath = option(
        metavar="FILE",
        help="JSON lines, a policy a line as it is done; if the file is there, what it has is not run again",
    )
    pictures: FilePath | None = option(
        default=None, metavar="DIR", help="also keep the pictures, a folder a policy, named by their seeds"
    )
    plot: FilePath | None = option(
        default=None, metavar="FILE", help="also draw accuracy and lost attention, as a PNG file"
    )
    by: Order = option(
        default="policy",
        help="how the table is ordered: as asked for, by ratio and then by accuracy, or by bytes, which the "
        "plot then has for its axis",
    )
    pairs: tuple[Policies, ...] = option(
        default=(),
        metavar="NAME,NAME",
        kind="repeated",
        name="--pair",
        help="also set two policies side by side, prompt by prompt",
    )
    seed: Seed = option(default=0, metavar="N", help="of prompts and pictures")
    batch_size: Positive = option(default=40, metavar="N", help="pictures decoded at a time")

    def __post_init__(self) -> None:
        if self.kv_dtype is not None and self.kv_dtypes is not None:
            raise OptionError("--kv-dtypes is not allowed with --kv-dtype: give one of them")
        for names in self.pairs:
            if len(names) != 2:
                raise OptionError(f"--pair is {','.join(names)}: expected two policies, as in linear,snapkv")


def run(given: EvalOptions, typed: str) -> None:
    """Score."""
    check_outputs(out=given.out, plot=given.plot)
    check_figure(given.plot, ".png")
    from arkv.pictures.files import png, write_whole
    from arkv.pictures.prompts import read_prompts
    from arkv.study.comparison import compare_policies
    from arkv.study.evaluation import Settings

    prompts = None
    if given.prompts_file is not None:
        prompts = [each.prompt for each in read_prompts(given.prompts_file)[1]][: given.prompts]
    model = given.load_model()
    settings = Settings(
        prompts=(given.prompts or Settings.prompts) if prompts is None else len(prompts),
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
        kv_dtypes=[None if each == "own" else each for each in given.kv_dtypes or ("own",)],
        prompts=prompts,
        out=given.out,
        pictures_to=given.pictures,
        pairs=given.pairs,
        shared={"loading": given.described()},
        facts={"command": typed},
        progress=not given.quiet,
        tell=None if given.quiet else lambda line: print(line, file=sys.stderr),
    )
    shared = found.run
    title = (
        f"{shared['model']}, {settings.prompts} prompts, guidance {settings.guidance:g}, "
        f"{shared['dtype']}, {shared['device']}"
    )
    print(title)
    print_evaluations(found, given.by)
    if given.pairs:
        print_pairs([each for first, second in given.pairs for each in found.pairs(first, second)])
    if given.plot is not None:
        from arkv.study.evaluation_figure import draw_comparison

        software = {"Software": f"arkv {arkv.__version__}"}
        against: Against = "bytes" if given.by == "bytes" else "ratio"
        plot = draw_comparison(list(found.rows.values()), title, against)
        write_whole({given.plot: png(plot, software)})
    print(" and ".join(str(path) for path in (given.out, given.plot, given.pictures) if path is not None))


COMMAND = Command(
    EvalOptions,
    run,
    (
        "arkv eval --policies full,linear,streaming --ratios 1,1/2,1/6 --prompts 200 --out results.jsonl",
        "arkv eval --policies full,linear:anchors=24 --ratios 1/4,1/8 --out results.jsonl --plot results.png",
        "arkv eval --policies linear,snapkv --ratios 1/6,1/8 --kv-dtypes own,int8 --by bytes "
        "--pair linear,snapkv --out results.jsonl",
    ),
)
