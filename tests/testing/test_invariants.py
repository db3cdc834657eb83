"""The conformance suite, run for every registered policy and for some that only the tests have."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import strategies as st
from profiles import profile_of
from tiny import Often
from torch import Tensor

from arkv import CachePlan, Grid, Observation, RankedPolicy, Store
from arkv.model import ModelSpec
from arkv.policies.window import SlidingWindow
from arkv.policy import least_of_layer
from arkv.registry import load_class, names
from arkv.testing import PolicySuite

share = st.floats(0, 1)
few = st.none() | st.integers(1, 4)

# What every ranked policy takes.
COMMON = {"period": st.none() | st.integers(1, 7), "share_rows": st.booleans()}

SCORERS = st.sampled_from(["window:sinks=1", "random", "linear:anchors=1,recent=2"])

# Parameters worth varying, and small enough for tiny grids.
PARAMETERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "adakv": COMMON | {"of": SCORERS, "alpha": share},
    "diagonal": COMMON | {"sinks": st.integers(0, 2)},
    "full": {},
    "h2o": COMMON | {"recent": st.none() | st.integers(0, 6)},
    "front": COMMON | {"tau": share, "recent": st.none() | st.integers(0, 6)},
    "headkv": COMMON
    | {
        "warmup": st.none() | st.integers(1, 15),
        "tau": share,
        "window": few,
        "stratum": share,
        "scope": st.sampled_from(["all", "visual"]),
        "scoring": st.sampled_from(["raw", "softmax"]),
        "local_share": share,
        "redistribute": st.booleans(),
    },
    "linear": COMMON
    | {
        "anchors": st.integers(0, 4),
        "recent": st.none() | st.integers(0, 6),
        "scoring": st.sampled_from(["raw", "softmax"]),
    },
    "pyramid": COMMON | {"of": SCORERS, "beta": st.floats(1, 20)},
    "random": COMMON | {"seed": st.integers(0, 9)},
    "rkv": COMMON | {"window": few, "kernel": st.sampled_from([1, 3]), "as_published": st.booleans()},
    "snapkv": COMMON
    | {
        "window": few,
        "kernel": st.sampled_from([1, 3]),
        "pooling": st.sampled_from(["avg", "max"]),
        "dimensions": st.sampled_from([1, 2]),
    },
    "ssd": {
        "share_rows": st.booleans(),
        "tau": share,
        "window": few,
        "buffer": few,
        "recent": st.none() | st.integers(0, 2),
        "buffer_within": st.booleans(),
    },
    "tova": COMMON | {"mean_heads": st.booleans()},
    "window": COMMON | {"sinks": st.integers(0, 4)},
}


class TestRegistered(PolicySuite):
    """Every policy that is registered."""

    name: str
    folder: Path

    @pytest.fixture(autouse=True, params=[entry.name for entry in names("policy")])
    def _choose(self, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        self.name, self.folder = request.param, tmp_path
        self.policy = load_class("policy", request.param)  # type: ignore[misc]

    def parameters_for(self, spec: ModelSpec) -> st.SearchStrategy[dict[str, Any]]:
        """Those of the table, beside what SSD has to know of the heads, and front may."""
        parameters = PARAMETERS.get(self.name, COMMON if issubclass(self.policy, RankedPolicy) else {})
        if self.name == "ssd":
            parameters = parameters | {"profile": self.profiles(spec)}
        if self.name == "front":
            parameters = parameters | {"profile": st.none() | self.profiles(spec)}
        return st.fixed_dictionaries(parameters)

    def profiles(self, spec: ModelSpec) -> st.SearchStrategy[str]:
        """Files with profiles of random heads."""

        def write(shares: tuple[tuple[float, ...], ...]) -> str:
            path = self.folder / f"{hash((shares, spec.grid))}.json"
            if not path.exists():
                profile_of(spec, shares).save(path)
            return str(path)

        layer = st.tuples(*[st.sampled_from([0.0, 0.25, 0.75, 1.0])] * spec.kv_heads)
        return st.tuples(*[layer] * spec.layers).map(write)


class TestOften(PolicySuite):
    """Evictions that do not fall on line ends."""

    policy = Often
    parameters = st.fixed_dictionaries(
        {"anchors": st.integers(0, 4), "recent": st.integers(0, 6), "every": st.integers(1, 9)}
    )


@dataclass(frozen=True, kw_only=True)
class Watcher(RankedPolicy):
    """Keeps what was looked at most."""

    fields: ClassVar[dict[str, torch.dtype]] = {"score": torch.float32}
    head_fields: ClassVar[dict[str, torch.dtype]] = {"greatest": torch.float32}
    needs: ClassVar[frozenset[str]] = frozenset({"mass"})

    def begin(self, store: Store) -> None:
        store["greatest"].fill_(1.0)

    def observe(self, store: Store, seen: Observation, step: Tensor) -> None:
        store["score"].add_(seen.mass)
        store["greatest"].copy_(torch.maximum(store["greatest"], store.sum_by_head(seen.mass)))

    def score(self, store: Store, step: Tensor) -> Tensor:
        return store["score"] / store.of_slots(store["greatest"]).clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Unequal(Watcher):
    """A budget of its own for every head of every layer."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        uniform = super().plan(grid, spec)
        assert isinstance(uniform.budget, int)
        spread = min(uniform.budget - 1, grid.tokens - uniform.budget)
        signs = [[(-1) ** (layer + head) for head in range(spec.kv_heads)] for layer in range(spec.layers)]
        budgets = tuple(tuple(uniform.budget + sign * spread for sign in layer) for layer in signs)
        return replace(uniform, budget=budgets)


@dataclass(frozen=True, kw_only=True)
class Shared(Watcher):
    """The heads of a layer compete for its slots."""

    def plan(self, grid: Grid, spec: ModelSpec) -> CachePlan:
        return replace(super().plan(grid, spec), shared=True)

    def select(self, store: Store, step: Tensor) -> Tensor:
        return least_of_layer(store, self.worth(store, step))


@dataclass(frozen=True, kw_only=True)
class UnequalShared(Shared, Unequal):
    """Layers of different sizes, of which the heads compete."""


@dataclass(frozen=True, kw_only=True)
class Blinkered(SlidingWindow):
    """Looks at the newest tokens only, although it holds some more."""

    def visible(self, store: Store, step: Tensor) -> Tensor:
        assert isinstance(store.plan.budget, int)
        return (store.position < 0) | (store.position > step - store.plan.budget)


class TestUnequal(PolicySuite):
    """Budgets fixed by head and layer."""

    policy = Unequal
    parameters = st.fixed_dictionaries(COMMON)


class TestShared(PolicySuite):
    """A pool that heads share."""

    policy = Shared
    parameters = st.fixed_dictionaries(COMMON)


class TestUnequalShared(PolicySuite):
    """Pools of different sizes that heads share."""

    policy = UnequalShared
    parameters = st.fixed_dictionaries(COMMON)


class TestBlinkered(PolicySuite):
    """An attended subset smaller than what is resident."""

    policy = Blinkered
    parameters = st.fixed_dictionaries(COMMON)
