"""How good the pictures of a policy are, and how near its attention and its logits are to the full cache's.

Every policy draws the same prompts from the same seeds. What has an exact judge is judged; what a policy has
changed is measured on the full cache's own pictures (see `arkv.study.shadow`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from pydantic import TypeAdapter, ValidationError
from scipy.stats import binomtest  # type: ignore[import-untyped]
from torch import Tensor
from tqdm.auto import tqdm

from arkv.attention.quantization import KvDtype
from arkv.decoder import Decoder, Statistics
from arkv.decoding.compiling import Compile
from arkv.errors import ArkvError, BudgetError
from arkv.jobs.provenance import Facts, facts_of_class, facts_of_policy
from arkv.machine.description import describe_run
from arkv.model import Model
from arkv.options import split_commas
from arkv.pictures.files import png, write_whole
from arkv.policy import CachePolicy
from arkv.registry import load_class, load_policy
from arkv.study.labels import labelled, unlabelled, without_ratio
from arkv.study.shadow import Fidelity, compare

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Accuracy:
    """A share of pictures that show exactly what their prompts ask for.

    Attributes:
        right: pictures that do.
        judged: pictures looked at.
        share: the one by the other.
        low: lower end of the 95% Wilson interval.
        high: upper end.
    """

    right: int
    judged: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> Accuracy:
        """From at least one verdict."""
        right, judged = sum(verdicts), len(verdicts)
        interval = binomtest(right, judged).proportion_ci(CONFIDENCE, method="wilson")
        return cls(right, judged, right / judged, float(interval.low), float(interval.high))


class Outcome(NamedTuple):
    """One picture.

    Attributes:
        seed: that it was drawn from.
        right: whether it shows what its prompt asks for; None where nobody can tell.
    """

    seed: int
    right: bool | None


@dataclass(frozen=True)
class Evaluation:
    """What one policy at one ratio scores.

    Attributes:
        policy: with its parameters, such as "linear:ratio=1/6", and with "@int8" behind them where its keys
            and values were stored otherwise than the settings say (see `arkv.study.labels`).
        ratio: mean budget of a head by the visual tokens of a picture, `B / N`; None if the policy refuses.
        error: why it refuses; all the rest is None then.
        accuracy: of all prompts; None where the model has no judge of its pictures.
        groups: accuracy by group of prompts; empty where the model has no groups.
        attention_lost: see `arkv.study.shadow.Fidelity`; None if no prompt was teacher-forced.
        attention_lost_by_layer: likewise.
        kl: likewise.
        top1_agreement: likewise.
        tokens_per_second: visual tokens of all pictures by the wall time of decoding them, compilation
            included; guidance rows are not counted twice. `arkv bench` measures speed with more care.
        kv_bytes: keys and values allocated for a batch.
        full_kv_bytes: what the full cache takes for it.
        outcomes: picture by picture, in the order of the prompts.
        decided_by: whose code, weights and prompts made the row (see `arkv.jobs.provenance`); None where
            nobody has noted it.
    """

    policy: str
    ratio: float | None
    error: str | None = None
    accuracy: Accuracy | None = None
    groups: Mapping[str, Accuracy] = field(default_factory=dict)
    attention_lost: float | None = None
    attention_lost_by_layer: list[float] | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    tokens_per_second: float | None = None
    kv_bytes: int | None = None
    full_kv_bytes: int | None = None
    outcomes: tuple[Outcome, ...] = ()
    decided_by: Facts | None = None

    @property
    def name(self) -> str:
        """The policy without its ratio: what its rows have in common."""
        return without_ratio(self.policy)

    @property
    def asked_ratio(self) -> str | None:
        """The ratio as it was asked for, such as "1/6"; None where it was not."""
        text, _ = unlabelled(self.policy)
        parts = (part.partition("=") for part in split_commas(text.partition(":")[2]))
        return next((value.strip() for name, _, value in parts if name.strip() == "ratio"), None)

    @property
    def share_of_bytes(self) -> float | None:
        """Bytes of keys and values by those of the full cache in the model's own dtype."""
        if self.kv_bytes is None or self.full_kv_bytes is None:
            return None
        return self.kv_bytes / self.full_kv_bytes

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Evaluation:
        """Back from `dataclasses.asdict`; fields that somebody has added are left out.

        Raises:
            ArkvError: it is no such row: somebody has edited it.
        """
        try:
            return _checked().validate_json(json.dumps(row))
        except ValidationError as error:
            wrong = error.errors()[0]
            place = ".".join(map(str, wrong["loc"]))
            raise ArkvError(f"it is damaged: {place}: {wrong['msg']}") from None


@cache
def _checked() -> TypeAdapter[Evaluation]:
    return TypeAdapter(Evaluation)


@dataclass(frozen=True)
class Contender:
    """A policy that is to be evaluated, or why it cannot be.

    Attributes:
        text: name and parameters, as given, and how keys and values are stored (see `arkv.study.labels`).
        policy: None if it refuses.
        ratio: as in `Evaluation`.
        error: None if it does not refuse.
        kind: class of the policy, of one that refuses as well.
        kv_dtype: how its keys and values are stored; None for what the settings say.
    """

    text: str
    policy: CachePolicy | None
    ratio: float | None
    error: str | None
    kind: type[CachePolicy] | None = None
    kv_dtype: KvDtype | None = None

    @classmethod
    def load(cls, text: str, model: Model, kv_dtype: KvDtype | None = None) -> Contender:
        """Build and plan a policy for a model.

        Raises:
            ArkvError: it is not a policy with parameters that it takes. A budget that it refuses is no such
                error: others may be compared at it.
        """
        spec, label = model.spec, labelled(text, kv_dtype)
        try:
            policy = load_policy(text)
            ratio = policy.plan(spec.grid, spec).mean_budget(spec) / spec.grid.tokens
        except BudgetError as error:
            return cls(label, None, None, str(error), load_class("policy", text.partition(":")[0]), kv_dtype)
        return cls(label, policy, ratio, None, type(policy), kv_dtype)

    def decided_by(self, model: Model, facts_of_others: Facts) -> Facts:
        """Whose code makes the row of this contender.

        Args:
            model: that it is for.
            facts_of_others: what else decides, such as `facts_of_model` and the prompts.
        """
        if self.policy is not None:
            policy: Facts = facts_of_policy(self.policy, model.spec)
        else:
            policy = {} if self.kind is None else facts_of_class(self.kind)
        return {"policy": policy, **facts_of_others}


@dataclass(frozen=True)
class Settings:
    """What every policy of a comparison has in common.

    Attributes:
        prompts: how many prompts are drawn; a picture each.
        forced_prompts: how many of them, the first, are compared with the full cache step by step; never
            more than there are, and 0 leaves that out.
        batch_size: pictures decoded at a time.
        guidance: scale of classifier-free guidance; 1 leaves the unconditional rows out.
        seed: of the prompts and of the first picture; the others count up from it.
        compile: as for `arkv.Decoder`; the comparison with the full cache runs eagerly all the same.
        kv_dtype: how policies store keys and values; the full cache that they are compared with is exact.

    Raises:
        ArkvError: a number is out of range.
    """

    prompts: int = 200
    forced_prompts: int = 8
    batch_size: int = 40
    guidance: float = 1.0
    seed: int = 0
    compile: Compile = "none"
    kv_dtype: KvDtype | None = None

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("forced_prompts", 0), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ArkvError(f"{name} is {getattr(self, name)}: expected at least {least}")
        object.__setattr__(self, "forced_prompts", min(self.forced_prompts, self.prompts))


def describe(model: Model, settings: Settings) -> tuple[dict[str, Any], dict[str, Any]]:
    """What has to be known of a comparison, ready for JSON.

    Returns:
        What must be the same for its rows to be compared, and other facts of this run.
    """
    run = describe_run(model, settings.seed, settings.guidance)
    versions = {name: run.pop(name) for name in ("arkv", "torch", "model", "device", "dtype")}
    shared = versions | dataclasses.asdict(settings)
    return shared, {name: value for name, value in run.items() if name not in shared}


def evaluate(
    model: Model,
    contenders: Sequence[Contender],
    settings: Settings,
    progress: bool = False,
    *,
    prompts: Sequence[Any] | None = None,
    pictures_to: Path | None = None,
) -> Iterator[Evaluation]:
    """Evaluate policies one after the other; a row comes as soon as it is done.

    Args:
        model: what draws.
        contenders: in the order of the rows.
        settings: the same for all.
        progress: show a bar, in pictures.
        prompts: as many as the settings say; None for the model's own example prompts.
        pictures_to: folder for the pictures, a folder a policy and a PNG file a seed; None to keep none.

    Raises:
        ArkvError: there are more or fewer prompts than the settings say, or as `Decoder.generate`.
    """
    if prompts is None:
        prompts = model.example_prompts(settings.prompts, settings.seed)
    if len(prompts) != settings.prompts:
        raise ArkvError(f"the settings are for {settings.prompts} prompts, and {len(prompts)} are given")
    model.check_prompts(prompts)
    pictures = settings.prompts + settings.forced_prompts
    wanted = sum(one.policy is not None for one in contenders)
    forced: Tensor | None = None
    with tqdm(total=pictures * wanted, unit="picture", disable=not progress) as bar:
        for one in contenders:
            if one.policy is None:
                yield Evaluation(one.text, None, one.error)
                continue
            bar.set_description(one.text)
            folder = None if pictures_to is None else pictures_to / re.sub(r"[^\w.=-]+", "-", one.text)
            own = settings if one.kv_dtype is None else replace(settings, kv_dtype=one.kv_dtype)
            verdicts, stats = _draw(model, one.policy, prompts, own, bar, folder)
            fidelity = None
            if settings.forced_prompts:
                if forced is None:
                    forced = _full_pictures(model, prompts, settings)
                fidelity = _compare(model, one.policy, prompts, forced, own, bar)
            row = _row(model, one, prompts, verdicts, stats, fidelity)
            outcomes = tuple(Outcome(settings.seed + i, right) for i, right in enumerate(verdicts))
            yield replace(row, outcomes=outcomes)


def _draw(
    model: Model,
    policy: CachePolicy,
    prompts: Sequence[Any],
    settings: Settings,
    bar: tqdm[Any],
    folder: Path | None,
) -> tuple[list[bool | None], list[Statistics]]:
    """The verdict on every picture, and the statistics of every batch."""
    decoder = Decoder(model, policy, settings.compile, settings.kv_dtype)
    verdicts, stats = [], []
    for batch in _batches(len(prompts), settings):
        texts = [prompts[i] for i in batch]
        result = decoder.generate(texts, seeds=[settings.seed + i for i in batch], guidance=settings.guidance)
        stats.append(result.stats)
        if folder is not None:
            named = zip(batch, result.images, strict=True)
            write_whole({folder / f"{settings.seed + i}.png": png(image, {}) for i, image in named})
        verdicts += [
            model.satisfies(text, torch.from_numpy(numpy.array(image)))
            for text, image in zip(texts, result.images, strict=True)
        ]
        bar.update(len(batch))
    return verdicts, stats


def _full_pictures(model: Model, prompts: Sequence[Any], settings: Settings) -> Tensor:
    """Tokens of the full cache's pictures of the first prompts."""
    count = settings.forced_prompts
    result = Decoder(model, load_policy("full"), settings.compile).generate(
        prompts[:count],
        seeds=range(settings.seed, settings.seed + count),
        guidance=settings.guidance,
        batch_size=settings.batch_size,
    )
    return result.tokens


def _compare(
    model: Model,
    policy: CachePolicy,
    prompts: Sequence[Any],
    tokens: Tensor,
    settings: Settings,
    bar: tqdm[Any],
) -> Fidelity:
    """The mean over all pictures, batch by batch."""
    parts, weights = [], []
    for batch in _batches(len(tokens), settings):
        texts = [prompts[i] for i in batch]
        part = compare(model, policy, texts, tokens[batch], settings.guidance, settings.kv_dtype)
        parts.append(part)
        weights.append(len(batch))
        bar.update(len(batch))

    def mean(values: Sequence[float]) -> float:
        return float(numpy.average(values, weights=weights))

    return Fidelity(
        attention_lost=mean([part.attention_lost for part in parts]),
        attention_lost_by_layer=[
            mean(layer) for layer in zip(*(part.attention_lost_by_layer for part in parts), strict=True)
        ],
        kl=mean([part.kl for part in parts]),
        top1_agreement=mean([part.top1_agreement for part in parts]),
    )


def _row(
    model: Model,
    contender: Contender,
    prompts: Sequence[Any],
    verdicts: Sequence[bool | None],
    stats: Sequence[Statistics],
    fidelity: Fidelity | None,
) -> Evaluation:
    judged = [verdict for verdict in verdicts if verdict is not None]
    by_group: dict[str, list[bool]] = {}
    for prompt, verdict in zip(prompts, verdicts, strict=True):
        group = model.group(prompt)
        if group is not None and verdict is not None:
            by_group.setdefault(group, []).append(verdict)
    return Evaluation(
        policy=contender.text,
        ratio=contender.ratio,
        accuracy=Accuracy.of(judged) if judged else None,
        groups={group: Accuracy.of(each) for group, each in by_group.items()},
        tokens_per_second=sum(each.tokens for each in stats) / sum(each.seconds for each in stats),
        kv_bytes=max(each.kv_bytes for each in stats),
        full_kv_bytes=max(each.full_kv_bytes for each in stats),
        **({} if fidelity is None else dataclasses.asdict(fidelity)),
    )


def _batches(count: int, settings: Settings) -> list[range]:
    size = settings.batch_size
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
