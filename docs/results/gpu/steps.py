"""What a GPU is asked, most telling first: steps of eight minutes at the most, each of parts that stand alone.

A part is a command. `{device}`, `{compile}` and the like differ between a GPU and a dry run on a CPU; everything
else is the same, so that nothing but the machine can make a part fail that has passed dry.
"""

from __future__ import annotations

from dataclasses import dataclass

LONGEST = 8 * 60
"""Seconds of a step."""


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: no other part's; its files are called so.
        command: `arkv`, `pytest` or a script of this folder, and its arguments.
        seconds: how long it should take on an H100; it is stopped after twice as long.
        writes: whether it writes JSON lines to `{out}/NAME.jsonl`.
    """

    name: str
    command: str
    seconds: int
    writes: bool = True


@dataclass(frozen=True)
class Step:
    """Parts that answer one question.

    Attributes:
        question: what is asked.
        parts: most telling first.
    """

    question: str
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> int:
        """How long it should take."""
        return sum(part.seconds for part in self.parts)


GPU = {
    "device": "cuda:0",
    "compile": "cudagraphs",
    "few": "",
    "memory": "16,24,40,80",
    "batch": "128",
    "large": "256",
    "small": "8",
    "table": "",
    "lines": "0,12,23",
    "static": ",transformers-static",
}
DRY = {
    "device": "cpu",
    "compile": "none",
    "few": "--small",
    "memory": "0.02,0.03",
    "batch": "2",
    "large": "2",
    "small": "1",
    "table": "--batch-sizes 1",
    "lines": "0,1",
    "static": "",
}
"""What stands for the words in braces. Transformers' compiled loop has no place on a CPU: it takes minutes."""

BENCH = (
    "arkv bench --random-weights --dtype bfloat16 --device {device} --compile {compile} --json {json} --quiet"
)


def _script(name: str, file: str, seconds: int, *more: str) -> Part:
    command = " ".join([file, "--json {json} --device {device} {few}", *more])
    return Part(name, command, seconds)


def _bench(name: str, asked: str, seconds: int) -> Part:
    return Part(name, f"{BENCH} {asked}", seconds)


STEPS = (
    Step(
        "Do the kernels compute what they should, and does every compile mode draw the same picture?",
        (_script("smoke", "smoke.py", 90),),
    ),
    Step(
        "Do the tests that need a GPU pass?",
        (Part("tests", "pytest -q -m gpu -p no:cacheprovider -n 0 tests", 300, writes=False),),
    ),
    Step(
        "How near do the kernels alone come to the speed of the memory?",
        (_script("attention", "attention.py", 180),),
    ),
    Step(
        "How fast are the two models that the targets are set for, and how near to the roofline?",
        (
            _bench(
                "janus",
                "--model janus-pro-1b --policies linear,full --ratios 1/6 --batch-sizes {batch} --lines {lines} --repeats 2",
                100,
            ),
            _bench(
                "llamagen",
                "--model llamagen-xl-384 --policies linear,full --ratios 1/6 --batch-sizes {large} --lines {lines} "
                "--repeats 2",
                120,
            ),
            _bench(
                "janus-transformers",
                "--model janus-pro-1b --policies full,transformers-dynamic{static} --batch-sizes {batch} --lines {lines} "
                "--repeats 1",
                180,
            ),
            _bench(
                "one-picture",
                "--model janus-pro-1b --policies linear,full --ratios 1/6 --batch-sizes 1 --lines {lines} --repeats 2",
                60,
            ),
        ),
    ),
    Step(
        "What do eight bits, equal memory and a large grid bring?",
        (
            _bench(
                "int8",
                "--model janus-pro-1b --policies linear,full --ratios 1/6 --batch-sizes {batch} --lines {lines} --repeats 1 "
                "--kv-dtype int8",
                90,
            ),
            _bench(
                "equal-memory",
                "--model janus-pro-1b --policies full,linear --ratios 1/6 --memory {memory} --lines {lines} --repeats 1",
                240,
            ),
            _bench(
                "grid-64",
                "--model lumina-mgpt-7b-1024 --policies full,linear --ratios 1/8 --batch-sizes {small} --lines {lines} "
                "--repeats 1",
                120,
            ),
        ),
    ),
    Step(
        "How fast are the rows of the papers' tables?",
        (_bench("linear-table", "--preset linear-table {table} --lines {lines} --repeats 1", 480),),
    ),
    Step(
        "Where does the time of a step go, and is memory what was estimated?",
        (
            Part(
                "profile",
                "../profile_step.py --device {device} --compile {compile} --batch-size {batch} --json {json}",
                90,
            ),
            _script("peak", "memory.py", 150),
        ),
    ),
    Step(
        "Can files be made while the next pictures are decoded, and does memory stay where it is?",
        (
            _script("overlap", "overlap.py", 180),
            _script("calls", "memory.py", 120, "--calls"),
        ),
    ),
)
