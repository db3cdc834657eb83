"""What a GPU is asked, most telling first: steps of eight minutes at the most, of parts that stand alone.

A part is a command. `{device}`, `{compile}` and the like differ between a GPU and a dry run on a CPU;
everything else is the same, so that nothing but the machine can make a part fail that has passed dry.
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
    "tall": "0,32,63",
    "uncaptured": "inductor",
    "static": ",transformers-static",
}
DRY = {
    "device": "cpu",
    "compile": "none",
    "few": "--small",
    "memory": "0.016,0.02",
    "batch": "2",
    "large": "2",
    "small": "1",
    "table": "--batch-sizes 1",
    "lines": "0,1",
    "tall": "0,63",
    "uncaptured": "none",
    "static": "",
}
"""What stands for the words in braces. Transformers' compiled loop would take minutes on a CPU."""


def _script(name: str, seconds: int, file: str, *more: str) -> Part:
    return Part(name, " ".join([file, "--json {json} --device {device} {few}", *more]), seconds)


def _bench(name: str, seconds: int, asked: str, repeats: int = 1, lines: str = "{lines}") -> Part:
    machine = "--random-weights --dtype bfloat16 --device {device} --compile {compile}"
    timed = f"--lines {lines} --repeats {repeats} --json {{json}} --quiet"
    return Part(name, f"arkv bench {machine} {asked} {timed}", seconds)


JANUS = "--model janus-pro-1b --policies"

STEPS = (
    Step(
        "Do the kernels compute what they should, and does every compile mode draw the same picture?",
        (_script("smoke", 90, "smoke.py"),),
    ),
    Step(
        "Do the tests that need a GPU pass?",
        (Part("tests", "pytest -q -m gpu -p no:cacheprovider -n 0 tests", 300, writes=False),),
    ),
    Step(
        "How near do the kernels alone come to the speed of the memory?",
        (_script("attention", 180, "attention.py"),),
    ),
    Step(
        "How fast are the two models that the targets are set for, and how near to the roofline?",
        (
            _bench("janus", 100, f"{JANUS} linear,full --batch-sizes {{batch}}", repeats=2),
            _bench(
                "llamagen",
                120,
                "--model llamagen-xl-384 --policies linear,full --batch-sizes {large}",
                repeats=2,
            ),
            _bench("one-picture", 60, f"{JANUS} linear,full --batch-sizes 1", repeats=2),
            _bench("uncaptured", 60, f"{JANUS} linear --batch-sizes 1 --compile {{uncaptured}}", repeats=2),
        ),
    ),
    Step(
        "How fast is transformers' own loop?",
        (
            _bench(
                "transformers", 240, f"{JANUS} full,transformers-dynamic{{static}} --batch-sizes {{batch}}"
            ),
        ),
    ),
    Step(
        "What do eight bits, equal memory and large grids bring?",
        (
            _bench("int8", 90, f"{JANUS} linear,full --batch-sizes {{batch}} --kv-dtype int8"),
            _bench("equal-memory", 210, f"{JANUS} full,linear --memory {{memory}}"),
            _bench(
                "grid-64",
                120,
                "--model lumina-mgpt-7b-1024 --policies full,linear --ratios 1/8 --batch-sizes {small}",
                lines="{tall}",
            ),
            _bench(
                "grid-90",
                60,
                "--model emu3-gen --weights int4 --policies full,linear --ratios 1/8 --batch-sizes 1",
                lines="{tall}",
            ),
        ),
    ),
    Step(
        "Where does the time of a step go, and is memory what was estimated?",
        (
            Part(
                "profile",
                "../profile_step.py --device {device} --compile {compile} --batch-size {batch} --json {json}",
                90,
            ),
            _script("peak", 150, "memory.py"),
            _script("small-weights", 120, "../small_weights.py", "step --compile {compile}"),
        ),
    ),
    Step(
        "Can files be made while the next pictures are decoded, and does memory stay where it is?",
        (
            _script("overlap", 180, "overlap.py"),
            _script("calls", 120, "memory.py", "--calls"),
        ),
    ),
    Step(
        "How fast are the rows of the papers' tables?",
        (_bench("linear-table", 480, "--preset linear-table {table}"),),
    ),
)
