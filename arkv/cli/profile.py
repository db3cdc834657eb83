"""`arkv profile`."""

from __future__ import annotations

import arkv
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.cli.tables import print_table
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption
from arkv.options import FilePath, Positive, Seed, option, options


@options
class ProfileOptions(GuidanceOption, ModelOptions, CompileOption, DeviceOptions, QuietOption):
    """Options of `arkv profile`."""

    SECTION = "What to measure, and where to"

    prompts: Positive = option(
        default=32, metavar="N", help="of the model's example prompts, one picture each"
    )
    out: FilePath = option(metavar="FILE", help="JSON file to write")
    map: FilePath | None = option(
        default=None, metavar="FILE", help="also draw the shares by layer and head, as a PNG file"
    )
    window: Positive | None = option(
        default=None,
        metavar="TOKENS",
        help="what table and map are of; the file serves every window (default: SSD's, 8/3 lines)",
    )
    seed: Seed = option(default=0, metavar="N", help="of prompts and pictures")
    batch_size: Positive | None = option(
        default=None, metavar="N", help="pictures drawn at a time (default: all)"
    )


def run(given: ProfileOptions, typed: str) -> None:
    """Measure."""
    check_outputs(out=given.out, map=given.map)
    check_figure(given.map, ".png")
    from arkv.head_profile import usual_window
    from arkv.pictures.files import png, write_whole
    from arkv.study.profile import draw_map, measure

    model = given.load_model()
    window = usual_window(model.spec.grid) if given.window is None else given.window
    measured = measure(
        model,
        model.example_prompts(given.prompts, given.seed),
        seeds=range(given.seed, given.seed + given.prompts),
        guidance=given.guidance,
        batch_size=given.batch_size,
        compile=given.compile,
        progress=not given.quiet,
    )
    files = {given.out: measured.to_json().encode()}
    if given.map is not None:
        files[given.map] = png(draw_map(measured, window), {"Software": f"arkv {arkv.__version__}"})
    write_whole(files)
    rows = [
        (layer, *(f"{share:.1%}" for share in (min(shares), sum(shares) / len(shares), max(shares))))
        for layer, shares in enumerate(measured.left_out(window))
    ]
    header = ("layer", "least", "mean of heads", "most")
    print_table(header, rows, right=range(len(header)))
    print(f"{given.out}: attention more than {window} tokens back, {measured.prompts} pictures")


COMMAND = Command(
    ProfileOptions, run, ("arkv profile --model scenes --prompts 32 --out heads.json --map heads.png",)
)
