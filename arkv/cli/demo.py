"""`arkv demo`."""

from __future__ import annotations

import sys
from pathlib import Path

import arkv
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_outputs
from arkv.cli.parser import Command
from arkv.cli.tables import print_table
from arkv.errors import ArkvError
from arkv.jobs.loading import DeviceOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption
from arkv.options import Count, FilePath, Seed, option, options


@options
class DemoOptions(GuidanceOption, CompileOption, DeviceOptions, QuietOption):
    """Options of `arkv demo`."""

    SECTION = "What to draw, and where to"

    out: FilePath = option(default=Path("demo.png"), metavar="FILE", help="PNG file")
    seed: Seed = option(default=0, metavar="N", help="of the first picture")
    judged: Count = option(default=24, metavar="N", help="further prompts that are judged and not shown")


def run(given: DemoOptions, typed: str) -> None:
    """Draw the demo."""
    out = given.out
    if out.suffix != ".png":
        raise ArkvError(f"cannot write {out}: expected a name that ends in .png")
    check_outputs(out=out)
    from arkv.estimate import format_bytes
    from arkv.pictures.files import png, write_whole
    from arkv.registry import load_model
    from arkv.study import demo

    model = load_model(demo.MODEL, dtype=given.dtype, device=given.device)
    prompts = demo.demo_prompts(model, given.judged)
    trials = []
    for contender in demo.CONTENDERS:
        if not given.quiet:
            print(f"{contender.title}: {len(prompts)} pictures", file=sys.stderr)
        trial = demo.run_trial(
            model,
            contender,
            prompts,
            seed=given.seed,
            guidance=given.guidance,
            compile=given.compile,
            progress=not given.quiet,
        )
        trials.append(trial)
    write_whole({out: png(demo.draw_sheet(trials), {"Software": f"arkv {arkv.__version__}"})})
    shown = len(demo.PROMPTS)
    rows = [
        (
            trial.contender.title,
            f"{trial.stats.tokens_per_second:,.0f}",
            f"{trial.stats.tokens_per_second / trials[0].stats.tokens_per_second:.1f}x",
            format_bytes(trial.kv_bytes),
            f"{trial.share:.0%}",
            trial.score(shown),
            trial.score(),
        )
        for trial in trials
    ]
    header = ("policy", "tokens/s", "speed", "KV a picture", "share", "right, shown", "right, all")
    print_table(header, rows, right=range(1, len(header)))
    windowed = demo.run_windowed(model, seed=given.seed, guidance=given.guidance)
    alone, several = windowed.alone, windowed.several
    print(
        f"one picture: {alone.passes} passes in {alone.seconds:.1f} s; with a window of {demo.WINDOW} tokens "
        f"{several.passes} passes in {several.seconds:.1f} s, "
        f"{'token for token the same' if windowed.same else 'with other tokens, by rounding'}"
    )
    print(f"{out}: the {shown} shown pictures of each, {len(prompts)} judged")


COMMAND = Command(DemoOptions, run, ("arkv demo --out demo.png",))
