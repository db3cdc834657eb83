"""`arkv profile`."""

from __future__ import annotations

import arkv
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.cli.tables import print_table
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption
from arkv.options import Count, FilePath, Positive, Seed, option, options


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
    radius: Count = option(
        default=2, metavar="CELLS", help="cells that a neighbourhood reaches upwards and to either side"
    )
    seed: Seed = option(default=0, metavar="N", help="of prompts and pictures")
    batch_size: Positive | None = option(
        default=None, metavar="N", help="pictures drawn at a time (default: all)"
    )


def run(given: ProfileOptions, typed: str) -> None:
    """Measure."""
    check_outputs(out=given.out, map=given.map)
    check_figure(given.map, ".png")
    from arkv.pictures.files import png, write_whole
    from arkv.study.profile import draw_map, measure

    model = given.load_model()
    measured = measure(
        model,
        model.example_prompts(given.prompts, given.seed),
        seeds=range(given.seed, given.seed + given.prompts),
        radius=given.radius,
        guidance=given.guidance,
        batch_size=given.batch_size,
        compile=given.compile,
        progress=not given.quiet,
    )
    files = {given.out: measured.to_json().encode()}
    if given.map is not None:
        files[given.map] = png(draw_map(measured), {"Software": f"arkv {arkv.__version__}"})
    write_whole(files)
    rows = [
        (layer, *(f"{share:.1%}" for share in (min(shares), sum(shares) / len(shares), max(shares))))
        for layer, shares in enumerate(measured.outside)
    ]
    header = ("layer", "least", "mean of heads", "most")
    print_table(header, rows, right=range(len(header)))
    print(f"{given.out}: attention beyond {measured.radius} cells, {measured.prompts} pictures")


COMMAND = Command(
    ProfileOptions, run, ("arkv profile --model scenes --prompts 32 --out heads.json --map heads.png",)
)
