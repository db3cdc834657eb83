"""What the benchmark compares: a policy, or another library, at a batch size."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version

from arkv.attention.quantization import KvDtype
from arkv.decoding.compiling import Compile
from arkv.jobs.provenance import Facts, facts_of_policy
from arkv.model import Model
from arkv.policy import CachePolicy
from arkv.registry import load_policy
from arkv.speed.engine import BASELINES, STATIC, Engine, PolicyEngine
from arkv.speed.measurement import Refusal
from arkv.speed.timing import Trace


@dataclass(frozen=True)
class Configuration:
    """What is measured.

    Attributes:
        policy: with its parameters, as `arkv.registry.load_policy` takes it; or one of
            `arkv.speed.baselines.BASELINES`.
        batch_size: pictures decoded at a time.
        memory: bytes that the batch was chosen to fill; None where the batch itself was chosen.
    """

    policy: str
    batch_size: int
    memory: int | None = None

    @property
    def baseline(self) -> bool:
        """Whether another library decodes."""
        return self.policy in BASELINES

    def decided_by(self, model: Model, others: Facts) -> Facts:
        """Whose code is measured.

        Args:
            model: that it is measured with.
            others: what else decides, such as `facts_of_model`.
        """
        if self.baseline:
            return {"policy": {"package": f"transformers {version('transformers')}"}, **others}
        return {"policy": facts_of_policy(policy_of(self.policy), model.spec), **others}

    def case(self, model: str) -> str:
        """A name that no other configuration of a run has."""
        memory = "" if self.memory is None else f" in {self.memory} bytes"
        return f"{model}: {self.policy} x {self.batch_size}{memory}"


class Contestant:
    """A configuration, what decodes it, and what it has shown so far.

    Args:
        model: what draws.
        wanted: the configuration.
        compile: how, unless it is a baseline.
        guided: whether every picture has an unconditional row, too.
        kv_dtype: how keys and values are stored, unless it is a baseline.
    """

    def __init__(
        self, model: Model, wanted: Configuration, compile: Compile, guided: bool, kv_dtype: KvDtype | None
    ) -> None:
        self.wanted, self.policy = wanted, policy_of(wanted.policy)
        self.kv_dtype = None if wanted.baseline else kv_dtype
        self.engine = engine_of(model, wanted, compile, guided, self.kv_dtype)
        self.ratio = 1.0
        self.compile: str = compile
        if wanted.baseline:
            self.compile = "inductor" if wanted.policy == STATIC else "none"
        else:
            plan = self.policy.plan(model.spec.grid, model.spec)
            self.ratio = plan.mean_budget(model.spec) / model.spec.grid.tokens
        self.traces: list[Trace] = []
        self.cold_seconds = 0.0
        self.kv_bytes, self.slot_bytes = 0, 0.0
        self.peak_rise: int | None = None
        self.refusal: Refusal | None = None


def policy_of(text: str) -> CachePolicy:
    """The policy; of a baseline, the one that holds as much."""
    return load_policy("full" if text in BASELINES else text)


def engine_of(
    model: Model, wanted: Configuration, compile: Compile, guided: bool, kv_dtype: KvDtype | None
) -> Engine:
    """What decodes a configuration; its cache is allocated at the first batch."""
    if wanted.baseline:
        from arkv.speed.baselines import TransformersEngine  # and with it all of transformers

        return TransformersEngine(model, wanted.policy)
    return PolicyEngine(model, load_policy(wanted.policy), compile, guided, kv_dtype)
