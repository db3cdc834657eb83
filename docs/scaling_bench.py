"""What the engines of `arkv run` cost beside a bare loop: prints the table of docs/scaling.md.

python docs/scaling_bench.py --pictures 2000 --engines in-process:1,torchrun:1,torchrun:2,ray:1,ray:2
"""

import argparse
import json
import os
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import torch

import arkv
from arkv.bulk import Description, run
from arkv.jobs.recipe import Recipe

RECIPE = Recipe(model="scenes", policy="linear:ratio=1/6", dtype="bfloat16", compile="inductor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--engines", default="in-process:1,torchrun:1,torchrun:2")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        prompts = Path(place) / "prompts.txt"
        texts = arkv.load_model("scenes").example_prompts(asked.pictures, seed=0)
        prompts.write_text("".join(f"{text}\n" for text in texts))
        described = Description(
            prompts=str(prompts), out=f"{place}/bare", recipe=RECIPE, batch_size=asked.batch_size
        )
        facts = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {datetime.now():%Y-%m-%d}"
        print(f"{asked.pictures} pictures in batches of {asked.batch_size}, {facts}")
        print("engine      workers ms a picture of bare not decoding  all, s MB, 1st half    2nd", flush=True)
        baseline, decoding = bare(described)
        print(f"{'bare loop':11} {1:7} {1e3 * baseline:12.2f} {1:7.3f} {1 - decoding:12.1%}", flush=True)
        for engine, _, workers in (each.partition(":") for each in asked.engines.split(",")):
            changes = {"engine": engine, "workers": int(workers), "out": f"{place}/{engine}{workers}"}
            begun = time.perf_counter()
            run(Description.from_values({**described.values(), **changes}))
            total = time.perf_counter() - begun
            each, decoding, halves = steady(Path(changes["out"]), int(workers))
            memory = " ".join(f"{half / 1e6:{width}.0f}" for half, width in zip(halves, (12, 6), strict=True))
            shares = f"{each / baseline:7.3f} {1 - decoding:12.1%}"
            print(f"{engine:11} {workers:>7} {1e3 * each:12.2f} {shares} {total:7.1f} {memory}", flush=True)


def bare(described: Description) -> tuple[float, float]:
    """Seconds a picture of a loop without index, log or resuming, and the share of them that is decoding.

    Counted from the end of the first batch, which compiles.
    """
    job, decoder = described.job(), described.recipe.load_decoder()
    sampling, folder = described.recipe.sampling(decoder.model), Path(described.out)
    folder.mkdir()
    first, *rest = job.units(int(described.batch_size))
    begun = decoding = 0.0
    for unit in (first, *rest):
        numbers = [number for file in unit for number in file.pictures]
        result = decoder.generate(
            [job.prompt(number).prompt for number in numbers],
            seeds=[job.picture_seed(number) for number in numbers],
            **sampling,
        )
        for file, image in zip(unit, result.images, strict=True):
            image.save(folder / file.file)
        decoding += result.stats.seconds
        if unit is first:
            begun, decoding = time.perf_counter(), 0.0
    seconds = time.perf_counter() - begun
    return seconds / sum(len(unit) for unit in rest), decoding / seconds


def steady(out: Path, workers: int) -> tuple[float, float, tuple[float, float]]:
    """The same of a run, from the end of the last worker's first batch; and memory in both halves of it."""
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    batches = [event for event in events if event["event"] == "batch"]
    firsts = {event["worker"]: event["time"] for event in reversed(batches)}
    start, (end,) = max(firsts.values()), (event["time"] for event in events if event["event"] == "end")
    later = [event for event in batches if event["time"] > start]
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    memory = [event["memory"] for event in later]
    halves = memory[: len(memory) // 2], memory[len(memory) // 2 :]
    decoding = sum(event["seconds"] for event in later) / workers
    pictures = sum(event["pictures"] for event in later)
    return seconds / pictures, decoding / seconds, (median(halves[0]), median(halves[1]))


if __name__ == "__main__":
    main()
