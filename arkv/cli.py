"""The command `arkv`.

The only module that prints. Results go to the standard output, progress and errors to the standard error.
Nothing heavy is imported before a command needs it, so that `arkv --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arkv
from arkv.errors import ArkvError, CheckpointError, Terminated, is_out_of_memory
from arkv.jobs.loading import add_model, described, load
from arkv.jobs.recipe import policy_text, recipe_of
from arkv.pictures.files import png, write_whole

if TYPE_CHECKING:
    from arkv.bulk import Summary
    from arkv.jobs.recipe import Recipe
    from arkv.model import Model
    from arkv.speed.bench import Configuration
    from arkv.speed.measurement import Measurement, Refusal
    from arkv.study.evaluation import Accuracy, Evaluation

DTYPES = ("float32", "bfloat16", "float16")
COMPILE = ("none", "inductor", "cudagraphs")
KV_DTYPES = ("int8", "fp8")
DEFAULT_MODEL = "scenes"
FAILURES_TOLD = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the name of the program; None for those of the process.

    Returns:
        0, 1 after an error that was told in one line or if nobody reads the output any more, 130 after an
        interrupt, or 143 after SIGTERM to a run.

    Raises:
        SystemExit: after help or version (0), or if the arguments cannot be parsed (2).
    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            typed = sys.argv[1:] if argv is None else argv
            arguments.command = shlex.join(["arkv", *map(str, typed)])
            arguments.run(arguments)
        finally:
            _flush()
    except ArkvError as error:
        print(f"arkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("arkv: interrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("arkv: terminated", file=sys.stderr)
        return 143
    except BrokenPipeError:
        return 1
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        print("arkv: error: out of memory; take a smaller --batch-size or a smaller ratio", file=sys.stderr)
        return 1
    return 0


def _flush() -> None:
    """Write out what was printed while an error can still be told; the interpreter does it at its exit.

    Raises:
        BrokenPipeError: nobody reads it.
        ArkvError: it cannot be written.
    """
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        # What is left goes nowhere, or the exit would complain again.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())
            os.close(nowhere)
        if isinstance(error, BrokenPipeError):
            raise
        raise ArkvError(f"cannot write to the standard output: {error.strerror}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arkv",
        description="Autoregressive image generation with a small part of the KV cache.",
        epilog="example:\n  arkv demo --out demo.png\n\n'arkv COMMAND --help' shows the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"arkv {arkv.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, run: Any, help: str, *examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog="\n".join(
                ["example:" if len(examples) == 1 else "examples:", *(f"  {e}" for e in examples)]
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    generate = command(
        "generate",
        _generate,
        "draw pictures from prompts",
        "arkv generate --policy linear --ratio 1/6 --prompt 'three red circles' --out picture.png",
        "arkv generate --policy linear:anchors=24,recent=48 --ratio 1/4 \\\n"
        "      --prompt 'three red circles' --prompt 'a blue square above a cyan circle' --out pictures",
        "arkv generate --policy linear --ratio 1/6 --prompts-file prompts.txt --samples 4 --out pictures",
    )
    add_model(generate)
    _add_policy(generate)
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--prompt", action="append", dest="prompts", metavar="TEXT", help="what to draw; repeatable"
    )
    what.add_argument(
        "--prompts-file",
        type=_path,
        metavar="FILE",
        help="draw all of GenEval's .jsonl, DPG-Bench's folder, COCO captions as .csv, PartiPrompts as .tsv, "
        "or a .txt of prompts or classes; the same command goes on where it was stopped",
    )
    generate.add_argument(
        "--samples",
        type=_positive,
        metavar="N",
        help="pictures of every prompt of a file (default: 4 for GenEval and DPG-Bench, else 1)",
    )
    generate.add_argument(
        "--layout",
        choices=("geneval", "dpg", "flat", "npz", "webdataset", "parquet"),
        help="how the pictures of a file are laid out, for which evaluator (default: by the file, else flat)",
    )
    generate.add_argument(
        "--npz-side",
        type=_positive,
        metavar="PIXELS",
        help="side that the pictures in the archive of --layout npz are resized to (default: as drawn)",
    )
    generate.add_argument(
        "--out",
        required=True,
        type=_path,
        help="a name that ends in .png: the picture, or a contact sheet of several; any other: a folder for "
        "one PNG a prompt, 0000.png and so on; with --prompts-file: a folder",
    )
    generate.add_argument(
        "--seed",
        type=int,
        default=0,
        help="picture i is drawn from seed + i; with --prompts-file, from a number made of both (default: 0)",
    )
    _add_guidance(generate)
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)"
    )
    generate.add_argument(
        "--top-k", type=int, help="draw from this many likeliest tokens; 0 for all (default: the model's own)"
    )
    generate.add_argument("--top-p", type=float, help="draw from the smallest set of tokens this probable")
    generate.add_argument(
        "--guided-tokens",
        type=_count,
        metavar="N",
        help="guide the first N visual tokens only (default: the model's own, which is all for most)",
    )
    generate.add_argument(
        "--batch-size",
        type=_batch_size,
        help="pictures decoded at a time, or auto for as many as there is free memory for (default: all; "
        "with --prompts-file: 16)",
    )
    _add_compute(generate)
    _add_kv_dtype(generate)
    _add_quiet(generate)

    job = command(
        "run",
        _run,
        "draw the pictures of a job: a file of prompts, on one GPU, all of a machine, or a cluster",
        "arkv run job.yaml",
        "arkv run job.yaml --resume",
        "arkv run job.yaml --status",
        "arkv run job.yaml --engine torchrun --workers 8",
    )
    job.add_argument(
        "job", type=_path, metavar="FILE", help="YAML with the names of the flags of 'arkv generate'"
    )
    what = job.add_mutually_exclusive_group()
    what.add_argument(
        "--resume",
        action="store_true",
        help="go on with what is there, after comparing it with its hashes; else a folder that was begun is "
        "refused",
    )
    what.add_argument("--status", action="store_true", help="say how far it is, and draw nothing")
    job.add_argument(
        "--engine", choices=("in-process", "torchrun", "ray"), help="who draws (default: what the file says)"
    )
    job.add_argument(
        "--workers", type=_positive, metavar="N", help="processes (default: what the file says, or one a GPU)"
    )
    job.add_argument("--address", metavar="HOST:PORT", help="of a Ray cluster (default: Ray is started here)")
    _add_quiet(job)

    command("policies", _policies, "list the cache policies and their parameters", "arkv policies")
    command("models", _models, "list the models", "arkv models")

    estimate = command(
        "estimate",
        _estimate,
        "say how much memory a model, a policy and a batch will take, before any of it is allocated",
        "arkv estimate --model scenes --policy linear --ratio 1/6 --batch-size 16",
    )
    add_model(estimate, weights=False)
    _add_policy(estimate)
    estimate.add_argument("--batch-size", type=_positive, default=1, help="pictures at a time (default: 1)")
    _add_guidance(estimate)
    estimate.add_argument(
        "--condition", type=int, help="condition tokens of a row (default: the most a prompt can have)"
    )
    estimate.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, keys and values")
    _add_kv_dtype(estimate)

    bench = command(
        "bench",
        _bench,
        "measure speed and memory of policies on this machine",
        "arkv bench --model scenes --policies full,linear,streaming --ratios 1/6 --batch-sizes 1,16",
        "arkv bench --policies full,linear:recent=48 --ratios 1/6,1/3 --batch-sizes 16 --json bench.jsonl",
        "arkv bench --model janus-pro-1b --random-weights --dtype bfloat16 --batch-sizes 32 \\\n"
        "      --policies full,linear,transformers-dynamic --lines 0,12,23 --plot bench.png",
        "arkv bench --preset linear-table --random-weights --device cuda:0 --json table.jsonl",
    )
    add_model(bench)
    bench.add_argument(
        "--policies",
        default="full,linear,streaming",
        type=_split_policies,
        help="comma list; transformers-dynamic and transformers-static are transformers' own Janus with its "
        "DynamicCache, or with its StaticCache and compiled (default: %(default)s)",
    )
    bench.add_argument(
        "--ratios",
        default="1/6",
        type=_split,
        help="comma list, for the policies that have a ratio (default: %(default)s)",
    )
    sizes = bench.add_mutually_exclusive_group()
    sizes.add_argument("--batch-sizes", type=_sizes, help="comma list (default: 1,4,16)")
    sizes.add_argument(
        "--memory",
        type=_gigabytes,
        metavar="GB",
        help="comma list of gigabytes: the largest batch of each policy that is estimated to fit, weights "
        "included",
    )
    bench.add_argument(
        "--preset",
        choices=("linear-table", "ssd-table"),
        help="the rows of a paper's table of efficiency: models (all, or the one of --model), policies, "
        "ratios and, unless given, batch sizes",
    )
    bench.add_argument(
        "--profile", type=_path, metavar="FILE", help="from 'arkv profile', for SSD in a preset"
    )
    part = bench.add_mutually_exclusive_group()
    part.add_argument(
        "--tokens", type=_positive, metavar="N", help="decode only the first N visual tokens of a picture"
    )
    part.add_argument(
        "--lines",
        type=_indices,
        help="comma list, from 0: decode only these lines, with caches as large as they then are, and "
        "interpolate the others' time",
    )
    bench.add_argument("--repeats", type=_positive, default=3, help="rounds after the cold one (default: 3)")
    bench.add_argument("--seed", type=int, default=0, help="of prompts and pictures (default: 0)")
    _add_guidance(bench)
    _add_compute(bench)
    _add_kv_dtype(bench)
    bench.add_argument(
        "--json",
        type=_path,
        metavar="FILE",
        help="JSON lines, the first with the machine; if the file is there, what it has is not run again",
    )
    bench.add_argument(
        "--plot", type=_path, metavar="FILE", help="also draw speed and roofline, as a PNG file; one a model"
    )
    _add_quiet(bench)

    evaluation = command(
        "eval",
        _eval,
        "score the pictures of policies, and what they lose of the full cache's attention",
        "arkv eval --policies full,linear,streaming --ratios 1,1/2,1/6 --prompts 200 --out results.jsonl",
        "arkv eval --policies full,linear:anchors=24 --ratios 1/4,1/8 --out results.jsonl --plot results.png",
    )
    add_model(evaluation)
    evaluation.add_argument(
        "--policies",
        default="full,linear,streaming",
        type=_split_policies,
        help="comma list (default: %(default)s)",
    )
    evaluation.add_argument(
        "--ratios",
        default="1,1/2,1/6",
        type=_split,
        help="comma list, for the policies that have a ratio (default: %(default)s)",
    )
    evaluation.add_argument(
        "--prompts",
        type=_positive,
        default=200,
        metavar="N",
        help="of the model's example prompts, one picture each (default: %(default)s)",
    )
    evaluation.add_argument(
        "--forced-prompts",
        type=_count,
        default=8,
        metavar="N",
        help="the first of them, compared with the full cache step by step; 0: none (default: %(default)s)",
    )
    evaluation.add_argument(
        "--out",
        required=True,
        type=_path,
        metavar="FILE",
        help="JSON lines, a policy a line as it is done; if the file is there, what it has is not run again",
    )
    evaluation.add_argument(
        "--plot", type=_path, metavar="FILE", help="also draw accuracy and lost attention, as a PNG file"
    )
    evaluation.add_argument("--seed", type=int, default=0, help="of prompts and pictures (default: 0)")
    _add_guidance(evaluation)
    evaluation.add_argument(
        "--batch-size", type=_positive, default=40, help="pictures decoded at a time (default: %(default)s)"
    )
    _add_compute(evaluation)
    _add_kv_dtype(evaluation)
    _add_quiet(evaluation)

    inspect = command(
        "inspect",
        _inspect,
        "draw what a cache holds: the resident tokens of chosen heads at chosen lines, and their ages",
        "arkv inspect --policy linear:ratio=1/6 --prompt 'three red circles' --out inspect.png",
        "arkv inspect --policy window:ratio=1/6 --prompt 'three red circles' --lines 8,16,23 \\\n"
        "      --layers 0,3,5 --heads 0,1 --animation inspect.gif",
    )
    add_model(inspect)
    _add_policy(inspect)
    inspect.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    inspect.add_argument(
        "--lines", type=_indices, help="comma list, from 0 (default: after each third of the picture)"
    )
    inspect.add_argument(
        "--layers", type=_indices, help="comma list, from 0 (default: the first, the middle and the last)"
    )
    inspect.add_argument("--heads", type=_indices, help="comma list of key heads, from 0 (default: four)")
    inspect.add_argument(
        "--out", type=_path, default=Path("inspect.png"), help="PNG file (default: %(default)s)"
    )
    inspect.add_argument(
        "--animation", type=_path, metavar="FILE", help="also write a GIF file with a frame a line"
    )
    inspect.add_argument(
        "--unconditional",
        action="store_true",
        help="show the unconditional row instead of the conditional one",
    )
    inspect.add_argument("--seed", type=int, default=0, help="of the picture (default: 0)")
    _add_guidance(inspect)
    _add_device(inspect)
    _add_quiet(inspect)

    profile = command(
        "profile",
        _profile,
        "measure how much attention of every head goes beyond the neighbourhood, for the policies that ask",
        "arkv profile --model scenes --prompts 32 --out heads.json --map heads.png",
    )
    add_model(profile)
    profile.add_argument(
        "--prompts",
        type=_positive,
        default=32,
        metavar="N",
        help="of the model's example prompts, one picture each (default: %(default)s)",
    )
    profile.add_argument("--out", required=True, type=_path, metavar="FILE", help="JSON file to write")
    profile.add_argument(
        "--map", type=_path, metavar="FILE", help="also draw the shares by layer and head, as a PNG file"
    )
    profile.add_argument(
        "--radius",
        type=_count,
        default=2,
        help="cells that a neighbourhood reaches upwards and to either side (default: %(default)s)",
    )
    profile.add_argument("--seed", type=int, default=0, help="of prompts and pictures (default: 0)")
    _add_guidance(profile)
    profile.add_argument("--batch-size", type=_positive, help="pictures drawn at a time (default: all)")
    _add_compute(profile)
    _add_quiet(profile)

    demo = command(
        "demo",
        _demo,
        "draw eight prompts with a full cache and two small ones, side by side",
        "arkv demo --out demo.png",
    )
    demo.add_argument("--out", type=_path, default=Path("demo.png"), help="PNG file (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="of the first picture (default: 0)")
    demo.add_argument(
        "--judged",
        type=_count,
        default=32,
        metavar="N",
        help="further prompts that are judged and not shown (default: %(default)s)",
    )
    _add_guidance(demo)
    _add_compute(demo)
    _add_quiet(demo)
    return parser


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        default="full",
        metavar="NAME[:PARAMETER=VALUE,...]",
        help="see 'arkv policies' (default: %(default)s)",
    )
    parser.add_argument("--ratio", help="part of the visual tokens that is kept, such as 1/6 or 0.25")


def _add_guidance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--guidance",
        type=float,
        help="scale of classifier-free guidance; 1 leaves unconditional rows out (default: the model's own)",
    )


def _add_compute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--compile", choices=COMPILE, default="none", help="default: %(default)s")
    _add_device(parser)


def _add_kv_dtype(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="store keys and values in eight bits (default: as the weights)",
    )


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of weights and cache (default: float32 on the CPU, bfloat16 elsewhere)",
    )
    parser.add_argument("--device", default="cpu", help="such as cpu or cuda:0 (default: %(default)s)")


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _generate(arguments: argparse.Namespace) -> None:
    recipe = recipe_of(vars(arguments))
    recipe.load_policy()  # what is misspelt shows first
    if arguments.prompts_file is not None:
        _generate_file(arguments, recipe)
        return
    for name in ("samples", "layout", "npz_side"):
        if getattr(arguments, name) is not None:
            flag = name.replace("_", "-")
            raise ArkvError(f"--{flag} is for the prompts of a file: give --prompts-file, or leave it out")
    out: Path = arguments.out
    as_file = out.suffix == ".png" and not out.is_dir()
    if not as_file and out.suffix and not out.is_dir():
        raise ArkvError(f"cannot write {out}: expected a name that ends in .png, or a folder")
    if as_file:
        _check_writable(out)
    else:
        _check_writable(out / "0000.png")
    decoder = recipe.load_decoder()
    prompts = arguments.prompts
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    result = decoder.generate(
        prompts,
        seeds=seeds,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
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


def _generate_file(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Draw every prompt of a file, as far as it is not drawn yet."""
    out: Path = arguments.out
    if out.suffix in (".png", ".npz") and not out.is_dir():
        raise ArkvError(f"cannot write {out}: expected a folder for the pictures of a file")
    from arkv.bulk import Description, run
    from arkv.bulk.description import BATCH_SIZE

    description = Description(
        prompts=str(arguments.prompts_file),
        out=str(out),
        recipe=recipe,
        samples=arguments.samples,
        layout=arguments.layout,
        npz_side=arguments.npz_side,
        seed=arguments.seed,
        batch_size=arguments.batch_size or BATCH_SIZE,
    )
    summary = run(
        description,
        resume=True,
        strict=True,
        log=False,
        facts={"command": arguments.command},
        progress=not arguments.quiet,
    )
    print(f"{out}: {summary.stats or summary}")
    _print_failures(summary, out)
    if summary.failed:
        raise ArkvError(f"{len(summary.failed)} of {summary.job} pictures could not be drawn")


def _run(arguments: argparse.Namespace) -> None:
    from arkv.bulk import read_description, run, status

    description = read_description(arguments.job)
    if arguments.status:
        print(f"{description.out}: {status(Path(description.out))}")
        return
    given = {name: getattr(arguments, name) for name in ("engine", "workers", "address")}
    description = dataclasses.replace(
        description, **{name: value for name, value in given.items() if value is not None}
    )
    summary = run(
        description,
        resume=arguments.resume,
        facts={"command": arguments.command},
        progress=not arguments.quiet,
    )
    print(f"{description.out}: {summary}")
    _print_failures(summary, Path(description.out))


def _print_failures(summary: Summary, out: Path) -> None:
    for number, reason in itertools.islice(sorted(summary.failed.items()), FAILURES_TOLD):
        print(f"picture {number}: {reason}")
    if len(summary.failed) > FAILURES_TOLD:
        print(f"and {len(summary.failed) - FAILURES_TOLD} more, in {out / 'index.jsonl'}")


def _policies(arguments: argparse.Namespace) -> None:
    from arkv.registry import load_class, names

    rows = []
    for entry in names("policy"):
        try:
            policy_class = load_class("policy", entry.name)
            source = " ".join(str(policy_class.source).split()) or "-"
            settable = [field for field in dataclasses.fields(policy_class) if field.init]
            parameters = ", ".join(map(_default_text, settable)) or "-"
        except Exception as error:
            # Somebody else's broken package must not hide the others.
            source, parameters = f"broken: {_told(error)}", "-"
        rows.append((entry.name, entry.origin, source, parameters))
    print(_table(("policy", "origin", "source", "parameters and defaults"), rows))
    print(
        "\nAs in --policy linear:ratio=1/6,recent=48. Where there is a budget and a ratio, give one of them."
    )


def _models(arguments: argparse.Namespace) -> None:
    from arkv.registry import load_class, load_model, names

    header = ("model", "origin", "layers", "heads", "grid", "N", "codes", "parameters", "about")
    rows = []
    for entry in names("model"):
        shape: tuple[Any, ...] = ("-",) * 6
        try:
            about = _summary(load_class("model", entry.name))
            model = load_model(entry.name, dtype="float32", device="meta")
            spec, grid = model.spec, model.spec.grid
            heads = f"{spec.heads}" if spec.heads == spec.kv_heads else f"{spec.heads} ({spec.kv_heads} KV)"
            parameters = f"{sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M"
            raster = f"{grid.rows} x {grid.line}"
            shape = (spec.layers, heads, raster, f"{grid.tokens:,}", f"{spec.vocabulary:,}", parameters)
        except CheckpointError as error:
            about = f"{about} (no weights: {error})"
        except Exception as error:
            about = f"broken: {_told(error)}"
        rows.append((entry.name, entry.origin, *shape, about))
    print(_table(header, rows, right={2, 3, 4, 5, 6, 7}))


def _estimate(arguments: argparse.Namespace) -> None:
    policy = recipe_of(vars(arguments)).load_policy()
    from arkv.decoding.sampling import Sampling
    from arkv.estimate import estimate, format_bytes, rows_of
    from arkv.registry import torch_dtype

    # On the meta device a model has shapes and no memory.
    model = load(arguments, device="meta")
    guidance = model.spec.guidance if arguments.guidance is None else arguments.guidance
    sampling = Sampling(guidance=guidance)
    sampling.check(model.spec.vocabulary)
    longest = model.spec.max_condition
    if arguments.condition is not None and not 1 <= arguments.condition <= longest:
        raise ArkvError(
            f"--condition is {arguments.condition}: expected 1 to {longest}, the most condition tokens that "
            f"a prompt of {arguments.model} can have"
        )
    guided = sampling.guided
    dtype = torch_dtype(arguments.dtype)
    estimated = estimate(
        model, policy, arguments.batch_size, guided, arguments.condition, dtype, arguments.kv_dtype
    )
    rows = [(name, format_bytes(count), f"{count:,}") for name, count in rows_of(estimated).items()]
    pictures = f"{arguments.batch_size} picture{'s' * (arguments.batch_size > 1)}"
    with_guidance = "two rows a picture" if guided else "one row a picture"
    told = policy_text(arguments.policy, policy)
    print(f"{arguments.model}, {told}, {pictures}, {with_guidance}, {arguments.dtype}")
    print(_table(("", "", "bytes"), rows, right={1, 2}))
    print(f"the policy holds {estimated.kv / estimated.full_kv:.1%} of the full cache")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        _check_writable(arguments.json)
    if arguments.plot is not None:
        _check_figure(arguments.plot, ".png")
    from arkv.jobs.journal import Journal
    from arkv.machine.description import describe_machine
    from arkv.speed.bench import Configuration, measure, refusal
    from arkv.speed.measurement import from_dict
    from arkv.speed.roofline import copy_bandwidth
    from arkv.speed.timing import Extent

    extent = Extent(arguments.tokens, None if arguments.lines is None else tuple(arguments.lines))
    settings = {
        name: getattr(arguments, name)
        for name in ("preset", "guidance", "seed", "compile", "kv_dtype", "repeats", "tokens", "lines")
    } | {"loading": described(arguments), "model": None if arguments.preset else arguments.model}
    models = _preset_models(arguments) if arguments.preset else [arguments.model]
    journal, bandwidth, facts = None, None, dict[str, Any]()
    for name in models:
        arguments.model = name
        model = load(arguments)
        wanted = _bench_wanted(arguments, model)
        if not facts:
            facts = describe_machine(model.device)
            facts["command"] = arguments.command
            facts["dtype"] = str(model.dtype).removeprefix("torch.")
            settings |= {key: facts.pop(key) for key in ("arkv", "torch", "transformers", "device", "dtype")}
            if arguments.json is not None:
                journal = Journal(arguments.json, settings, facts, key="case")
        rows = {} if journal is None else dict(journal.rows)
        pending = [one for one in wanted if one.case(name) not in rows]
        refused = {
            one: found
            for one in pending
            if (one.baseline or arguments.preset) and (found := refusal(model, one)) is not None
        }
        possible = [one for one in pending if one not in refused]
        if possible and bandwidth is None:
            bandwidth = copy_bandwidth(model.device)
        measured = measure(
            model,
            possible,
            compile=arguments.compile,
            kv_dtype=arguments.kv_dtype,
            repeats=arguments.repeats,
            guidance=arguments.guidance,
            seed=arguments.seed,
            extent=extent,
            bandwidth=bandwidth,
            progress=not arguments.quiet,
        )
        for row in itertools.chain(refused.values(), measured):
            case = Configuration(row.policy, row.batch_size, row.memory).case(name)
            # A file may be finished by another commit than it was begun with.
            rows[case] = line = dataclasses.asdict(row) | {"case": case, "commit": facts["commit"]}
            if journal is not None:
                journal.append(line)
        done = [from_dict(rows[one.case(name)]) for one in wanted]
        title = _print_bench(model, done, settings | facts)
        if arguments.plot is not None:
            several = len(models) > 1
            path = arguments.plot.with_stem(f"{arguments.plot.stem}-{name}") if several else arguments.plot
            _plot_bench(path, done, title)


def _preset_models(arguments: argparse.Namespace) -> list[str]:
    from arkv.speed.published import PRESETS

    models = list(dict.fromkeys(row.model for row in PRESETS[arguments.preset]))
    if arguments.model in models:
        return [arguments.model]
    if arguments.model != DEFAULT_MODEL:
        raise ArkvError(f"{arguments.preset} has no rows of {arguments.model}: it has {', '.join(models)}")
    return models


def _bench_wanted(arguments: argparse.Namespace, model: Model) -> list[Configuration]:
    """What is measured with a model."""
    from arkv.speed.bench import Configuration, at_equal_memory, configurations
    from arkv.speed.published import PRESETS

    if arguments.preset is None:
        sizes = arguments.batch_sizes or [1, 4, 16]
        wanted = configurations(arguments.policies, arguments.ratios, sizes)
    else:
        table = [row for row in PRESETS[arguments.preset] if row.model == arguments.model]
        profile = "" if arguments.profile is None else f",profile={str(arguments.profile)!r}"
        texts = {row.policy: row.policy + profile * row.policy.startswith("ssd") for row in table}
        sizes = arguments.batch_sizes or list(dict.fromkeys(row.batch_size for row in table))
        wanted = [Configuration(text, size) for size in sizes for text in texts.values()]
    if arguments.memory is None:
        return wanted
    policies = list(dict.fromkeys(one.policy for one in wanted))
    return [
        one
        for memory in arguments.memory
        for one in at_equal_memory(
            model, policies, memory, arguments.guidance, arguments.seed, arguments.kv_dtype
        )
    ]


def _print_bench(model: Model, rows: Sequence[Measurement | Refusal], run: Mapping[str, Any]) -> str:
    """Tables of what was measured, what could not be, and what others have published; the title."""
    from arkv.estimate import format_bytes
    from arkv.speed.measurement import Measurement, Refusal, speedups
    from arkv.speed.published import published_for

    done = [row for row in rows if isinstance(row, Measurement)]
    guidance = model.spec.guidance if run["guidance"] is None else run["guidance"]
    settings = f"compile {run['compile']}, guidance {guidance:g}, median of {run['repeats']}"
    if run["tokens"] is not None:
        settings += f", first {run['tokens']} tokens only"
    if run["lines"] is not None:
        settings += f", lines {', '.join(map(str, run['lines']))} timed and the others interpolated"
    machine = f"{run['device']} ({run['cpu']}, {run['threads']} threads)"
    if done:
        machine += f" that copies {format_bytes(done[0].bandwidth)}/s"
    title = f"{model.spec.name}, {run['dtype']}, {machine}, {settings}"
    print(title)
    header = ["policy", "batch", "tokens/s", "vs full", "pictures/s", "ms/step", "p95"]
    header += ["roofline", "KV", "of full", "peak", "cold s"]
    lines: list[Sequence[object]] = [
        (
            row.policy,
            row.batch_size,
            _number(row.tokens_per_second),
            "-" if faster is None else f"{faster:.2f}x",
            "-" if row.pictures_per_second is None else f"{row.pictures_per_second:.3g}",
            f"{row.milliseconds_per_step:.2f}",
            f"{row.milliseconds_per_step_p95:.2f}",
            f"{row.roofline_share:.0%}",
            format_bytes(row.kv_bytes),
            f"{row.kv_bytes / row.full_kv_bytes:.0%}",
            "-" if row.peak_bytes is None else format_bytes(row.peak_bytes),
            f"{row.cold_seconds:.1f}",
        )
        for row, faster in zip(done, speedups(done), strict=True)
    ]
    print(_table(header, lines, right=range(1, len(header))))
    if not all(row.turns for row in done):
        print("caches do not fit into memory together: policies were timed one after the other")
    for row in rows:
        if isinstance(row, Refusal):
            print(f"{row.policy} x {row.batch_size} is left out: {row.error}")
    others = published_for(model.spec.name, {row.batch_size for row in rows})
    if others:
        print("\npublished, on other hardware:")
        base = {(row.table, row.batch_size): row for row in others if row.policy == "full"}
        lines = [
            (
                row.method,
                row.batch_size,
                _number(row.pictures_per_second * model.spec.grid.tokens),
                f"{row.pictures_per_second / base[row.table, row.batch_size].pictures_per_second:.2f}x",
                f"{row.pictures_per_second:.3g}",
                f"{row.gigabytes:g} GB",
                row.table,
            )
            for row in others
        ]
        print(_table((*header[:5], "memory", "from"), lines, right=range(1, 6)))
        told = [text for row in others for text in (row.hardware, row.note) if text]
        print("\n".join(dict.fromkeys(told)))
    return title


def _number(value: float) -> str:
    """Whole, but with three significant digits at least."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plot_bench(path: Path, rows: Sequence[Measurement | Refusal], title: str) -> None:
    from arkv.speed.measurement import Measurement
    from arkv.speed.speed_figure import draw_speed

    done = [row for row in rows if isinstance(row, Measurement)]
    if not done:
        print(f"{path} is not drawn: nothing was measured", file=sys.stderr)
        return
    write_whole({path: png(draw_speed(done, title), {"Software": f"arkv {arkv.__version__}"})})
    print(path)


def _eval(arguments: argparse.Namespace) -> None:
    _check_writable(arguments.out)
    if arguments.plot is not None:
        _check_figure(arguments.plot, ".png")
    from arkv.decoding.sampling import Sampling
    from arkv.jobs.journal import Journal
    from arkv.speed.bench import configurations
    from arkv.study.evaluation import Contender, Evaluation, Settings, describe, evaluate

    wanted = [one.policy for one in configurations(arguments.policies, arguments.ratios, [1])]
    model = load(arguments)
    contenders = [Contender.load(text, model) for text in wanted]
    settings = Settings(
        prompts=arguments.prompts,
        forced_prompts=arguments.forced_prompts,
        batch_size=arguments.batch_size,
        guidance=model.spec.guidance if arguments.guidance is None else arguments.guidance,
        seed=arguments.seed,
        compile=arguments.compile,
        kv_dtype=arguments.kv_dtype,
    )
    Sampling(settings.guidance).check(model.spec.vocabulary)
    shared, facts = describe(model, settings)
    shared["loading"] = described(arguments)
    facts["command"] = arguments.command
    journal = Journal(arguments.out, shared, facts)
    pending = [one for one in contenders if one.text not in journal.rows]
    if len(pending) < len(wanted) and not arguments.quiet:
        print(f"{arguments.out}: {len(wanted) - len(pending)} of {len(wanted)} are done", file=sys.stderr)
    for row in evaluate(model, pending, settings, progress=not arguments.quiet):
        # A file may be finished by another commit than it was begun with.
        journal.append(dataclasses.asdict(row) | {"commit": facts["commit"]})

    rows = [Evaluation.from_dict(journal.rows[text]) for text in wanted]
    title = (
        f"{shared['model']}, {settings.prompts} prompts, guidance {settings.guidance:g}, "
        f"{shared['dtype']}, {shared['device']}"
    )
    print(title)
    _print_evaluations(rows)
    if arguments.plot is not None:
        from arkv.study.evaluation_figure import draw_comparison

        software = {"Software": f"arkv {arkv.__version__}"}
        write_whole({arguments.plot: png(draw_comparison(rows, title), software)})
    print(" and ".join(str(path) for path in (arguments.out, arguments.plot) if path is not None))


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
        print(_table(header, lines, right=range(1, len(header))))
    groups = list(dict.fromkeys(group for row in done for group in row.groups))
    if groups:
        lines_of_groups = [(row.policy, *(right(row.groups.get(group)) for group in groups)) for row in done]
        print("\n" + _table(("right [95%]", *groups), lines_of_groups, right=range(1, len(groups) + 1)))
    for row in rows:
        if row.error is not None:
            print(f"\n{row.policy} cannot be: {row.error}")


def _inspect(arguments: argparse.Namespace) -> None:
    policy = recipe_of(vars(arguments)).load_policy()
    _check_figure(arguments.out, ".png")
    if arguments.animation is not None:
        _check_figure(arguments.animation, ".gif")
    from arkv.study.inspection import choose, record
    from arkv.study.inspection_figure import animate, draw_sheet

    model = load(arguments)
    spec, rows = model.spec, model.spec.grid.rows
    lines = choose("line", arguments.lines, rows, [rows // 3, 2 * rows // 3, rows - 1])
    layers = choose("layer", arguments.layers, spec.layers, [0, spec.layers // 2, spec.layers - 1])
    heads = choose("key head", arguments.heads, spec.kv_heads, range(min(4, spec.kv_heads)))
    recording = record(
        model,
        policy,
        arguments.prompt,
        seed=arguments.seed,
        guidance=arguments.guidance,
        unconditional=arguments.unconditional,
        progress=not arguments.quiet,
    )
    text = policy_text(arguments.policy, policy)
    row = "unconditional" if arguments.unconditional else "conditional"
    given = ":".join(filter(None, (arguments.policy, arguments.ratio and f"ratio={arguments.ratio}")))
    title = f"What the cache holds: {given}"
    note = f"{arguments.model}, {json.dumps(arguments.prompt)}, seed {arguments.seed}, {row} row"
    sheet = draw_sheet(recording, lines, layers, heads, title, note)
    software = {"Software": f"arkv {arkv.__version__}"}
    files = {arguments.out: png(sheet, software | {"policy": text, "prompt": arguments.prompt})}
    if arguments.animation is not None:
        shown = not arguments.quiet
        files[arguments.animation] = animate(recording, layers, heads, title, note, progress=shown)
    write_whole(files)
    resident = recording.residents[-1].sum(-1)
    print(
        f"{' and '.join(map(str, files))}: at the end {int(resident.min())} to {int(resident.max())} of "
        f"{spec.grid.tokens} visual tokens resident in a head"
    )


def _profile(arguments: argparse.Namespace) -> None:
    _check_writable(arguments.out)
    if arguments.map is not None:
        _check_figure(arguments.map, ".png")
    from arkv.study.profile import draw_map, measure

    model = load(arguments)
    measured = measure(
        model,
        model.example_prompts(arguments.prompts, arguments.seed),
        seeds=range(arguments.seed, arguments.seed + arguments.prompts),
        radius=arguments.radius,
        guidance=arguments.guidance,
        batch_size=arguments.batch_size,
        compile=arguments.compile,
        progress=not arguments.quiet,
    )
    files = {arguments.out: measured.to_json().encode()}
    if arguments.map is not None:
        files[arguments.map] = png(draw_map(measured), {"Software": f"arkv {arkv.__version__}"})
    write_whole(files)
    rows = [
        (layer, *(f"{share:.1%}" for share in (min(shares), sum(shares) / len(shares), max(shares))))
        for layer, shares in enumerate(measured.outside)
    ]
    header = ("layer", "least", "mean of heads", "most")
    print(_table(header, rows, right=range(len(header))))
    print(f"{arguments.out}: attention beyond {measured.radius} cells, {measured.prompts} pictures")


def _demo(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    if out.suffix != ".png":
        raise ArkvError(f"cannot write {out}: expected a name that ends in .png")
    _check_writable(out)
    from arkv.estimate import format_bytes
    from arkv.registry import load_model
    from arkv.study import demo

    model = load_model(demo.MODEL, dtype=arguments.dtype, device=arguments.device)
    prompts = demo.demo_prompts(model, arguments.judged)
    trials = []
    for contender in demo.CONTENDERS:
        if not arguments.quiet:
            print(f"{contender.title}: {len(prompts)} pictures", file=sys.stderr)
        trial = demo.run_trial(
            model,
            contender,
            prompts,
            seed=arguments.seed,
            guidance=arguments.guidance,
            compile=arguments.compile,
            progress=not arguments.quiet,
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
    print(_table(header, rows, right=set(range(1, len(header)))))
    print(f"{out}: the {shown} shown pictures of each, {len(prompts)} judged")


def _told(error: Exception) -> str:
    """An exception in one line; our own speak for themselves."""
    from arkv.registry import one_line

    return " ".join(str(error).split()) if isinstance(error, ArkvError) else one_line(error)


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return f"{field.name}={field.default}"
    if field.default_factory is not dataclasses.MISSING:
        return f"{field.name}={field.default_factory()}"
    return f"{field.name} (required)"


def _summary(documented: object) -> str:
    """First sentence of a docstring, without what stands in parentheses at its end."""
    text = " ".join((documented.__doc__ or "").split("\n\n")[0].split())
    return text.partition(" (")[0].rstrip(".")


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def _positive(text: str) -> int:
    count = _count(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return count


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else _positive(text)


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if count < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return count


def _sizes(text: str) -> list[int]:
    return [_positive(part) for part in _split(text)]


def _gigabytes(text: str) -> list[int]:
    try:
        sizes = [int(1e9 * float(part)) for part in _split(text)]
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of gigabytes") from None
    if min(sizes) <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return sizes


def _indices(text: str) -> list[int]:
    return [_count(part) for part in _split(text)]


def _split(text: str) -> list[str]:
    from arkv.registry import split_commas

    parts = [part.strip() for part in split_commas(text) if part.strip()]
    if not parts:
        raise argparse.ArgumentTypeError("the list is empty")
    return parts


def _split_policies(text: str) -> list[str]:
    """Split a comma list of policies whose own parameters have commas between them, too."""
    policies: list[str] = []
    for part in _split(text):
        if "=" in part and ":" not in part.partition("=")[0] and policies:
            policies[-1] += f",{part}"
        else:
            policies.append(part)
    return policies


def _table(header: Sequence[str], rows: Iterable[Sequence[object]], right: Iterable[int] = ()) -> str:
    """Columns two spaces apart; those in `right` are numbers and end flush."""
    lines = [header, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = set(right)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _check_writable(path: Path) -> None:
    """Find out before a long computation that its result cannot be written; folders may be missing.

    Raises:
        ArkvError: it cannot.
    """
    if path.is_dir():
        raise ArkvError(f"cannot write {path}: it is a folder")
    folder = next(parent for parent in path.absolute().parents if parent.exists() or parent.is_symlink())
    try:
        # Permissions lie, to root and on read-only file systems; an attempt does not.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {folder}: {error.strerror}") from None


def _check_figure(path: Path, suffix: str) -> None:
    """Find out before a long computation that a figure cannot be drawn or written.

    Raises:
        ArkvError: it cannot.
    """
    if path.suffix != suffix:
        raise ArkvError(f"cannot write {path}: expected a name that ends in {suffix}")
    _check_writable(path)
    from arkv.pictures.figure import new_figure

    new_figure(1, 1)


if __name__ == "__main__":
    sys.exit(main())
