"""Draws parts of a job with one model: tokens first, then files."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from arkv.bulk.index import Made
from arkv.bulk.log import EventLog
from arkv.decoder import Decoder, Result, Statistics, images
from arkv.decoding.width import WindowSize
from arkv.errors import ArkvError, NumericalError, PromptError, is_out_of_memory
from arkv.jobs.job import Job
from arkv.machine.instruments import used_memory
from arkv.model import Model, PictureDecoder
from arkv.pictures.files import in_threads
from arkv.pictures.layout import Picture, PictureFile
from arkv.pictures.prompts import Prompt

NOT_ALONE = "another picture of its file could not be drawn"


@dataclass(frozen=True)
class Drawn:
    """The tokens of some pictures.

    Attributes:
        tokens: int64 `[N]` by number of the picture.
        failed: why there are none, by number of the picture.
    """

    tokens: dict[int, Tensor]
    failed: dict[int, str]


def refusal(model: Model, prompt: Prompt) -> PromptError | None:
    """Why a model cannot take a prompt; None if it can."""
    try:
        model.check_prompts([prompt.prompt])
    except PromptError as error:
        return error
    return None


class Worker:
    """Draws a job's units, and goes on where a picture or the memory fails.

    Args:
        decoder: model and policy.
        job: what is drawn.
        sampling: how tokens are drawn, as `decoder.generate` takes it.
        batch_size: pictures decoded at a time.
        log: is told of every batch and of what fails.
        window: tokens of a picture in a pass, as `decoder.generate` takes it.

    Attributes:
        stats: of the batches so far.
    """

    def __init__(
        self,
        decoder: Decoder,
        job: Job,
        sampling: Mapping[str, Any],
        batch_size: int,
        log: EventLog,
        window: WindowSize = "auto",
    ) -> None:
        self._decoder, self._job, self._sampling, self._log = decoder, job, sampling, log
        self._size, self._window = min(batch_size, job.pictures), window
        self.stats: list[Statistics] = []

    def draw(self, unit: Sequence[PictureFile]) -> Drawn:
        """Sample the tokens of all pictures of a unit.

        Raises:
            ArkvError: as `Decoder.generate`, but for what is wrong with single pictures.
        """
        drawn = Drawn({}, {})
        numbers = [number for file in unit for number in file.pictures]
        # Whatever fails, batches lie where they lie: what is in a batch decides on rounding.
        size = self._size
        for start in range(0, len(numbers), size):
            self._decode([n for n in numbers[start : start + size] if self._is_fine(n, drawn)], drawn)
        return drawn

    def _is_fine(self, number: int, drawn: Drawn) -> bool:
        """Whether the model can take a picture's prompt."""
        error = refusal(self._decoder.model, self._job.prompt(number))
        if error is not None:
            self._fails(number, error, drawn)
        return error is None

    def _decode(self, numbers: Sequence[int], drawn: Drawn) -> None:
        """Decode pictures together, or in parts if that does not go."""
        if not numbers:
            return
        if len(numbers) > self._size:
            self._decode_halves(numbers, drawn)
            return
        rows = list(numbers)
        if self._decoder.compile != "none":
            # A short batch is filled up: a shape of its own would be compiled anew.
            rows += [rows[-1]] * (self._size - len(rows))
        try:
            result = self._decoder.generate(
                [self._job.prompt(number).prompt for number in rows],
                seeds=[self._job.picture_seed(number) for number in rows],
                pixels=False,
                window=self._window,
                **self._sampling,
            )
        except NumericalError as error:
            if len(numbers) == 1:
                self._fails(numbers[0], error, drawn)
                return
        except Exception as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
            self._size = (len(rows) + 1) // 2
            self._log.write("out of memory", pictures=len(rows), batch_size=self._size, reason=str(error))
        else:
            self._keep(numbers, result, drawn)
            return
        # Behind the handlers, because an exception keeps the tensors alive that memory lacks.
        gc.collect()
        if self._decoder.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self._decode_halves(numbers, drawn)

    def _decode_halves(self, numbers: Sequence[int], drawn: Drawn) -> None:
        middle = (len(numbers) + 1) // 2
        self._decode(numbers[:middle], drawn)
        self._decode(numbers[middle:], drawn)

    def _keep(self, numbers: Sequence[int], result: Result, drawn: Drawn) -> None:
        tokens = result.tokens[: len(numbers)]
        drawn.tokens.update(zip(numbers, tokens, strict=True))
        stats = replace(result.stats, pictures=len(tokens), tokens=tokens.numel())
        self.stats.append(stats)
        memory = used_memory(self._decoder.model.device)
        self._log.write(
            "batch",
            pictures=stats.pictures,
            tokens=stats.tokens,
            passes=stats.passes,
            seconds=stats.seconds,
            memory=memory,
        )

    def _fails(self, number: int, error: ArkvError, drawn: Drawn) -> None:
        drawn.failed[number] = str(error)
        self._log.write("failed", picture=number, where=self._job.prompt(number).where, reason=str(error))


def develop(
    model: PictureDecoder, job: Job, texts: Mapping[str, str], unit: Sequence[PictureFile], drawn: Drawn
) -> list[Made]:
    """The files of a unit and their lines in the index.

    Args:
        model: makes pixels of tokens.
        job: what was drawn.
        texts: for every file, beside prompt and seed.
        unit: its files.
        drawn: the tokens of their pictures.

    Returns:
        What is to be written, file by file.
    """
    numbers = list(drawn.tokens)
    pixels = images(model, torch.stack([drawn.tokens[number] for number in numbers])) if numbers else []
    image_of = dict(zip(numbers, pixels, strict=True))
    return in_threads(lambda file: _made(job, texts, file, image_of, drawn.failed), unit)


def _made(
    job: Job,
    texts: Mapping[str, str],
    file: PictureFile,
    image_of: Mapping[int, Image],
    why_not: Mapping[int, str],
) -> Made:
    pictures = [
        Picture(number, image_of[number], job.prompt(number), job.picture_seed(number))
        for number in file.pictures
        if number in image_of
    ]
    row = job.row(file)
    failed = {str(number): why_not[number] for number in file.pictures if number in why_not}
    content = None
    if pictures and (not failed or job.placing.takes_some):
        content = job.placing.content(pictures, texts)
        row |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    else:
        failed = {**{str(picture.number): NOT_ALONE for picture in pictures}, **failed}
    if failed:
        row["failed"] = failed
    return Made(file.file, content, row)
