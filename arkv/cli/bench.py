"""`arkv bench`."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import arkv
from arkv.cli.bench_tables import print_bench
from arkv.cli.flags import QuietOption
from arkv.cli.outputs import check_figure, check_outputs
from arkv.cli.parser import Command
from arkv.errors import ArkvError
from arkv.jobs.loading import DeviceOptions, ModelOptions
from arkv.jobs.recipe import CompileOption, GuidanceOption, KvDtypeOption
from arkv.options import (
    Counts,
    FilePath,
    Indices,
    Memories,
    OptionError,
    Policies,
    Positive,
    Ratios,
    Seed,
    fields_of,
    option,
    options,
)

if TYPE_CHECKING:
    from arkv.jobs.journal import Journal
    from arkv.jobs.provenance import Facts
    from arkv.model import Model
    from arkv.speed.bench import Configuration
    from arkv.speed.measurement import Measurement, Refusal
    from arkv.speed.published import Published


@options
class BenchOptions(GuidanceOption, ModelOptions, CompileOption, DeviceOptions, KvDtypeOption, QuietOption):
    """Options of `arkv bench`."""

    SECTION = "What to measure, and where to"

    policies: Policies | None = option(
        default=None,
        metavar="NAME,NAME",
        help="comma list (default: full,linear,streaming); transformers-dynamic and transformers-static are "
        "transformers' own Janus with its DynamicCache, or with its StaticCache and compiled. With a preset: "
        "only these of its policies",
    )
    ratios: Ratios = option(
        default=("1/6",), metavar="R,R", help="comma list, for the policies that have a ratio"
    )
    batch_sizes: Counts | None = option(default=None, metavar="N,N", help="comma list (default: 1,4,16)")
    memory: Memories | None = option(
        default=None,
        metavar="GB",
        help="comma list of gigabytes, instead of batch sizes: the largest batch of each policy that is "
        "estimated to fit, weights included",
    )
    preset: Literal["linear-table", "ssd-table"] | None = option(
        default=None,
        help="the rows of a paper's table of efficiency: models (all, or the one of --model), policies, "
        "ratios and, unless given, batch sizes",
    )
    profile: FilePath | None = option(
        default=None, metavar="FILE", help="from 'arkv profile', for SSD in a preset"
    )
    tokens: Positive | None = option(
        default=None, metavar="N", help="decode only the first N visual tokens of a picture"
    )
    lines: Indices | None = option(
        default=None,
        metavar="N,N",
        help="comma list, from 0: decode only these lines, with caches as large as they then are, and "
        "interpolate the others' time",
    )
    repeats: Positive = option(default=3, metavar="N", help="rounds after the cold one")
    seed: Seed = option(default=0, metavar="N", help="of prompts and pictures")
    kernels: bool = option(
        default=False,
        help="measure nothing: compile the attention kernels that the model needs on GPUs, which need not be "
        "here, and print their registers, spills and loads",
    )
    json: FilePath | None = option(
        default=None,
        metavar="FILE",
        help="JSON lines, the first with the machine, a row as soon as it is measured; if the file is there, "
        "what it has is not run again, unless other code or weights made it",
    )
    plot: FilePath | None = option(
        default=None, metavar="FILE", help="also draw speed and roofline, as a PNG file; one a model"
    )

    def __post_init__(self) -> None:
        for one, other in (("batch_sizes", "memory"), ("tokens", "lines")):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                flags = [f"--{name.replace('_', '-')}" for name in (one, other)]
                raise OptionError(f"{flags[1]} is not allowed with {flags[0]}: give one of them")


def run(given: BenchOptions, typed: str) -> None:
    """Measure, or print what kernels are compiled to."""
    if given.kernels:
        _print_kernels(given)
        return
    check_outputs(json=given.json, plot=given.plot)
    check_figure(given.plot, ".png")
    from arkv.jobs.journal import Journal
    from arkv.jobs.provenance import facts_of_class, facts_of_model
    from arkv.machine.description import describe_machine
    from arkv.speed.bench import Configuration, measure, refusal
    from arkv.speed.measurement import from_dict
    from arkv.speed.roofline import copy_bandwidth
    from arkv.speed.timing import Extent

    extent = Extent(given.tokens, given.lines)
    settings = {
        name: getattr(given, name)
        for name in ("preset", "guidance", "seed", "compile", "kv_dtype", "repeats", "tokens", "lines")
    } | {"loading": given.described(), "model": None if given.preset else given.model}
    models = _preset_models(given) if given.preset else [given.model]
    journal, bandwidth, facts = None, None, dict[str, Any]()
    for name in models:
        # Without the memory: it would be read as gigabytes once more.
        asked = dataclasses.replace(given, model=name, memory=None)
        model = asked.load_model()
        wanted = _wanted(asked, model, given.memory)
        if not facts:
            facts = describe_machine(model.device)
            facts["command"] = typed
            facts["dtype"] = str(model.dtype).removeprefix("torch.")
            settings |= {key: facts.pop(key) for key in ("arkv", "torch", "transformers", "device", "dtype")}
            if given.json is not None:
                journal = Journal(given.json, settings, facts, key="case")
        rows, decided_by = dict[str, dict[str, Any]](), dict[str, Any]()
        if journal is not None:
            # Random weights are the class's own, and reading all of them would take long.
            facts_of = facts_of_class(type(model)) if given.random_weights else facts_of_model(model)
            others = {"model": facts_of}
            decided_by = {one.case(name): one.decided_by(model, others) for one in wanted}
            rows, again = _sorted_out(journal, decided_by, given.repeats)
            for reason in () if given.quiet else again:
                print(reason, file=sys.stderr)
        pending = [one for one in wanted if one.case(name) not in rows]
        refused = {
            one: found
            for one in pending
            if (one.baseline or given.preset) and (found := refusal(model, one)) is not None
        }
        possible = [one for one in pending if one not in refused]
        if possible and bandwidth is None:
            bandwidth = copy_bandwidth(model.device)
        measured = measure(
            model,
            possible,
            compile=given.compile,
            kv_dtype=given.kv_dtype,
            repeats=given.repeats,
            guidance=given.guidance,
            seed=given.seed,
            extent=extent,
            bandwidth=bandwidth,
            progress=not given.quiet,
        )
        for row in itertools.chain(refused.values(), measured):
            case = Configuration(row.policy, row.batch_size, row.memory).case(name)
            # A file may be finished by another commit than it was begun with.
            rows[case] = line = dataclasses.asdict(row) | {"case": case, "commit": facts["commit"]}
            if journal is not None:
                journal.append(line | {"decided_by": decided_by[case]})
        if journal is not None and pending:
            journal.replace(journal.rows.values())  # without the rows of earlier rounds
        done = [from_dict(rows[one.case(name)]) for one in wanted]
        title = print_bench(model, done, settings | facts)
        if given.plot is not None:
            several = len(models) > 1
            path = given.plot.with_stem(f"{given.plot.stem}-{name}") if several else given.plot
            _plot(path, done, title)


def _sorted_out(
    journal: Journal, decided_by: Mapping[str, Facts], repeats: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The rows of a file that stand, and about each of the others why it is measured again."""
    from arkv.jobs.provenance import changes

    rows, again = dict[str, dict[str, Any]](), list[str]()
    for case, here in decided_by.items():
        row = journal.rows.get(case)
        if row is None:
            continue
        rounds = len(row.get("seconds", ()))
        if told := changes(row.get("decided_by"), here):
            again.append(f"{case} is stale and is measured again: {'; '.join(told)}")
        elif "error" not in row and rounds < repeats:
            again.append(f"{case} has {rounds} of {repeats} rounds and is measured again")
        else:
            rows[case] = row
    return rows, [f"{journal.path}: the row of {line}" for line in again]


def _print_kernels(given: BenchOptions) -> None:
    from arkv.speed.machine_code import calls_for, table

    # Nothing but the model's shape decides about kernels.
    for line in table(calls_for(given.load_model().spec)):
        print(line, flush=True)


def _preset_models(given: BenchOptions) -> list[str]:
    assert given.preset is not None
    models = list(dict.fromkeys(row.model for row in _rows_of(given.preset, given.policies)))
    if given.model in models:
        return [given.model]
    if given.model != fields_of(BenchOptions)["model"].default:
        raise ArkvError(f"{given.preset} has no rows of {given.model}: it has {', '.join(models)}")
    return models


def _rows_of(preset: str, policies: Sequence[str] | None) -> list[Published]:
    """The rows of a preset, or those of some of its policies, by name or as the table has them."""
    from arkv.speed.published import PRESETS

    table = PRESETS[preset]
    if policies is None:
        return list(table)
    known = {name: None for row in table for name in (row.policy.partition(":")[0], row.policy)}
    if unknown := [policy for policy in policies if policy not in known]:
        raise ArkvError(f"{preset} has no {unknown[0]}: it has {', '.join(known)}")
    return [row for row in table if {row.policy, row.policy.partition(":")[0]} & set(policies)]


def _wanted(given: BenchOptions, model: Model, memories: Sequence[int] | None) -> list[Configuration]:
    """What is measured with a model."""
    from arkv.speed.bench import Configuration, at_equal_memory, configurations

    if given.preset is None:
        sizes: Sequence[int] = given.batch_sizes or (1, 4, 16)
        policies: Sequence[str] = given.policies or ("full", "linear", "streaming")
        wanted = configurations(policies, list(map(str, given.ratios)), sizes)
    else:
        table = [row for row in _rows_of(given.preset, given.policies) if row.model == given.model]
        profile = "" if given.profile is None else f",profile={str(given.profile)!r}"
        texts = {row.policy: row.policy + profile * row.policy.startswith("ssd") for row in table}
        sizes = given.batch_sizes or list(dict.fromkeys(row.batch_size for row in table))
        wanted = [Configuration(text, size) for size in sizes for text in texts.values()]
    if memories is None:
        return wanted
    policies = list(dict.fromkeys(one.policy for one in wanted))
    return [
        one
        for memory in memories
        for one in at_equal_memory(model, policies, memory, given.guidance, given.seed, given.kv_dtype)
    ]


def _plot(path: Path, rows: Sequence[Measurement | Refusal], title: str) -> None:
    from arkv.pictures.files import png, write_whole
    from arkv.speed.measurement import Measurement
    from arkv.speed.speed_figure import draw_speed

    done = [row for row in rows if isinstance(row, Measurement)]
    if not done:
        print(f"{path} is not drawn: nothing was measured", file=sys.stderr)
        return
    write_whole({path: png(draw_speed(done, title), {"Software": f"arkv {arkv.__version__}"})})
    print(path)


COMMAND = Command(
    BenchOptions,
    run,
    (
        "arkv bench --model scenes --policies full,linear,streaming --ratios 1/6 --batch-sizes 1,16",
        "arkv bench --policies full,linear:recent=48 --ratios 1/6,1/3 --batch-sizes 16 --json bench.jsonl",
        "arkv bench --model janus-pro-1b --random-weights --dtype bfloat16 --batch-sizes 32 \\\n"
        "      --policies full,linear,transformers-dynamic --lines 0,12,23 --plot bench.png",
        "arkv bench --preset linear-table --policies full,linear --random-weights --device cuda:0 \\\n"
        "      --json table.jsonl",
    ),
)
