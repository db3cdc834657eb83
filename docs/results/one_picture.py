"""Times one picture of `scenes` beside transformers' loop: a table of docs/results/speed.md.

python docs/results/one_picture.py --out docs/results/one-picture.jsonl

Transformers has no `scenes`, whose positions are of rows and columns. Its contender is a Llama of the same
shape with random weights, a `DynamicCache` and both guidance rows, drawing as its `generate` does; what it
draws is noise, and takes as long. Every contender has one turn in a round; the first round is for warming up.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from transformers import DynamicCache, LlamaConfig, LlamaModel

import arkv
from arkv.decoding.compiling import Compile
from arkv.machine.description import describe_run
from arkv.models.scenes.adapter import DEFAULT_CONFIG, Scenes

CONDITION = 12
"""Tokens of a prompt, about."""
DTYPE = torch.bfloat16


def transformers_loop(model: Scenes) -> Callable[[int], None]:
    """Draws one picture with guidance, a token at a time."""
    spec, shape = model.spec, DEFAULT_CONFIG
    config = LlamaConfig(
        vocab_size=1,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=CONDITION + spec.grid.tokens,
    )
    llama = LlamaModel(config).to(DTYPE).eval()

    @torch.inference_mode()
    def draw(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        cache = DynamicCache(config=config)
        inputs = torch.randn(2, CONDITION, spec.width, dtype=DTYPE, generator=generator)
        for _ in range(spec.grid.tokens):
            found = llama(inputs_embeds=inputs, past_key_values=cache, use_cache=True)
            conditional, unconditional = model.output(found.last_hidden_state[:, -1]).float()
            logits = unconditional + spec.guidance * (conditional - unconditional)
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            inputs = model.code_embedding(token).expand(2, 1, -1)

    return draw


def ours(model: Scenes, policy: str, compile: Compile, window: int | str) -> Callable[[int], None]:
    """Draws one picture with guidance."""
    decoder = arkv.Decoder(model, policy, compile=compile)
    prompts = model.example_prompts(100, seed=0)

    def draw(seed: int) -> None:
        decoder.generate([prompts[seed % 100]], seeds=[seed], window=window, pixels=False)  # type: ignore[arg-type]

    return draw


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    model = Scenes.from_pretrained(dtype=DTYPE)
    contenders = {"transformers, `DynamicCache`": partial(transformers_loop, model)} | {
        f"`{policy}`, {'eager' if compile == 'none' else compile}, {told}": partial(
            ours, model, policy, compile, window
        )
        for policy in ("full", "linear:ratio=1/6")
        for compile in ("none", "inductor")
        for window, told in ((1, "one token a pass"), ("auto", "windows"))
    }
    draws = {name: make() for name, make in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in draws}
    for seed in range(given.rounds + 1):
        for name, draw in draws.items():
            start = time.perf_counter()
            draw(seed)
            seconds[name].append(time.perf_counter() - start)
    rows = [{"contender": name, "seconds": taken[1:]} for name, taken in seconds.items()]
    run = describe_run(model, 0, None) | {"dtype": "bfloat16", "tokens": model.spec.grid.tokens}
    given.out.write_text("".join(json.dumps(row) + "\n" for row in [{"run": run}, *rows]))
    for name, taken in seconds.items():
        print(f"{model.spec.grid.tokens / median(taken[1:]):8.0f} tokens/s  {name}")


if __name__ == "__main__":
    main()
