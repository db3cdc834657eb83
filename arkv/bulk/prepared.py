"""A job that is ready to be drawn, the same in every process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from arkv.bulk.description import Description
from arkv.bulk.folder import WEIGHTS, Folder
from arkv.bulk.log import EventLog
from arkv.bulk.worker import Worker, refusal
from arkv.decoder import Decoder, check_batch_size
from arkv.decoding.sampling import Sampling
from arkv.errors import ArkvError, PromptError
from arkv.jobs.fingerprint import code, code_and_files, digest, name_of, weights_of
from arkv.jobs.job import Job, Units
from arkv.jobs.recipe import policy_text
from arkv.model import Model
from arkv.pictures.prompts import Prompt
from arkv.policy import CachePolicy


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to be drawn, the same in every process.

    Attributes:
        description: with a batch size that is a number.
        job: what is drawn.
        account: what two runs must have in common beside the job.
        sampling: how tokens are drawn.
        texts: for every file, beside prompt and seed.
        tokens: visual tokens of a picture.
    """

    description: Description
    job: Job
    account: dict[str, Any]
    sampling: dict[str, Any]
    texts: dict[str, str]
    tokens: int

    @property
    def out(self) -> Path:
        """The folder."""
        return Path(self.description.out)

    @property
    def batch_size(self) -> int:
        """Pictures decoded at a time."""
        size = self.description.batch_size
        assert isinstance(size, int)
        return size

    @cached_property
    def units(self) -> Units:
        """The parts of the work."""
        return self.job.units(self.batch_size)

    def folder(self, part: int = 0, facts: Mapping[str, Any] | None = None) -> Folder:
        """The folder, to be written to under a part's number."""
        sizes = {"pictures": self.job.pictures, "batch_size": self.batch_size, "tokens": self.tokens}
        return Folder(self.out, self.job, self.account, {**sizes, **(facts or {})}, part)

    def with_weights_of(self, model: Model) -> Prepared:
        """The same, where a model has its weights that had none when it was prepared."""
        weights = weights_of(model)
        if weights is None or self.account[WEIGHTS] is not None:
            return self
        return replace(
            self, account={**self.account, WEIGHTS: weights}, texts={**self.texts, WEIGHTS: weights}
        )

    def worker(self, decoder: Decoder, log: EventLog) -> Worker:
        """Someone who draws."""
        return Worker(decoder, self.job, self.sampling, self.batch_size, log, self.description.recipe.window)


def prepare(
    description: Description,
    job: Job,
    model: Model,
    decoder: Decoder | None = None,
    policy: CachePolicy | None = None,
) -> Prepared:
    """Find out what is the same for all workers.

    Args:
        description: of the job.
        job: what is drawn.
        model: the job's; one on the meta device does.
        decoder: finds the largest batch, where that is asked for.
        policy: in place of the description's.

    Raises:
        ArkvError: a number is out of range.
    """
    recipe = description.recipe
    sampling = recipe.sampling(model)
    given = {name: value for name, value in sampling.items() if value is not None}
    checked = Sampling(**{**given, "top_k": given.get("top_k") or None})
    checked.check(model.spec.vocabulary)
    size = description.batch_size
    check_batch_size(size)
    if size == "auto":
        if decoder is None:
            raise ArkvError(
                f"batch_size is 'auto': the engine {description.engine} needs a number, the same for all "
                "workers; 'arkv estimate' says what a batch takes"
            )
        fine = [each.prompt for each in job.prompts if refusal(model, each) is None]
        size = decoder.batch_that_fits(fine * job.samples, checked.guided) if fine else 1
    account, texts = recipe.account(model), recipe.texts(model)
    if policy is None:
        policy = recipe.load_policy()
    else:
        named = policy_text(name_of(type(policy)), policy)
        account, texts = {**account, "policy": named}, {**texts, "policy": named, "model": model.spec.name}
    account |= {**code_and_files(policy), "model_code": code(type(model))}
    texts = {**texts, "account": digest(account)}
    prepared = Prepared(
        replace(description, batch_size=size),
        job,
        {**account, WEIGHTS: None},
        sampling,
        texts,
        model.spec.grid.tokens,
    )
    return prepared.with_weights_of(model)


def check_prompts(model: Model, prompts: Sequence[Prompt]) -> None:
    """Look at every prompt before the first picture is begun.

    Raises:
        PromptError: one is not one that the model can take; says where it stands.
    """
    for prompt in {each.prompt: each for each in reversed(prompts)}.values():
        if (error := refusal(model, prompt)) is not None:
            raise PromptError(f"{prompt.where}: {error}")
