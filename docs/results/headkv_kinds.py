"""Why HeadKV lags on `scenes`: do early local heads stay local, and what if none is called so?

python docs/results/headkv_kinds.py --prompts 100
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

import arkv
from arkv.policies.full import FullCache
from arkv.policies.headkv import HeadKV
from arkv.policy import Observation
from arkv.store import Store
from arkv.study.evaluation import Contender, Settings, evaluate

PROBED = 8
"""Prompts whose heads are looked at."""


class NoneLocal(HeadKV):
    """Every head is global, whatever it looks at."""

    def is_local(self, store: Store, mass: Tensor, step: Tensor) -> Tensor:
        """False for all heads."""
        return torch.zeros_like(super().is_local(store, mass, step))


@dataclass(frozen=True, kw_only=True)
class Watched(FullCache):
    """Keeps everything, and asks at every line's end which heads HeadKV would call local."""

    needs: ClassVar[frozenset[str]] = frozenset({"mass"})
    found: ClassVar[dict[int, Tensor]] = {}

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        """Remember the answer, bool `[layers, rows, kv_heads]`, by the number of tokens."""
        if (int(step) + 1) % store.grid.line == 0:
            self.found[int(step) + 1] = HeadKV(ratio="1/6").is_local(store, seen.mass, step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    asked = parser.parse_args()
    model = arkv.load_model("scenes", dtype=torch.bfloat16)
    arkv.Decoder(model, Watched()).generate(model.example_prompts(PROBED, seed=0))
    early = Watched.found[120]
    print("tokens  local heads  as at 120  called local at 120, global now")
    for tokens, late in Watched.found.items():
        if tokens >= 120 and tokens % 72 == 48:
            shares = [share(late), share(late == early), share(early & ~late)]
            print(f"{tokens:6} {shares[0]:12.0%} {shares[1]:10.0%} {shares[2]:31.0%}")
    policies: Mapping[str, HeadKV] = {
        "headkv": HeadKV(ratio="1/6"),
        "none local": NoneLocal(ratio="1/6", local_share=0),
        "none local, scoring=softmax": NoneLocal(ratio="1/6", local_share=0, scoring="softmax"),
        "none local, scoring=softmax, stratum=0": NoneLocal(
            ratio="1/6", local_share=0, scoring="softmax", stratum=0
        ),
    }
    settings = Settings(asked.prompts, 0, min(asked.prompts, 100), model.spec.guidance, compile="inductor")
    print(f"\nright of {asked.prompts} at 1/6")
    contenders = [Contender(name, policy, 1 / 6, None) for name, policy in policies.items()]
    for row in evaluate(model, contenders, settings):
        assert row.accuracy is not None
        print(
            f"{row.accuracy.share:6.1%} [{row.accuracy.low:.0%}, {row.accuracy.high:.0%}]  {row.policy}",
            flush=True,
        )


def share(mask: Tensor) -> float:
    """How much of it is true."""
    return mask.float().mean().item()


if __name__ == "__main__":
    main()
