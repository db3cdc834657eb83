"""The most memory that a batch takes beside what was estimated, and memory over many batches.

The estimate is to lie above and within a twentieth; memory over many batches is to stay where it is.
"""

from __future__ import annotations

import torch
from rows import Rows, parser

import arkv
from arkv.decoding.noise import seed_keys
from arkv.decoding.sampling import Sampling
from arkv.estimate import estimate
from arkv.machine.instruments import PeakMemory, used_memory
from arkv.testing.tiny import Tiny

SIZES = (1, 3, 8, 2, 5)  # of batches, one after the other


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--calls", action="store_true", help="many batches instead of one large one")
    asked = made.parse_args()
    rows, device = Rows(asked.json), asked.device
    compile = "cudagraphs" if device.type == "cuda" else "none"
    with torch.inference_mode():
        if asked.calls:
            scenes = Tiny() if asked.small else arkv.load_model("scenes", dtype="bfloat16", device=device)
            _over_calls(rows, scenes, compile, 5 if asked.small else 200)
            return
        pictures = 2 if asked.small else 128
        model = arkv.load_model("janus-pro-1b", random_weights=True, dtype="bfloat16", device=device)
        for text, kv_dtype in (("linear:ratio=1/6", None), ("full", None), ("linear:ratio=1/6", "int8")):
            _beside_estimate(rows, model, text, kv_dtype, pictures, compile)


def _beside_estimate(
    rows: Rows, model: arkv.Model, text: str, kv_dtype: str | None, pictures: int, compile: str
) -> None:
    from arkv.speed.engine import PolicyEngine

    policy, line = arkv.load_policy(text), model.spec.grid.line
    gauge = PeakMemory(model.device)
    engine = PolicyEngine(model, policy, compile, True, kv_dtype)
    condition = model.condition(model.example_prompts(pictures, 0), True)
    keys = seed_keys(range(pictures)).to(model.device)
    engine.begin(condition, keys, Sampling(model.spec.guidance))
    for start in range(0, 3 * line, line):  # run, captured, replayed
        engine.decode(range(start, start + line))
    engine.check()
    length = condition.mask.shape[1]
    whole = estimate(model, policy, pictures, True, length, kv_dtype=kv_dtype, compile=compile)
    # What graphs keep is handed out to nobody: it counts as reserved and not as allocated.
    expected = whole.batch - whole.graphs
    rise = gauge.rise()
    cuda = model.device.type == "cuda"
    rows.add(
        kind="peak",
        name=text if kv_dtype is None else f"{text}, {kv_dtype}",
        pictures=pictures,
        compile=compile,
        estimated=expected,
        peak=rise,
        share=None if rise is None else rise / expected,
        estimated_reserved=whole.total,
        reserved=torch.cuda.memory_reserved(model.device) if cuda else None,
    )
    engine.release()
    if cuda:
        torch.cuda.empty_cache()


def _over_calls(rows: Rows, model: arkv.Model, compile: str, calls: int) -> None:
    device = model.device
    decoder = arkv.Decoder(model, arkv.load_policy("adakv:ratio=1/4"), compile=compile)
    prompts = model.example_prompts(max(SIZES), 0)
    for call in range(calls):
        decoder.generate(prompts[: SIZES[call % len(SIZES)]], pixels=False)
        if call % (calls // 5) == 0 or call == calls - 1:
            reserved = torch.cuda.memory_reserved(device) if device.type == "cuda" else None
            rows.add(kind="calls", call=call, used=used_memory(device), reserved=reserved)


if __name__ == "__main__":
    main()
