"""`arkv generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_sheet, check_writable, is_dir
from arkv.cli.parser import Command
from arkv.cli.summary import print_summary, write_sheet
from arkv.errors import ArkvError
from arkv.jobs.list_options import ListOptions
from arkv.jobs.recipe import Recipe, part_of
from arkv.options import FilePath, OptionError, Positive, Seed, Text, option, options
from arkv.pictures.files import png, write_whole
from arkv.pictures.prompts import single_spaced


@options
class GenerateOptions(ListOptions, Recipe, QuietOption):
    """Options of `arkv generate`."""

    SECTION = "What to draw, and where to"

    prompts: tuple[Text, ...] = option(
        default=(), metavar="TEXT", kind="repeated", name="--prompt", help="what to draw; repeatable"
    )
    prompts_file: FilePath | None = option(
        default=None,
        metavar="FILE",
        help="draw all of GenEval's .jsonl, DPG-Bench's folder, COCO captions as .csv, PartiPrompts as .tsv, "
        "or a .txt of prompts or classes; the same command goes on where it was stopped",
    )
    out: FilePath = option(
        metavar="PATH",
        help="a name that ends in .png: the picture, or a contact sheet of several; any other: a folder for "
        "one PNG a prompt, 0000.png and so on; with --prompts-file: a folder",
    )
    sheet: FilePath | None = option(
        default=None, metavar="FILE", help="with --prompts-file, also a contact sheet of its first pictures"
    )
    seed: Seed = option(
        default=0,
        metavar="N",
        help="picture i is drawn from seed + i; with --prompts-file, from a number made of both",
    )
    batch_size: Positive | Literal["auto"] | None = option(
        default=None,
        help="pictures decoded at a time, or auto for as many as there is free memory for (default: all; "
        "with --prompts-file: 16)",
    )

    def __post_init__(self) -> None:
        if self.prompts and self.prompts_file is not None:
            raise OptionError("--prompts-file is not allowed with --prompt: give one of them")
        if not self.prompts and self.prompts_file is None:
            raise OptionError("what is to be drawn? give --prompt TEXT or --prompts-file FILE")


def run(given: GenerateOptions, typed: str) -> int | None:
    """Draw."""
    recipe = part_of(Recipe, given)
    recipe.load_policy()  # what is misspelt shows first
    if given.prompts_file is not None:
        return _generate_file(given, recipe, typed)
    for name in ("samples", "layout", "npz_side", "sheet"):
        if getattr(given, name) is not None:
            flag = name.replace("_", "-")
            raise ArkvError(f"--{flag} is for the prompts of a file: give --prompts-file, or leave it out")
    prompts = list(map(single_spaced, given.prompts))
    if "" in prompts:
        raise ArkvError("a prompt is empty: say what to draw, as in --prompt 'three red circles'")
    out = given.out
    is_folder = is_dir(out)
    as_file = out.suffix == ".png" and not is_folder
    if not as_file and out.suffix and not is_folder:
        raise ArkvError(f"cannot write {out}: expected a name that ends in .png, or a folder")
    check_writable(out if as_file else out / "0000.png")
    decoder = recipe.load_decoder()
    seeds = range(given.seed, given.seed + len(prompts))
    result = decoder.generate(
        prompts,
        seeds=seeds,
        batch_size=given.batch_size,
        window=given.window,
        progress=not given.quiet,
        **recipe.sampling(decoder.model),
    )
    common = recipe.texts(decoder.model)
    if as_file and len(prompts) > 1:
        from arkv.pictures.sheet import Cell, contact_sheet, in_rows

        sheet = contact_sheet(in_rows([Cell(i, p) for i, p in zip(result.images, prompts, strict=True)]))
        text = {"prompt": json.dumps(prompts), "seed": json.dumps(list(seeds))}
        files = {out: png(sheet, text | common)}
    else:
        names = [out] if as_file else [out / f"{index:04d}.png" for index in range(len(prompts))]
        files = {
            name: png(image, {"prompt": prompt, "seed": str(seed)} | common)
            for name, image, prompt, seed in zip(names, result.images, prompts, seeds, strict=True)
        }
    write_whole(files)
    print(f"{out}: {result.stats}")
    return None


def _generate_file(given: GenerateOptions, recipe: Recipe, typed: str) -> int:
    """Draw every prompt of a file, as far as it is not drawn yet."""
    out: Path = given.out
    if out.suffix in (".png", ".npz") and not is_dir(out):
        raise ArkvError(f"cannot write {out}: expected a folder for the pictures of a file")
    check_sheet(given.sheet, out)
    from arkv.bulk import Description, run
    from arkv.bulk.description import BATCH_SIZE

    description = Description(
        prompts=str(given.prompts_file),
        out=str(out),
        recipe=recipe,
        samples=given.samples,
        layout=given.layout,
        npz_side=given.npz_side,
        seed=given.seed,
        batch_size=given.batch_size or BATCH_SIZE,
    )
    summary = run(
        description,
        resume=True,
        strict=True,
        log=False,
        facts={"command": typed},
        progress=not given.quiet,
    )
    print(f"{out}: {summary.stats or summary}")
    write_sheet(out, given.sheet)
    return print_summary(summary, out)


COMMAND = Command(
    GenerateOptions,
    run,
    (
        "arkv generate --policy linear --ratio 1/6 --prompt 'three red circles' --out picture.png",
        "arkv generate --policy linear:anchors=24,recent=48 --ratio 1/4 \\\n"
        "      --prompt 'three red circles' --prompt 'a blue square above a cyan circle' --out pictures",
        "arkv generate --policy linear --ratio 1/6 --prompts-file prompts.txt --samples 4 --out pictures",
    ),
)
