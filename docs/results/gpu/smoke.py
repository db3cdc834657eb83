"""Do kernels compute what the plain functions do, and does every compile mode draw the same picture?"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from cases import Inputs, published
from rows import Rows, parser

import arkv
from arkv.machine.description import describe_machine
from arkv.speed.roofline import copy_bandwidth
from arkv.testing.tiny import Tiny

CLOSE = 0.01  # of outputs in bfloat16, against sums in float32
POLICIES = ("linear:ratio=1/2,anchors=1", "full", "adakv:ratio=1/4")


def main() -> int:
    asked = parser(__doc__).parse_args()
    rows, device, bad = Rows(asked.json), asked.device, []

    @contextmanager
    def reported(kind: str, name: str) -> Iterator[dict[str, object]]:
        """A row whatever happens: what fails does not keep the rest from being tried."""
        row: dict[str, object] = {}
        begun = time.perf_counter()
        try:
            yield row
        except Exception as error:
            row |= {"good": False, "error": f"{type(error).__name__}: {error}"[:500]}
        rows.add(kind=kind, name=name, **row, seconds=time.perf_counter() - begun)
        if not row["good"]:
            bad.append(f"{kind} {name}")

    with torch.inference_mode():
        with reported("machine", str(device)) as row:
            row |= describe_machine(device) | {"copy_bytes_per_s": copy_bandwidth(device), "good": True}
            if device.type == "cuda":
                properties = torch.cuda.get_device_properties(device)
                row |= {"processors": properties.multi_processor_count, "bytes": properties.total_memory}
        for case in published(8 if asked.small else 256):
            with reported("attention", case.name) as row:
                inputs = Inputs(replace(case, capacity=20) if asked.small else case, device, 1)
                error, mass_error = inputs.errors()
                first, again = (inputs.attend(0).output.clone() for _ in range(2))
                same = torch.equal(first, again)
                good = error < CLOSE and (mass_error is None or mass_error < CLOSE) and same
                row |= {"error": error, "mass_error": mass_error, "same_bits": same, "good": good}
        modes = ("none", "inductor", "cudagraphs") if device.type == "cuda" else ("none", "inductor")
        for policy in POLICIES[: 1 if asked.small else None]:
            drawn: dict[str, torch.Tensor] = {}
            for mode in modes:
                with reported("picture", f"{policy} {mode}") as row:
                    model = Tiny() if asked.small else arkv.load_model("scenes", device=device)
                    decoder = arkv.Decoder(model, arkv.load_policy(policy), compile=mode)
                    prompts = model.example_prompts(1, 0)
                    first = decoder.generate(prompts, pixels=False).tokens
                    drawn[mode] = decoder.generate(prompts, pixels=False).tokens  # a graph, replayed
                    repeats = torch.equal(first, drawn[mode])
                    alike = float((drawn[mode] == drawn["none"]).float().mean())
                    row |= {"repeats": repeats, "like_eager": alike, "good": repeats and alike == 1}
    print("all is well" if not bad else f"bad: {', '.join(bad)}")
    return min(len(bad), 1)


if __name__ == "__main__":
    sys.exit(main())
