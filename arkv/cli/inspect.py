"""`arkv inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import arkv
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import GuidanceOption, PolicyOptions, policy_text
from arkv.options import FilePath, Indices, Seed, Text, option, options


@options
class InspectOptions(PolicyOptions, GuidanceOption, ModelOptions, DeviceOptions, QuietOption):
    """Options of `arkv inspect`."""

    SECTION = "What to draw, and where to"

    prompt: Text = option(metavar="TEXT", help="what to draw")
    lines: Indices | None = option(
        default=None, metavar="N,N", help="comma list, from 0 (default: after each third of the picture)"
    )
    layers: Indices | None = option(
        default=None, metavar="N,N", help="comma list, from 0 (default: the first, the middle and the last)"
    )
    heads: Indices | None = option(
        default=None, metavar="N,N", help="comma list of key heads, from 0 (default: four)"
    )
    out: FilePath = option(default=Path("inspect.png"), metavar="FILE", help="PNG file")
    animation: FilePath | None = option(
        default=None, metavar="FILE", help="also write a GIF file with a frame a line"
    )
    unconditional: bool = option(
        default=False, help="show the unconditional row instead of the conditional one"
    )
    seed: Seed = option(default=0, metavar="N", help="of the picture")


def run(given: InspectOptions, typed: str) -> None:
    """Draw the cache."""
    policy = given.load_policy()
    check_outputs(out=given.out, animation=given.animation)
    check_figure(given.out, ".png")
    check_figure(given.animation, ".gif")
    from arkv.pictures.files import png, write_whole
    from arkv.study.inspection import choose, record
    from arkv.study.inspection_figure import animate, draw_sheet

    model = given.load_model()
    spec, rows = model.spec, model.spec.grid.rows
    lines = choose("line", given.lines, rows, [rows // 3, 2 * rows // 3, rows - 1])
    layers = choose("layer", given.layers, spec.layers, [0, spec.layers // 2, spec.layers - 1])
    heads = choose("key head", given.heads, spec.kv_heads, range(min(4, spec.kv_heads)))
    recording = record(
        model,
        policy,
        given.prompt,
        seed=given.seed,
        guidance=given.guidance,
        unconditional=given.unconditional,
        progress=not given.quiet,
    )
    text = policy_text(given.policy, policy)
    row = "unconditional" if given.unconditional else "conditional"
    ratio = "" if given.ratio is None else f"ratio={given.ratio}"
    title = f"What the cache holds: {':'.join(filter(None, (given.policy, ratio)))}"
    note = f"{given.model}, {json.dumps(given.prompt)}, seed {given.seed}, {row} row"
    sheet = draw_sheet(recording, lines, layers, heads, title, note)
    software = {"Software": f"arkv {arkv.__version__}"}
    files = {given.out: png(sheet, software | {"policy": text, "prompt": given.prompt})}
    if given.animation is not None:
        shown = not given.quiet
        files[given.animation] = animate(recording, layers, heads, title, note, progress=shown)
    write_whole(files)
    resident = recording.residents[-1].sum(-1)
    print(
        f"{' and '.join(map(str, files))}: at the end {int(resident.min())} to {int(resident.max())} of "
        f"{spec.grid.tokens} visual tokens resident in a head"
    )


COMMAND = Command(
    InspectOptions,
    run,
    (
        "arkv inspect --policy linear:ratio=1/6 --prompt 'three red circles' --out inspect.png",
        "arkv inspect --policy window:ratio=1/6 --prompt 'three red circles' --lines 8,16,23 \\\n"
        "      --layers 0,3,5 --heads 0,1 --animation inspect.gif",
    ),
)
