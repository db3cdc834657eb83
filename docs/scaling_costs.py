"""What a picture costs beside its GPU, and how far that reaches: prints the tables of docs/scaling.md.

python docs/scaling_costs.py --pictures 512 --rates 5.2,50
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy
import torch

import arkv
from arkv.bulk import Description
from arkv.bulk.index import Made
from arkv.bulk.prepared import Prepared, prepare
from arkv.bulk.verification import verify
from arkv.bulk.worker import Drawn, develop
from arkv.jobs.recipe import Recipe

SIDE = 384
"""Pixels of Janus-Pro's and LlamaGen's pictures."""

GPUS = (1, 8, 64, 256, 1024)

CAPTIONS, CAPTION_TOKENS = 16, 20
FLAN_T5_XL = {
    "d_model": 2048,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
}

Result = TypeVar("Result")


class Noise:
    """Draws random pixels: no PNG file is larger, or takes longer."""

    def pixels(self, tokens: torch.Tensor) -> torch.Tensor:
        """uint8 `[pictures, SIDE, SIDE, 3]`."""
        return torch.randint(256, (len(tokens), SIDE, SIDE, 3), dtype=torch.uint8)


class Sender:
    """A Ray actor that hands over files as fast as they are taken.

    Args:
        pictures: in a unit.
        size: of each, bytes.
    """

    def __init__(self, pictures: int, size: int) -> None:
        self._batch = {"content": [numpy.random.default_rng(0).bytes(size)] * pictures}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The files of a unit."""
        return self._batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rates", default="5.2,50", help="pictures a second of a GPU")
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    facts = f"{cores} cores, {datetime.now():%Y-%m-%d}"
    print(f"{asked.pictures} pictures of {SIDE} x {SIDE} random pixels, {facts}")
    print("\n                                ms a picture   pictures/s")
    with tempfile.TemporaryDirectory(dir=".") as place:
        prompts = Path(place) / "prompts.txt"
        model = arkv.load_model("scenes")
        texts = model.example_prompts(asked.pictures, seed=0)
        prompts.write_text("".join(f"{text}\n" for text in texts))
        making, writing = {}, {}
        for layout in ("flat", "webdataset"):
            out, recipe = f"{place}/{layout}", Recipe(model="scenes", policy="full")
            described = Description(
                prompts=str(prompts), out=out, recipe=recipe, layout=layout, batch_size=asked.batch_size
            )
            prepared = prepare(described, described.job(), model)
            made, making[layout] = timed(f"{layout}: PNG and SHA-256", asked.pictures, make(prepared))
            folder = prepared.folder()
            written = partial(list, map(folder.write, made))
            _, writing[layout] = timed(f"{layout}: writing", asked.pictures, written)
            timed(f"{layout}: hashes compared", asked.pictures, partial(verify, folder, prepared.texts))
            timed(f"{layout}: index read", asked.pictures, prepared.folder)
            lines = (prepared.out / "index.jsonl").stat().st_size
            print(f"{layout + ': index':30} {lines / asked.pictures:13.0f} bytes")
        size = sum(len(each.content or b"") for unit in made for each in unit) // asked.pictures
        _, sending = timed("Ray: worker to driver", asked.pictures, by_ray(asked, size))
    encoding()
    most = 1 / (writing["flat"] + sending), 1 / (writing["webdataset"] + sending)
    for rate in map(float, asked.rates.split(",")):
        busy = rate * making["flat"] * cores
        print(f"\n{rate:g} pictures/s a GPU, whose files of {size / 1e3:.0f} kB take {busy:.2f} cores")
        print("GPUs  pictures/s  storage, MB/s  by Ray: flat  webdataset")
        for gpus in GPUS:
            drawn = gpus * rate
            flat, archives = (min(drawn, bound) for bound in most)
            print(f"{gpus:4} {drawn:11,.0f} {drawn * size / 1e6:14,.0f} {flat:13,.0f} {archives:11,.0f}")


def encoding() -> None:
    """What LlamaGen's text encoder takes beside a picture's tokens, both with random weights."""
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        empty = T5EncoderModel(T5Config(**FLAN_T5_XL)).to(torch.bfloat16)
    encoder = empty.to_empty(device="cpu").eval()
    for weight in encoder.parameters():
        torch.nn.init.normal_(weight, std=0.02)
    ids = torch.randint(32_000, (CAPTIONS, CAPTION_TOKENS))
    model = arkv.load_model("llamagen-t2i-xl-256", random_weights=True, dtype=torch.bfloat16)
    decoder = arkv.Decoder(model, arkv.load_policy("linear:ratio=1/6"))
    states = list(torch.randn(CAPTIONS, CAPTION_TOKENS, encoder.config.d_model))
    with torch.inference_mode():
        encoder(ids)
        timed("LlamaGen: a caption's T5 states", CAPTIONS, lambda: encoder(ids))
    timed("LlamaGen: decoding, 256 tokens", CAPTIONS, lambda: decoder.generate(states, pixels=False))


def timed(name: str, pictures: int, work: Callable[[], Result]) -> tuple[Result, float]:
    """What some work returns, and its seconds a picture, which are printed."""
    begun = time.perf_counter()
    result = work()
    seconds = (time.perf_counter() - begun) / pictures
    print(f"{name:30} {1e3 * seconds:13.3f} {1 / seconds:12,.0f}", flush=True)
    return result, seconds


def make(prepared: Prepared) -> Callable[[], list[list[Made]]]:
    """Makes the files of all units."""
    tokens, model = torch.zeros(prepared.tokens, dtype=torch.long), Noise()

    def work() -> list[list[Made]]:
        return [
            develop(
                model,  # type: ignore[arg-type]  # nothing but its pixels is asked for
                prepared.job,
                prepared.texts,
                unit,
                Drawn({number: tokens for file in unit for number in file.pictures}, {}),
            )
            for unit in prepared.units
        ]

    return work


def by_ray(asked: argparse.Namespace, size: int) -> Callable[[], None]:
    """Moves as many files from an actor to this process, once the actor is there."""
    import ray

    ray.init(address="local", log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    count = asked.pictures // asked.batch_size
    units = ray.data.from_items(
        [{"unit": number} for number in range(count + 1)], override_num_blocks=count + 1
    )
    sent = units.map_batches(
        Sender,
        fn_constructor_args=(asked.batch_size, size),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=1,
    )
    batches = iter(sent.iter_batches(batch_size=None))
    next(batches)

    def work() -> None:
        for batch in batches:
            for content in batch["content"]:
                assert len(content) == size
        ray.shutdown()

    return work


if __name__ == "__main__":
    main()
