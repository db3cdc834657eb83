"""Kernels alone: what share of the memory's speed attention over slots reaches."""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Inputs, published, seconds_of
from rows import Rows, parser

from arkv.speed.roofline import copy_bandwidth


def main() -> None:
    asked = parser(__doc__).parse_args()
    rows, device = Rows(asked.json), asked.device
    layers = 1 if asked.small else 4
    with torch.inference_mode():
        bandwidth = copy_bandwidth(device, 2**20 if asked.small else None)
        for batch in (2, 8) if asked.small else (256, 64, 512, 8, 2):
            for case in published(batch):
                if rows.have(kind="attention", name=case.name, rows=case.rows):
                    continue
                smaller = replace(case, capacity=20) if asked.small else case
                try:
                    inputs = Inputs(smaller, device, layers)

                    def work(inputs: Inputs = inputs) -> None:
                        for layer in range(layers):
                            inputs.attend(layer)

                    seconds = seconds_of(work, device) / layers
                except Exception as error:  # the others are worth knowing all the same
                    told = f"{type(error).__name__}: {error}"[:300]
                    rows.add(kind="attention", name=case.name, rows=case.rows, error=told)
                    continue
                rows.add(
                    kind="attention",
                    name=case.name,
                    rows=case.rows,
                    slots=case.kv_heads * case.capacity,
                    microseconds=1e6 * seconds,
                    bytes=inputs.nbytes,
                    share=inputs.nbytes / seconds / bandwidth,
                )


if __name__ == "__main__":
    main()
