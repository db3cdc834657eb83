"""Memory of a process that calls one decoder again and again: the table of docs/guide/long-lived.md.

python docs/memory_over_calls.py --calls 1000

The model is a Janus-Pro of two layers and pictures of 8 x 8 tokens, with random weights: what a call leaves
behind does not depend on its size. Every call has another number of pictures, other lengths of prompts and
other settings than the one before; every tenth is cancelled, and every tenth is refused.
"""

import argparse
import gc
from pathlib import Path

import numpy

import arkv
from arkv.models.janus import JanusPro
from arkv.models.janus_checkpoint import JanusVariant
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig
from arkv.weights.checkpoint import draw_weights_

SMALL = JanusVariant(
    "small",
    "",
    TransformerConfig(layers=2, width=64, heads=4, kv_heads=4, head_dim=16, hidden=128),
    vocabulary=128,
    side=8,
    vq=VQConfig(codes=64, code_dim=8, latent=32, channels=32, multipliers=(1, 1), blocks=1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--policy", default="linear:ratio=1/3,anchors=8,recent=8")
    asked = parser.parse_args()
    model = JanusPro(SMALL)
    draw_weights_(model, 0)
    decoder, rng = arkv.Decoder(model, asked.policy), numpy.random.default_rng(0)
    marks = sorted({1, 10, asked.calls // 10, asked.calls // 2, asked.calls})
    print("calls   MB held   Python objects")
    for call in range(1, asked.calls + 1):
        draw(decoder, call, rng)
        if call in marks:
            gc.collect()
            print(f"{call:5}  {resident() / 1e6:8.1f}  {len(gc.get_objects()):15,}", flush=True)


def draw(decoder: arkv.Decoder, call: int, rng: numpy.random.Generator) -> None:
    """One request."""
    pictures = int(rng.integers(1, 5))
    prompts = decoder.model.example_prompts(pictures, call)
    if call % 10 == 3:
        decoder.generate(prompts, on_line=lambda *_: False)
    elif call % 10 == 7:
        try:
            decoder.generate([*prompts, [0, 999, 2]])
        except arkv.errors.PromptError:
            return
        raise AssertionError("it has a token that there is not")
    else:
        decoder.generate(prompts, guidance=float(rng.choice([1.0, 5.0])), top_k=int(rng.integers(0, 64)))


def resident() -> int:
    """Bytes of memory that this process holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


if __name__ == "__main__":
    main()
