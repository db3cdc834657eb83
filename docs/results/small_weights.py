"""Weights in eight and four bits: what they change, how fast they are, and what loading them takes.

python docs/results/small_weights.py kl                                    # divergence of the logits, in nats
python docs/results/small_weights.py step --model janus-pro-1b             # milliseconds of a step, by rows
python docs/results/small_weights.py load --model janus-pro-1b --weights int4   # peak of memory, from a file
python docs/results/small_weights.py pictures --out docs/results     # pictures of `scenes` that are right

Tables in Markdown. `--json` adds the rows to a file as well.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import arkv
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.estimate import format_bytes
from arkv.machine.instruments import Clock, PeakMemory
from arkv.models.emu3 import Emu3
from arkv.models.emu3_checkpoint import EMU3_GEN
from arkv.models.emu35 import Emu35
from arkv.models.emu35_checkpoint import EMU35_IMAGE
from arkv.models.janus import JANUS_PRO_1B, JanusPro
from arkv.models.llamagen import VARIANTS, LlamaGen
from arkv.models.lumina import LUMINA_7B_768, LuminaMGPT
from arkv.models.lumina2 import LuminaMGPT2
from arkv.models.lumina2_checkpoint import LUMINA_2
from arkv.models.pretrained import Part, load, slots_of
from arkv.registry import load_class
from arkv.speed.engine import PolicyEngine
from arkv.speed.roofline import copy_bandwidth, weight_bytes
from arkv.study import Settings, compare_policies
from arkv.study.pairs import pair
from arkv.weights.checkpoint import draw_weights_
from arkv.weights.packing import pack_
from arkv.weights.quantization import WeightDtype
from arkv.weights.quantized import layers, quantize_

KINDS: tuple[WeightDtype, ...] = ("int8", "int4")
ROWS = (1, 2, 8, 64)
PROMPTS = 500
WARM, LINES = 2, 2  # the second line is captured
WIDTH, HEADS, SIDE, PICTURES = 256, 4, 8, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("kl", "step", "load", "pictures"))
    parser.add_argument("--model", default="janus-pro-1b")
    parser.add_argument("--weights", default="int4", choices=KINDS)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--compile", default="none", choices=("none", "inductor", "cudagraphs"))
    parser.add_argument("--small", action="store_true", help="few rows, as a dry run needs them")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for outcomes by prompt")
    parser.add_argument("--json", type=Path, help="JSON lines, added to")
    asked = parser.parse_args()
    measured = {"kl": divergences, "step": steps, "load": peaks, "pictures": pictures}[asked.what]
    with torch.inference_mode():
        rows = list(measured(asked))
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")
    if asked.json is not None:
        with asked.json.open("a") as file:
            file.writelines(json.dumps({"kind": f"weights-{asked.what}", **row}) + "\n" for row in rows)


def divergences(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """KL of the next token given the same tokens before it: mean and 99th percentile over all steps."""
    for name, model in _tiny_families():
        prompts = model.example_prompts(PICTURES, 0)
        plain = arkv.Decoder(model, "full")
        tokens = plain.generate(prompts, seed=0, pixels=False).tokens
        logits = plain.teacher_force(prompts, tokens).raw
        for kind in KINDS:
            small = copy.deepcopy(model)
            quantize_(small, kind)
            exact = copy.deepcopy(small)
            for path, layer in [*layers(exact)]:
                linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
                linear.weight = torch.nn.Parameter(layer.dequantized())
                parent, _, leaf = path.rpartition(".")
                setattr(exact.get_submodule(parent), leaf, linear)
            pack_(small)
            found, reference = (
                arkv.Decoder(m, "full").teacher_force(prompts, tokens).raw for m in (small, exact)
            )
            nats = _kl(logits, found)
            yield {
                "model": name,
                "weights": kind,
                "KL to plain weights, mean": float(nats.mean()),
                "99th percentile": float(nats.quantile(0.99)),
                "KL to the weights that the codes stand for": float(_kl(reference, found).mean()),
            }


def _tiny_families() -> Iterator[tuple[str, arkv.Model]]:
    """`scenes` as it was trained, and every other family in two narrow layers with random weights."""
    yield "scenes", arkv.load_model("scenes")
    llamagen = next(one for one in VARIANTS if one.name == "llamagen-b-256")
    families: list[tuple[Callable[[Any], arkv.Model], Any]] = [
        (JanusPro, replace(JANUS_PRO_1B, side=SIDE)),
        (LlamaGen, llamagen),
        (LuminaMGPT, replace(LUMINA_7B_768, target=16 * SIDE)),
        (LuminaMGPT2, replace(LUMINA_2, target=8 * SIDE)),
        (Emu3, replace(EMU3_GEN, area=(8 * SIDE) ** 2)),
        (Emu35, replace(EMU35_IMAGE, sizes=((16 * SIDE, 16 * SIDE),))),
    ]
    for family, variant in families:
        real = variant.transformer
        shape = replace(
            real,
            layers=2,
            width=WIDTH,
            heads=HEADS,
            kv_heads=max(1, HEADS * real.kv_heads // real.heads),
            head_dim=WIDTH // HEADS,
            hidden=2 * WIDTH,
        )
        # No picture is drawn.
        decoder = replace(variant.vq, channels=32, blocks=1)
        model = family(replace(variant, transformer=shape, vq=decoder)).eval()  # type: ignore[attr-defined]
        draw_weights_(model, 0)
        yield f"{variant.name}, 2 layers of width {WIDTH}", model


def _kl(reference: Tensor, other: Tensor) -> Tensor:
    """Of tokens that may stand there, in nats, of every step."""
    p, q = (logits.flatten(0, -2).log_softmax(-1) for logits in (reference, other))
    return torch.where(p.isfinite(), p.exp() * (p - q), 0.0).sum(-1)


def pictures(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Shares of 500 prompts that are met, and differences from plain weights picture by picture.

    What a file of the folder has is not drawn again.
    """
    plain = None
    for kind in (None, *KINDS):
        model = arkv.load_model("scenes", dtype="bfloat16", weights=kind)
        settings = Settings(PROMPTS, 0, 50, model.spec.guidance, compile="inductor")
        name = kind or "bfloat16"
        out = asked.out / f"weights-{name}.jsonl"
        loading = {"loading": kind and {"weights": kind}}  # as `arkv eval` notes it
        row = compare_policies(model, ["full"], settings=settings, out=out, shared=loading).rows["full"]
        plain = plain or row
        beside, right = pair(plain, row), row.accuracy
        assert right is not None
        yield {
            "weights": name,
            "right": _percent(right.share, right.low, right.high),
            "less plain, in pairs": _percent(beside.difference, beside.low, beside.high),
            "right with plain weights only": beside.first_only,
            "right with these only": beside.second_only,
        }


def _percent(share: float, low: float, high: float) -> str:
    return f"{share:.1%} [{low:.1%}, {high:.1%}]"


def steps(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A step in the first lines of a picture, where weights are nearly all that is read."""
    bandwidth = copy_bandwidth(asked.device)
    for kind in (None, *KINDS):
        model = arkv.load_model(
            asked.model, random_weights=True, dtype="bfloat16", device=asked.device, weights=kind
        )
        size = weight_bytes(model)
        for rows in ROWS[:2] if asked.small else ROWS:
            engine = PolicyEngine(
                model, arkv.load_policy("streaming", ratio="1/6"), asked.compile, guided=False
            )
            condition = model.condition(model.example_prompts(rows, seed=0), guided=False)
            engine.begin(condition, seed_keys(range(rows)).to(model.device), Sampling(1.0))
            line, clock = model.spec.grid.line, Clock(asked.device)
            for number in range(WARM + LINES):
                if number >= WARM:
                    clock.mark()
                engine.decode(range(number * line, (number + 1) * line))
            clock.mark()
            seconds = median(clock.seconds()) / line
            yield {
                "model": asked.model,
                "weights": kind or "bfloat16",
                "rows": rows,
                "ms a step": seconds * 1e3,
                "weights read, MB": size / 1e6,
                "of the speed of the memory": size / bandwidth / seconds,
            }
            engine.release()
        del model


def peaks(asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Memory of a process at its highest while a file in bfloat16 is loaded, and of the weights in it."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(1, get_context("spawn")) as pool:
        files = _write(arkv.load_model(asked.model, random_weights=True, device="meta"), Path(folder))
        # In a process that has written nothing, whose memory would be used again.
        size, rise = pool.submit(_loaded, asked.model, files, asked.weights, asked.device).result()
        yield {
            "model": asked.model,
            "weights": asked.weights,
            "file": format_bytes(sum(file.stat().st_size for file in files)),
            "in memory": format_bytes(size),
            "peak": "unknown" if rise is None else format_bytes(rise),
            "peak / in memory": float("nan") if rise is None else rise / size,
        }


def _loaded(name: str, files: list[Path], weights: Any, device: torch.device) -> tuple[int, int | None]:
    """Bytes of a model's weights, and of all that was taken at once while they were loaded."""
    family = load_class("model", name)

    def build() -> Any:
        return family(family.variant)

    load(build, torch.bfloat16, "meta", lambda module: [], weights)  # what is imported on the way
    gauge = PeakMemory(device)
    model = load(build, torch.bfloat16, device, lambda module: [Part(slots_of(module), files)], weights)
    pack_(model)
    return sum(p.nbytes for p in model.parameters()), gauge.rise()


def _write(shape: arkv.Model, folder: Path) -> list[Path]:
    """The weights of a model, by our own names, in files of about a gigabyte."""
    files: list[Path] = []
    part: dict[str, Tensor] = {}
    names = [*slots_of(shape).items()]
    for number, (name, slot) in enumerate(names, 1):
        part[name] = torch.randn(slot.wanted, dtype=torch.bfloat16) * 0.02
        if number == len(names) or sum(tensor.nbytes for tensor in part.values()) > 1e9:
            files.append(folder / f"{len(files)}.safetensors")
            save_file(part, files[-1])
            part = {}
    return files


if __name__ == "__main__":
    main()
