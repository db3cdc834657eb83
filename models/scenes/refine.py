"""Teach `scenes` to do what it is asked: `python -m arkv.models.scenes.refine --init WEIGHTS`.

After training, most of what is wrong is one code in 576: an object too many, a speck. Likelihood hardly
sees it, but the exact judge does. So the model draws several pictures for each of its training prompts,
the judge rewards those that are right, and the policy gradient with the mean of the other pictures of
the prompt as its baseline (RLOO, arXiv 2402.14740) makes right pictures likelier. Pictures drawn by code
are learnt alongside, so that places and sizes stay as free as they were.

Only training prompts are used: the prompts that evaluation asks for stay unseen.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from arkv.checkpoint import read_config
from arkv.decoder import Decoder
from arkv.models.scenes.adapter import Scenes, word_ids
from arkv.models.scenes.codebook import Codebook
from arkv.models.scenes.grammar import GROUPS, encode_prompt, sample_prompt
from arkv.models.scenes.judge import judge
from arkv.models.scenes.train import GROUP_SHARES, export, training_batch
from arkv.registry import load_policy

SAVE_STEPS = 10


def advantages(rewards: Tensor) -> Tensor:
    """Reward minus the mean reward of the other pictures of the same prompt, `[prompts, pictures]`."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def pad_to(x: Tensor, multiple: int) -> Tensor:
    """Append zeros along the first axis up to a multiple, so that every part has one compiled shape."""
    return torch.cat([x, x.new_zeros(-len(x) % multiple, *x.shape[1:])])


def refine(arguments: argparse.Namespace) -> None:
    """Run, or go on with, the refinement that the arguments describe."""
    torch.manual_seed(arguments.seed)
    torch.set_flush_denormal(True)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    facts = read_config(arguments.init.with_suffix(".json"))
    model = Scenes.from_pretrained(arguments.init).train()
    artist = Scenes.from_pretrained(arguments.init, dtype=torch.bfloat16)
    decoder = Decoder(artist, load_policy("full"), compile=arguments.compile)
    codebook = Codebook(model.codes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.rate, betas=(0.9, 0.98), weight_decay=0.0)
    first = 0
    state_path = out / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    @torch.compile
    def log_likelihood(words: Tensor, codes: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.output(model(words, codes))
        return -F.cross_entropy(logits.float().transpose(1, 2), codes, reduction="none")

    grid = model.spec.grid
    count = arguments.prompts * arguments.pictures
    log = (out / "log.jsonl").open("a")
    for step in tqdm(range(first, arguments.steps), initial=first, total=arguments.steps, unit="step"):
        rng = numpy.random.default_rng((arguments.seed, step))
        shares = [GROUP_SHARES[group] for group in GROUPS]
        chosen = rng.choice(GROUPS, arguments.prompts, p=shares)
        prompts = [sample_prompt(rng, str(group), held_out=False).text for group in chosen]
        prompts = [prompt for prompt in prompts for _ in range(arguments.pictures)]
        artist.load_state_dict(model.state_dict())
        begun = time.monotonic()
        seeds = range(step * count, (step + 1) * count)
        drawn = decoder.generate(prompts, seeds=seeds, guidance=1.0)
        drawing_seconds = time.monotonic() - begun
        good = [
            judge(numpy.asarray(image), prompt) for image, prompt in zip(drawn.images, prompts, strict=True)
        ]
        rewards = torch.tensor(good, dtype=torch.float32).view(arguments.prompts, -1)
        weights = advantages(rewards).flatten()
        words = torch.tensor([word_ids(encode_prompt(prompt)) for prompt in prompts])
        true_words, true_codes, _ = training_batch(codebook, arguments.true, grid.tokens, grid.line, rng)

        # Pictures whose prompt was always met, or never, teach nothing.
        useful = weights != 0
        for group in optimizer.param_groups:
            group["lr"] = arguments.rate * min(1.0, (step + 1) / 5, 2 * (1 - step / arguments.steps))
        (-log_likelihood(true_words, true_codes).mean()).backward()
        words, codes, weights = (pad_to(x[useful], arguments.true) for x in (words, drawn.tokens, weights))
        for part in zip(*(x.split(arguments.true) for x in (words, codes, weights)), strict=True):
            gain = (log_likelihood(part[0], part[1]).sum(1) * part[2]).sum() / count
            (-arguments.weight * gain).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        row = {
            "step": step,
            "reward": rewards.mean().item(),
            "useful": int(useful.sum()),
            "norm": norm.item(),
            "drawing_seconds": round(drawing_seconds, 1),
        }
        log.write(json.dumps(row) + "\n")
        log.flush()
        if (step + 1) % SAVE_STEPS == 0 or step + 1 == arguments.steps:
            snapshot = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(snapshot, out / "state.partial")
            os.replace(out / "state.partial", state_path)
            refined = {"refinement_pictures": (step + 1) * count, "refinement_seed": arguments.seed}
            kept = {key: value for key, value in facts.items() if key not in ("config", "codes", "guidance")}
            export(model, out / "scenes.safetensors", kept | refined)


def main() -> None:
    """Command line of the refinement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--init", type=Path, required=True, help="weights to refine, a safetensors file")
    parser.add_argument("--out", type=Path, default=Path("runs/refined"), help="folder of the run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=16, help="prompts a step")
    parser.add_argument("--pictures", type=int, default=4, help="pictures drawn for each prompt")
    parser.add_argument("--true", type=int, default=16, help="pictures drawn by code, learnt in each step")
    parser.add_argument("--weight", type=float, default=0.01, help="of the policy gradient")
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--compile", default="inductor", choices=("none", "inductor"))
    refine(parser.parse_args())


if __name__ == "__main__":
    main()
