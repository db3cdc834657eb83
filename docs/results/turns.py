"""Measures steps in turns, alone and beside busy processes: tables of docs/results/speed.md.

python docs/results/turns.py --policies full,linear:ratio=1/6
python docs/results/turns.py --compile none,inductor
python docs/results/turns.py --models janus-pro-1b:32,scenes:1,scenes:16 --busy 1

Steps from the middle of a picture on, in bfloat16 and with guidance. Every contender has one turn, then the
next round begins; a turn beside busy processes, which only count, follows each turn alone. There, a turn
begins with a second that is not counted, in which a loop sees how busy the machine is. Milliseconds, medians
of rounds. How threads wait is for the environment to say: OMP_NUM_THREADS, OMP_WAIT_POLICY, GOMP_SPINCOUNT.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from statistics import median
from typing import Any

import torch

import arkv
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.machine.description import describe_machine
from arkv.speed.engine import PolicyEngine

SETTLE = 1.2
"""Seconds before what is counted, where there are busy processes."""
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


class Contender:
    """An engine in the middle of a picture; what it compiles is compiled."""

    def __init__(self, model: arkv.Model, pictures: int, policy: str, compile: Any) -> None:
        self.engine = PolicyEngine(model, arkv.load_policy(policy), compile, guided=True)
        grid, self.line = model.spec.grid, model.spec.grid.line
        self.middle, self.stop = grid.rows // 2 * self.line, (grid.rows - 1) * self.line
        condition = model.condition(model.example_prompts(pictures, seed=0), guided=True)
        sampling = Sampling(model.spec.guidance, top_k=model.spec.top_k or None)
        self.batch = (condition, seed_keys(range(pictures)), sampling)
        self.begin()
        self.turn(self.line)

    def begin(self) -> None:
        """A batch that has come to the middle."""
        self.engine.begin(*self.batch)
        self.engine.skip(self.middle)
        self.next = self.middle

    def settle(self) -> None:
        """Steps that are not counted."""
        end = time.perf_counter() + SETTLE
        while time.perf_counter() < end:
            self.turn(1)

    def turn(self, steps: int) -> float:
        """Milliseconds of a step; at the last line another batch begins."""
        if self.next + steps > self.stop:
            self.begin()
        start = time.perf_counter()
        self.engine.decode(range(self.next, self.next + steps))
        self.next += steps
        return (time.perf_counter() - start) / steps * 1e3


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Within, as many processes compute and never wait."""
    started = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def batches(text: str) -> list[tuple[str, int]]:
    """Names of models and sizes of batches; argparse says in one line what is no number."""
    parts = [each.partition(":") for each in text.split(",")]
    return [(name, int(pictures)) for name, _, pictures in parts]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", type=batches, default="janus-pro-1b:32", help="name:pictures")
    parser.add_argument("--policies", default="linear:ratio=1/6")
    parser.add_argument("--compile", default="inductor")
    parser.add_argument("--busy", type=int, default=0, help="processes")
    parser.add_argument("--steps", type=int, default=12, help="of a turn, at most a line")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    machine = describe_machine(torch.device("cpu"))
    told = [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    threads = f"{torch.get_num_threads()} threads"
    print(machine["cpu"], f"torch {torch.__version__}", threads, *told, sep=", ")
    beside = [f"beside {asked.busy} busy", "times"] if asked.busy else []
    print("|", " | ".join(["model", "pictures", "policy", "compile", "ms a step", *beside]), "|")
    print("|---|--:|---|---|--:|", "--:|" * len(beside), sep="")
    for name, pictures in asked.models:
        model = arkv.load_model(name, dtype="bfloat16", random_weights=name != "scenes")
        contenders = {
            (policy, compile): Contender(model, pictures, policy, compile)
            for policy, compile in product(asked.policies.split(","), asked.compile.split(","))
        }
        beside_so_many = [0, asked.busy] if asked.busy else [0]
        times: dict[tuple[tuple[str, str], int], list[float]] = {
            key: [] for key in product(contenders, beside_so_many)
        }
        for _ in range(asked.rounds):
            for which, processes in times:
                contender = contenders[which]
                with busy(processes):
                    if asked.busy:
                        contender.settle()
                    times[which, processes].append(contender.turn(asked.steps))
        for which in contenders:
            alone, crowded = times[which, 0], times[which, asked.busy]
            cells = [name, str(pictures), f"`{which[0]}`", which[1], f"{median(alone):.1f}"]
            if asked.busy:
                longer = median(b / a for a, b in zip(alone, crowded, strict=True))
                cells += [f"{median(crowded):.1f}", f"{longer:.2f}"]
            print("|", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
