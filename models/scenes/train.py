"""Train `scenes` from nothing: `python -m arkv.models.scenes.train --out runs/scenes`.

Every picture is drawn fresh and seen once; products are in bfloat16 where the device has units for it.
Matrices inside the blocks are trained by Muon
(kellerjordan.github.io/posts/muon), the rest by AdamW; the rate is constant after a short warm-up and
falls linearly to zero over the last part of the run.

To count, and to know which colour belongs to which shape, is the hard part of these pictures, and the
drawing code knows the answer. So the network learns, beside the next code and at every place, how many
objects of every kind have yet to begin. That head is dropped from the exported weights.

A run is a function of its arguments. It saves its whole state, so the same command goes on where it was
stopped; a larger `--pictures` prolongs the constant part, a smaller one begins the fall earlier. `--init`
starts a new run from exported weights, of which the optimizers' state is not a part; take another
`--seed` then, for other pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from arkv.errors import ArkvError, NumericalError
from arkv.models.scenes.adapter import Scenes, word_ids
from arkv.models.scenes.codebook import PATCH, Codebook
from arkv.models.scenes.drawing import Scene, draw, sample_picture, sample_scene
from arkv.models.scenes.grammar import COLORS, GROUPS, SHAPES, encode_prompt, sample_prompt
from arkv.models.transformer import TransformerConfig
from arkv.weights.files import read_config

# More of what is hard to learn: numbers and relations.
GROUP_SHARES = {
    "single": 0.04,
    "counting": 0.24,
    "two_objects": 0.10,
    "color_attribution": 0.24,
    "position": 0.38,
}
DROPPED_PROMPTS = 0.1  # share of pictures learnt without a prompt, for guidance
WARMUP_STEPS = 200
REMAINING_WEIGHT = 0.05  # of the loss of what has yet to begin, beside the mean loss of a code
KINDS = tuple((color, shape) for color in COLORS for shape in SHAPES)
MOST_OBJECTS = 4
SAVE_SECONDS = 300


def first_cells(scene: Scene, codes: Tensor) -> list[int]:
    """Raster position of the first code of each object, the codes of its picture int64 `[rows, line]`."""
    differs = codes != codes.flatten().mode().values  # the commonest code is the plain background's
    line = codes.shape[1]
    cells = []
    for item in scene.objects:
        # Objects are further apart than a patch is wide, so that no other has a part of this box.
        left, right, top, bottom = (
            int((centre + sign * item.size / 2) // PATCH)
            for centre, sign in ((item.x, -1), (item.x, 1), (item.y, -1), (item.y, 1))
        )
        row, column = differs[top : bottom + 1, left : right + 1].nonzero()[0].tolist()
        cells.append((top + row) * line + left + column)
    return cells


def training_batch(
    codebook: Codebook, size: int, tokens: int, line: int, rng: numpy.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one batch.

    Returns:
        Words int64 `[size, C]`, codes int64 `[size, N]`, and how many objects of each of `KINDS` have yet
        to begin when a code is drawn, int64 `[size, N, kinds]`.
    """
    words, scenes = [], []
    for group in rng.choice(GROUPS, size, p=[GROUP_SHARES[group] for group in GROUPS]):
        prompt = sample_prompt(rng, str(group), held_out=False)
        scenes.append(sample_scene(prompt, rng))
        dropped = rng.random() < DROPPED_PROMPTS
        words.append(word_ids([] if dropped else encode_prompt(prompt.text)))
    codes = codebook.encode(numpy.stack([draw(scene) for scene in scenes]))
    remaining = torch.zeros(size, tokens, len(KINDS), dtype=torch.int64)
    for row, scene in enumerate(scenes):
        for item, begin in zip(scene.objects, first_cells(scene, codes[row].view(-1, line)), strict=True):
            remaining[row, : begin + 1, KINDS.index((item.color, item.shape))] += 1
    return torch.tensor(words), codes, remaining


def rate(step: int, steps: int, cooldown: float) -> float:
    """Share of the full learning rate at `step`: warm-up, constant, linear fall to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (cooldown * steps))


def optimizers(model: Scenes, extra: nn.Module, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    others = [p for p in [*model.parameters(), *extra.parameters()] if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=arguments.muon_rate, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(others, lr=arguments.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is the faster dtype there; a CPU without units for it is ten times slower."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class NoBfloat16(TorchFunctionMode):
    """Makes `Tensor.bfloat16` a copy in the tensor's own dtype: torch's Muon asks for it outright."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0].clone() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


def initialise(model: Scenes) -> None:
    """Normal weights of fan-in scale; zeros for what is first added to a vector that says something."""
    added = ("row_embedding.weight", "column_embedding.weight", "context_embedding.weight")
    for name, weight in model.named_parameters():
        if name in added or ("blocks." in name and name.endswith(("output.weight", "down.weight"))):
            nn.init.zeros_(weight)
        elif "embedding" in name:
            nn.init.normal_(weight, std=0.5)
        elif weight.ndim == 2:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    nn.init.normal_(model.output.weight, std=0.02)


def loss_function(model: Scenes, counter: nn.Linear) -> Callable[..., tuple[Tensor, Tensor]]:
    """Cross-entropy in nats: mean of a code, and mean of all kinds' numbers yet to begin together."""
    mixed = multiplies_bfloat16(model.device)

    def losses(words: Tensor, codes: Tensor, remaining: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(codes.device.type, torch.bfloat16, enabled=mixed):
            hidden = model(words, codes)
            logits, counts = model.output(hidden), counter(hidden)
        code_loss = F.cross_entropy(logits.flatten(0, 1).float(), codes.flatten())
        counts = counts.float().view(-1, MOST_OBJECTS + 1)
        count_loss = len(KINDS) * F.cross_entropy(counts, remaining.flatten())
        return code_loss, count_loss

    return losses


def export(model: Scenes, path: Path, facts: dict[str, object]) -> None:
    """Write the weights in bfloat16 and, beside them, configuration and facts of the run as JSON."""
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    weights["codes"] = model.codes.float()
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in weights.items()}, partial)
    os.replace(partial, path)
    description = {
        "config": asdict(model.transformer.config),
        "codes": len(model.codes),
        "guidance": model.spec.guidance,
    }
    path.with_suffix(".json").write_text(json.dumps(description | facts, indent=2) + "\n")


def train(arguments: argparse.Namespace) -> None:
    """Run, or go on with, the training that the arguments describe."""
    torch.manual_seed(arguments.seed)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    state_path = out / "state.pt"
    state = torch.load(state_path, weights_only=True) if state_path.exists() else None
    # What the weights had learnt from when this run began.
    before: dict[str, float] = {"pictures": 0, "hours": 0.0}
    if state is not None:
        model = Scenes(Codebook(state["model"]["codes"]), TransformerConfig(**state["config"]))
        before = state["before"]
        if (state["batch"], state["seed"]) != (arguments.batch, arguments.seed):
            raise ArkvError(
                f"{out} holds a run with --batch {state['batch']} --seed {state['seed']}: go on with "
                "these, or take another --out"
            )
    elif arguments.init is not None:
        model = Scenes.from_pretrained(arguments.init).train()
        facts_of_init = read_config(arguments.init.with_suffix(".json"))
        before = {name: facts_of_init[name] for name in before}
    else:
        rng = numpy.random.default_rng((arguments.seed, 1 << 40))
        pictures = [sample_picture(str(rng.choice(GROUPS)), rng)[1] for _ in range(6000)]
        model = Scenes(Codebook.fit(numpy.stack(pictures), seed=arguments.seed))
        initialise(model)
    codebook = Codebook(model.codes.cpu())
    counter = nn.Linear(model.spec.width, len(KINDS) * (MOST_OBJECTS + 1))
    step, seen_seconds = 0, 0.0
    model.to(arguments.device)
    counter.to(arguments.device)
    optimisers = optimizers(model, counter, arguments)
    full_rates = [group["lr"] for o in optimisers for group in o.param_groups]
    if state is not None:
        model.load_state_dict(state["model"])
        counter.load_state_dict(state["counter"])
        for optimiser, saved in zip(optimisers, state["optimizers"], strict=True):
            optimiser.load_state_dict(saved)
        step, seen_seconds = state["step"], state["seconds"]
    losses = torch.compile(loss_function(model, counter))

    def save() -> None:
        if not all(p.isfinite().all() for p in model.parameters()):
            raise NumericalError(f"a weight is NaN or infinite at step {step}; the last good state is kept")
        snapshot = {
            "model": model.state_dict(),
            "counter": counter.state_dict(),
            "optimizers": [o.state_dict() for o in optimisers],
            "step": step,
            "config": asdict(model.transformer.config),
            "before": before,
            "batch": arguments.batch,
            "seed": arguments.seed,
            "seconds": seen_seconds,
        }
        torch.save(snapshot, out / "state.partial")
        os.replace(out / "state.partial", state_path)
        facts: dict[str, object] = {
            "pictures": before["pictures"] + step * arguments.batch,
            "seed": arguments.seed,
            "hours": round(before["hours"] + seen_seconds / 3600, 2),
            "torch": torch.__version__,
        }
        export(model, out / "scenes.safetensors", facts)

    steps = arguments.pictures // arguments.batch
    grid = model.spec.grid
    saved_at = time.monotonic()
    log = (out / "log.jsonl").open("a")
    with tqdm(total=steps, initial=step, unit="step", smoothing=0.05) as bar:
        while step < steps:
            started = time.monotonic()
            rng = numpy.random.default_rng((arguments.seed, step))
            batch = training_batch(codebook, arguments.batch, grid.tokens, grid.line, rng)
            code_loss, count_loss = losses(*(x.to(arguments.device) for x in batch))
            (code_loss + REMAINING_WEIGHT * count_loss).backward()
            share = rate(step, steps, arguments.cooldown)
            groups = [group for o in optimisers for group in o.param_groups]
            for group, full in zip(groups, full_rates, strict=True):
                group["lr"] = full * share
            with nullcontext() if multiplies_bfloat16(model.device) else NoBfloat16():
                for optimiser in optimisers:
                    optimiser.step()
                    optimiser.zero_grad()
            step += 1
            seen_seconds += time.monotonic() - started
            bar.update()
            if step % 20 == 0:
                row = {"step": step, "code": code_loss.item(), "count": count_loss.item()}
                log.write(json.dumps(row) + "\n")
                log.flush()
                bar.set_postfix({key: f"{value:.4f}" for key, value in row.items() if key != "step"})
            if time.monotonic() - saved_at > SAVE_SECONDS:
                save()
                saved_at = time.monotonic()
    save()


def main() -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"), help="folder of the run")
    parser.add_argument("--init", type=Path, help="exported weights to start from, a safetensors file")
    parser.add_argument("--pictures", type=int, default=600_000, help="pictures to draw and learn")
    parser.add_argument("--batch", type=int, default=24, help="pictures a step")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of AdamW")
    parser.add_argument("--muon-rate", type=float, default=0.02, help="learning rate of Muon")
    parser.add_argument("--cooldown", type=float, default=0.5, help="last part, in which the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    # Both are settings of the whole process.
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
