"""Score `scenes` exactly: `python -m arkv.models.scenes.evaluate --policy linear --ratio 1/6`.

Prompts come from the texts that are kept out of training, a hundred from each group unless told
otherwise. Small groups have fewer such texts than that and repeat them with other seeds. Every
picture is judged and the share that shows just what its prompt asks for is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy
from scipy.stats import binomtest  # type: ignore[import-untyped]

from arkv.decoder import Decoder
from arkv.models.scenes.adapter import WEIGHTS, Scenes
from arkv.models.scenes.grammar import GROUPS, sample_prompt
from arkv.models.scenes.judge import judge
from arkv.registry import load_policy, torch_dtype


def held_out_prompts(per_group: int, seed: int) -> list[str]:
    """Prompts that training never saw, `per_group` of each group in the order of `GROUPS`."""
    rng = numpy.random.default_rng(seed)
    return [sample_prompt(rng, group, held_out=True).text for group in GROUPS for _ in range(per_group)]


def main() -> None:
    """Command line of the evaluation; prints one JSON object."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="safetensors file of a scenes model")
    parser.add_argument("--policy", default="full", help="name, with parameters if any: linear:anchors=24")
    parser.add_argument("--ratio", help="share of the visual tokens to keep, such as 1/6")
    parser.add_argument("--per-group", type=int, default=100, help="prompts of each of the five groups")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and, counting up, the pictures")
    parser.add_argument("--guidance", type=float, help="default: the model's own")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", default="none", choices=("none", "inductor"))
    arguments = parser.parse_args()

    model = Scenes.from_pretrained(arguments.weights, dtype=torch_dtype(arguments.dtype))
    policy = load_policy(arguments.policy, **({"ratio": arguments.ratio} if arguments.ratio else {}))
    guidance = model.spec.guidance if arguments.guidance is None else arguments.guidance
    prompts = held_out_prompts(arguments.per_group, arguments.seed)
    first_seed = arguments.seed * len(prompts)
    result = Decoder(model, policy, compile=arguments.compile).generate(
        prompts,
        seeds=range(first_seed, first_seed + len(prompts)),
        guidance=guidance,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        batch_size=arguments.batch_size,
        progress=True,
    )
    good = numpy.array([judge(numpy.asarray(i), p) for i, p in zip(result.images, prompts, strict=True)])
    by_group = good.reshape(len(GROUPS), -1).mean(1)
    interval = binomtest(int(good.sum()), len(good)).proportion_ci(0.95, method="wilson")
    summary = {
        "accuracy": round(float(good.mean()), 4),
        "interval_95": [round(interval.low, 4), round(interval.high, 4)],
        "groups": {group: round(float(share), 4) for group, share in zip(GROUPS, by_group, strict=True)},
        "prompts": len(prompts),
        "distinct_texts": len(set(prompts)),
        "dtype": arguments.dtype,
        "policy": repr(policy),
        "guidance": guidance,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "tokens_per_second": round(result.stats.tokens_per_second),
        "kv_bytes": result.stats.kv_bytes,
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
