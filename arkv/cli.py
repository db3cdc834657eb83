"""The command `arkv`.

The only module that prints. Results go to the standard output, progress and errors to the standard error.
Nothing heavy is imported before a command needs it, so that `arkv --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arkv
from arkv.errors import ArkvError, CheckpointError

if TYPE_CHECKING:
    from PIL import Image

    from arkv.evaluation import Accuracy, Evaluation
    from arkv.policy import CachePolicy

DTYPES = ("float32", "bfloat16", "float16")
COMPILE = ("none", "inductor")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the name of the program; None for those of the process.

    Returns:
        0, 1 after an error that was told in one line or if nobody reads the output any more, or 130 after
        an interrupt.

    Raises:
        SystemExit: after help or version (0), or if the arguments cannot be parsed (2).
    """
    try:
        try:
            arguments = _parser().parse_args(argv)
            arguments.argv = sys.argv[1:] if argv is None else argv
            arguments.run(arguments)
        finally:
            _flush()
    except ArkvError as error:
        print(f"arkv: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("arkv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if not _is_out_of_memory(error):
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


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an exception says so, in one of the ways that Python and torch have; imports no torch."""
    if isinstance(error, (MemoryError, getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError))):
        return True
    texts = ("can't allocate memory", "cannot allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)


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
    )
    _add_model(generate)
    _add_policy(generate)
    generate.add_argument(
        "--prompt",
        action="append",
        required=True,
        dest="prompts",
        metavar="TEXT",
        help="what to draw; repeatable",
    )
    generate.add_argument(
        "--out",
        required=True,
        type=_path,
        help="a name that ends in .png: the picture, or a contact sheet of several; any other: a folder for "
        "one PNG a prompt, 0000.png and so on",
    )
    generate.add_argument("--seed", type=int, default=0, help="picture i is drawn from seed + i (default: 0)")
    _add_guidance(generate)
    generate.add_argument(
        "--temperature", type=float, default=1.0, help="0 takes the likeliest token (default: 1)"
    )
    generate.add_argument(
        "--top-k", type=int, help="draw from this many likeliest tokens; 0 for all (default: the model's own)"
    )
    generate.add_argument("--top-p", type=float, help="draw from the smallest set of tokens this probable")
    generate.add_argument("--batch-size", type=_positive, help="pictures decoded at a time (default: all)")
    _add_compute(generate)
    _add_quiet(generate)

    command("policies", _policies, "list the cache policies and their parameters", "arkv policies")
    command("models", _models, "list the models", "arkv models")

    estimate = command(
        "estimate",
        _estimate,
        "say how much memory a model, a policy and a batch will take, before any of it is allocated",
        "arkv estimate --model scenes --policy linear --ratio 1/6 --batch-size 16",
    )
    _add_model(estimate)
    _add_policy(estimate)
    estimate.add_argument("--batch-size", type=_positive, default=1, help="pictures at a time (default: 1)")
    _add_guidance(estimate)
    estimate.add_argument(
        "--condition", type=int, help="condition tokens of a row (default: the most a prompt can have)"
    )
    estimate.add_argument("--dtype", choices=DTYPES, default="float32", help="of weights, keys and values")

    bench = command(
        "bench",
        _bench,
        "measure speed and KV bytes of policies on this machine",
        "arkv bench --model scenes --policies full,linear,streaming --ratios 1/6 --batch-sizes 1,16",
        "arkv bench --policies full,linear:recent=48 --ratios 1/6,1/3 --batch-sizes 16 --json bench.jsonl",
    )
    _add_model(bench)
    bench.add_argument(
        "--policies",
        default="full,linear,streaming",
        type=_split_policies,
        help="comma list (default: %(default)s)",
    )
    bench.add_argument(
        "--ratios",
        default="1/6",
        type=_split,
        help="comma list, for the policies that have a ratio (default: %(default)s)",
    )
    bench.add_argument(
        "--batch-sizes", default="1,4,16", type=_sizes, help="comma list (default: %(default)s)"
    )
    bench.add_argument("--repeats", type=_positive, default=3, help="rounds after the cold one (default: 3)")
    bench.add_argument("--seed", type=int, default=0, help="of prompts and pictures (default: 0)")
    _add_guidance(bench)
    _add_compute(bench)
    bench.add_argument(
        "--json", type=_path, metavar="FILE", help="also write JSON lines, the first with the machine"
    )
    _add_quiet(bench)

    evaluation = command(
        "eval",
        _eval,
        "score the pictures of policies, and what they lose of the full cache's attention",
        "arkv eval --policies full,linear,streaming --ratios 1,1/2,1/6 --prompts 200 --out results.jsonl",
        "arkv eval --policies full,linear:anchors=24 --ratios 1/4,1/8 --out results.jsonl --plot results.png",
    )
    _add_model(evaluation)
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
    _add_quiet(evaluation)

    inspect = command(
        "inspect",
        _inspect,
        "draw what a cache holds: the resident tokens of chosen heads at chosen lines, and their ages",
        "arkv inspect --policy linear:ratio=1/6 --prompt 'three red circles' --out inspect.png",
        "arkv inspect --policy window:ratio=1/6 --prompt 'three red circles' --lines 8,16,23 \\\n"
        "      --layers 0,3,5 --heads 0,1 --animation inspect.gif",
    )
    _add_model(inspect)
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
    _add_model(profile)
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


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="scenes", metavar="NAME", help="see 'arkv models' (default: %(default)s)"
    )


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
    policy = _load_policy(arguments)
    out: Path = arguments.out
    as_file = out.suffix == ".png" and not out.is_dir()
    if not as_file and out.suffix and not out.is_dir():
        raise ArkvError(f"cannot write {out}: expected a name that ends in .png, or a folder")
    if as_file:
        _check_writable(out)
    else:
        _check_writable(out / "0000.png")
    from arkv.decoder import Decoder
    from arkv.registry import load_model

    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    guidance = model.spec.guidance if arguments.guidance is None else arguments.guidance
    prompts = arguments.prompts
    seeds = range(arguments.seed, arguments.seed + len(prompts))
    result = Decoder(model, policy, arguments.compile).generate(
        prompts,
        seeds=seeds,
        guidance=guidance,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        batch_size=arguments.batch_size,
        progress=not arguments.quiet,
    )
    settings = {
        "guidance": guidance,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "dtype": str(model.dtype).removeprefix("torch."),
        "compile": arguments.compile,
    }
    common = {
        "model": arguments.model,
        "policy": _policy_text(arguments.policy, policy),
        "settings": json.dumps(settings),
        "Software": f"arkv {arkv.__version__}",
    }
    if as_file and len(prompts) > 1:
        from arkv.sheet import Cell, contact_sheet, in_rows

        sheet = contact_sheet(in_rows([Cell(i, p) for i, p in zip(result.images, prompts, strict=True)]))
        text = {"prompt": json.dumps(prompts), "seed": json.dumps(list(seeds))}
        files = {out: _png(sheet, text | common)}
    else:
        names = [out] if as_file else [out / f"{index:04d}.png" for index in range(len(prompts))]
        files = {
            name: _png(image, {"prompt": prompt, "seed": str(seed)} | common)
            for name, image, prompt, seed in zip(names, result.images, prompts, seeds, strict=True)
        }
    _write_whole(files)
    print(f"{out}: {result.stats}")


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
    policy = _load_policy(arguments)
    from arkv.estimate import estimate, format_bytes, rows_of
    from arkv.registry import load_model, torch_dtype
    from arkv.sampling import Sampling

    # On the meta device a model has shapes and no memory.
    model = load_model(arguments.model, dtype=arguments.dtype, device="meta")
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
    estimated = estimate(model, policy, arguments.batch_size, guided, arguments.condition, dtype)
    rows = [(name, format_bytes(count), f"{count:,}") for name, count in rows_of(estimated).items()]
    pictures = f"{arguments.batch_size} picture{'s' * (arguments.batch_size > 1)}"
    with_guidance = "two rows a picture" if guided else "one row a picture"
    policy_text = _policy_text(arguments.policy, policy)
    print(f"{arguments.model}, {policy_text}, {pictures}, {with_guidance}, {arguments.dtype}")
    print(_table(("", "", "bytes"), rows, right={1, 2}))
    print(f"the policy holds {estimated.kv / estimated.full_kv:.1%} of the full cache")


def _bench(arguments: argparse.Namespace) -> None:
    if arguments.json is not None:
        _check_writable(arguments.json)
    from arkv.bench import configurations, describe_run, measure
    from arkv.estimate import format_bytes
    from arkv.registry import load_model

    wanted = configurations(arguments.policies, arguments.ratios, arguments.batch_sizes)
    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    measured = measure(
        model,
        wanted,
        compile=arguments.compile,
        repeats=arguments.repeats,
        guidance=arguments.guidance,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    run = describe_run(model, arguments.seed, arguments.guidance)
    rows = [
        (
            row.policy,
            row.batch_size,
            f"{row.tokens_per_second:,.0f}",
            "-" if row.speedup is None else f"{row.speedup:.2f}x",
            f"{row.pictures_per_second:.3g}",
            f"{row.milliseconds_per_step:.2f}",
            format_bytes(row.kv_bytes),
            f"{row.kv_bytes / row.full_kv_bytes:.0%}",
            f"{row.cold_seconds:.1f}",
        )
        for row in measured
    ]
    if arguments.json is not None:
        lines = [{"run": run}, *map(dataclasses.asdict, measured)]
        _write_whole({arguments.json: "".join(json.dumps(line) + "\n" for line in lines).encode()})
    settings = f"compile {arguments.compile}, guidance {run['guidance']:g}, median of {arguments.repeats}"
    machine = f"{run['device']} ({run['cpu']}, {run['threads']} threads)"
    print(f"{run['model']}, {run['dtype']}, {machine}, {settings}")
    header = ("policy", "batch", "tokens/s", "vs full", "pictures/s", "ms/step", "KV", "of full", "cold s")
    print(_table(header, rows, right=set(range(1, len(header)))))


def _eval(arguments: argparse.Namespace) -> None:
    _check_writable(arguments.out)
    if arguments.plot is not None:
        _check_figure(arguments.plot, ".png")
    from arkv.bench import configurations
    from arkv.evaluation import Contender, Evaluation, Settings, describe, evaluate
    from arkv.journal import Journal
    from arkv.registry import load_model
    from arkv.sampling import Sampling

    wanted = [one.policy for one in configurations(arguments.policies, arguments.ratios, [1])]
    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    contenders = [Contender.load(text, model) for text in wanted]
    settings = Settings(
        prompts=arguments.prompts,
        forced_prompts=arguments.forced_prompts,
        batch_size=arguments.batch_size,
        guidance=model.spec.guidance if arguments.guidance is None else arguments.guidance,
        seed=arguments.seed,
        compile=arguments.compile,
    )
    Sampling(settings.guidance).check(model.spec.vocabulary)
    shared, facts = describe(model, settings)
    facts["command"] = shlex.join(["arkv", *map(str, arguments.argv)])
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
        from arkv.plots import draw_comparison

        software = {"Software": f"arkv {arkv.__version__}"}
        _write_whole({arguments.plot: _png(draw_comparison(rows, title), software)})
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
    policy = _load_policy(arguments)
    _check_figure(arguments.out, ".png")
    if arguments.animation is not None:
        _check_figure(arguments.animation, ".gif")
    from arkv.inspection import choose, record
    from arkv.inspection_figure import animate, draw_sheet
    from arkv.registry import load_model

    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
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
    text = _policy_text(arguments.policy, policy)
    row = "unconditional" if arguments.unconditional else "conditional"
    given = ":".join(filter(None, (arguments.policy, arguments.ratio and f"ratio={arguments.ratio}")))
    title = f"What the cache holds: {given}"
    note = f"{arguments.model}, {json.dumps(arguments.prompt)}, seed {arguments.seed}, {row} row"
    sheet = draw_sheet(recording, lines, layers, heads, title, note)
    software = {"Software": f"arkv {arkv.__version__}"}
    files = {arguments.out: _png(sheet, software | {"policy": text, "prompt": arguments.prompt})}
    if arguments.animation is not None:
        shown = not arguments.quiet
        files[arguments.animation] = animate(recording, layers, heads, title, note, progress=shown)
    _write_whole(files)
    resident = recording.residents[-1].sum(-1)
    print(
        f"{' and '.join(map(str, files))}: at the end {int(resident.min())} to {int(resident.max())} of "
        f"{spec.grid.tokens} visual tokens resident in a head"
    )


def _profile(arguments: argparse.Namespace) -> None:
    _check_writable(arguments.out)
    if arguments.map is not None:
        _check_figure(arguments.map, ".png")
    from arkv.profile import draw_map, measure
    from arkv.registry import load_model

    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
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
        files[arguments.map] = _png(draw_map(measured), {"Software": f"arkv {arkv.__version__}"})
    _write_whole(files)
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
    from arkv import demo
    from arkv.estimate import format_bytes
    from arkv.registry import load_model

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
    _write_whole({out: _png(demo.draw_sheet(trials), {"Software": f"arkv {arkv.__version__}"})})
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


def _load_policy(arguments: argparse.Namespace) -> CachePolicy:
    from arkv.registry import load_policy

    parameters = {} if arguments.ratio is None else {"ratio": arguments.ratio}
    return load_policy(arguments.policy, **parameters)


def _policy_text(given: str, policy: CachePolicy) -> str:
    """Name and every parameter that is not None, as `--policy` takes them."""
    values = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    parameters = ",".join(f"{name}={_value_text(v)}" for name, v in values.items() if v is not None)
    return ":".join(filter(None, (given.partition(":")[0], parameters)))


def _value_text(value: object) -> str:
    """A parameter's value such that its commas do not end it."""
    from arkv.registry import split_commas

    text = str(value)
    return text if split_commas(text) == [text] else repr(value)


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


def _png(image: Image.Image, texts: Mapping[str, str]) -> bytes:
    """A PNG file with text chunks."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in texts.items():
        info.add_text(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


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
    from arkv.figure import new_figure

    new_figure(1, 1)


def _write_whole(files: Mapping[Path, bytes]) -> None:
    """Write files so that each of them appears complete or not at all.

    Raises:
        ArkvError: one cannot be written.
    """
    begun: dict[Path, Path] = {}
    path = Path()
    try:
        for path, content in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            begun[path] = path.with_name(f".{path.name}.{os.getpid()}.part")
            begun[path].write_bytes(content)
        for path, part in begun.items():
            os.replace(part, path)
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {error.strerror}") from None
    finally:
        for part in begun.values():
            with contextlib.suppress(OSError):
                part.unlink()


if __name__ == "__main__":
    sys.exit(main())
