"""Two choices of `front`: how wide a window may be, and as many tokens in both rows of a picture.

python docs/results/front_limits.py
python docs/results/front_limits.py --guidance 3 --seed 778

Drawn from a seed of those that it was tuned on, in four bits. The store gives both rows of a picture as many
slots, so fewer in unconditional rows save nothing here: tokens of theirs are freed, as if the slots were not
there, and the conditional rows get what that would save.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

import arkv
from arkv.policies import front
from arkv.policies.front import Front
from arkv.ranking import rank_in_head
from arkv.store import Store
from arkv.study.evaluation import Contender, Evaluation, Settings, evaluate
from arkv.study.pairs import pair

BUDGETS = (29, 32, 38, 59)
"""Tokens of a head, the mean of all."""
CAPS = (2, 3, 100)
"""Equal shares that a window may take: less than in `front`, as many, and no limit."""
MEANS = (27, 32, 38)
"""Tokens of a head, the mean of conditional and unconditional rows."""
PARTS = (1.0, 0.5, 0.25, 0.1)
"""Tokens of an unconditional row by those of a conditional one."""


@dataclass(frozen=True, kw_only=True)
class Uneven(Front):
    """`front`, whose unconditional rows give up more of what they hold, the least first.

    Attributes:
        part: tokens of an unconditional row by those of a conditional one.
    """

    part: float = 1.0

    def evict(self, store: Store, slots: Tensor) -> None:
        """What was selected, and in unconditional rows all beyond their part of the budget."""
        beyond = self.beyond(store)
        super().evict(store, slots)
        store.free_where_(beyond)

    def beyond(self, store: Store) -> Tensor:
        """Bool `[layers, rows, slots]`: visual tokens that do not rank within the part of the budget."""
        step = store.position.amax() + 1
        budgets = torch.tensor(store.plan.budgets(store.spec), device=store.position.device)[:, None]
        kept = (self.part * budgets).round().clamp(min=1)
        least = store.of_slots(store.sum_by_head(store.recyclable.float()) - kept)
        unconditional = torch.arange(store.rows, device=least.device)[:, None] >= store.rows // 2
        return (rank_in_head(store, self.worth(store, step)) < least) & (store.position >= 0) & unconditional


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=777)
    parser.add_argument("--guidance", type=float, help="in place of the model's own, for rows only")
    asked = parser.parse_args()
    model = arkv.load_model("scenes", dtype=torch.bfloat16)
    guidance = model.spec.guidance if asked.guidance is None else asked.guidance
    settings = Settings(asked.prompts, 0, 100, guidance, asked.seed, "inductor", kv_dtype="int4")

    def run(policy: Front) -> Evaluation:
        (row,) = evaluate(model, [Contender("front", policy, None, None)], settings)
        return row

    print(f"{asked.prompts} prompts of seed {asked.seed}, guidance {guidance}")
    if asked.guidance is None:
        print("\ntokens  a window's most shares  windows  others hold  right")
        for budget, cap in ((budget, cap) for budget in BUDGETS for cap in CAPS):
            with patch.object(front, "MOST_SHARES", cap):
                policy = Front(budget=budget)
                windows, share = policy.shares(model.spec)
                print(f"{budget:6} {cap:23} {len(windows):8} {share:12}  {right(run(policy))}", flush=True)
    print("\nconditional  unconditional  right                 less equal rows")
    for line in uneven(run):
        print(line, flush=True)


def uneven(run: Callable[[Front], Evaluation]) -> Iterator[str]:
    """A line for every mean and every part."""
    for mean in MEANS:
        equal = None
        for part in PARTS:
            budget = round(2 * mean / (1 + part))
            row = run(Uneven(budget=budget, part=part))
            found = f"{budget:11} {round(part * budget):14}  {right(row)}"
            if equal is not None:
                less = pair(equal, row)
                found += f"  {100 * less.difference:+5.1f} [{100 * less.low:+.1f}, {100 * less.high:+.1f}]"
            equal = equal or row
            yield found


def right(row: Evaluation) -> str:
    """The share right, with its interval."""
    assert row.accuracy is not None
    return f"{row.accuracy.share:5.1%} [{row.accuracy.low:5.1%}, {row.accuracy.high:5.1%}]"


if __name__ == "__main__":
    main()
