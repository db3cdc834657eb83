from typing import Any, ClassVar

import torch
from arkv_fading.policy import Fading

import arkv
from arkv.testing import PolicySuite


class TestFading(PolicySuite):
    policy = Fading
    parameters: ClassVar[dict[str, Any]] = {"half_life": 3.0, "recent": 2}


def test_attention_counts_half_after_the_half_life() -> None:
    spec = arkv.ModelSpec("one", 1, 1, 1, 8, 16, arkv.Grid(4, 4), 1, 1.0, 8, 8)
    policy = Fading(budget=8, half_life=3, recent=4)
    store = arkv.Store(spec, policy.plan(spec.grid, spec), 1, 1, policy.fields, torch.float32)
    once = torch.zeros_like(store["attention"])
    once[..., 5] = 0.8
    for step in range(4):
        policy.observe(store, arkv.Observation(mass=once if step == 0 else 0 * once), torch.tensor(step))
    torch.testing.assert_close(store["attention"], once / 2)
