"""Many pictures into one folder, from a list of prompts, in a way that survives interrupts.

The index in the folder says which files are done; a file is written whole before its line is. Pictures are
numbered, a number decides on the seed, and batches begin at multiples of their size wherever a run was taken
up again, so that in the end the pictures are those of a run that nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from arkv.decoder import Decoder, Statistics
from arkv.errors import ArkvError, PromptError
from arkv.files import png, write_whole
from arkv.journal import Journal
from arkv.layouts import LAYOUTS, Layout, PictureFile
from arkv.model import Model
from arkv.prompts import Prompt
from arkv.sampling import Sampling

INDEX = "index.jsonl"
BATCH_SIZE = 16


def picture_seed(seed: int, number: int) -> int:
    """The seed of a picture, of 48 bits: from the job's and the picture's number, and nothing else.

    Jobs with neighbouring seeds have no picture in common, as they would if numbers were added up.
    """
    # 48 bits, because readers of JSON that know only floating point lose whole numbers from 2^53 on.
    return int.from_bytes(hashlib.blake2b(f"{seed} {number}".encode(), digest_size=6).digest(), "big")


@dataclass(frozen=True)
class Job:
    """What is to be drawn.

    Attributes:
        prompts: in the order of their list.
        layout: one of `arkv.layouts.LAYOUTS`.
        samples: pictures of a prompt.
        seed: of the job.
        npz_side: pixels that the pictures of an archive are resized to; None for as they are. The pictures
            themselves do not depend on it.

    Raises:
        ArkvError: a number is out of range, or the prompts do not go with the layout.
    """

    prompts: Sequence[Prompt]
    layout: str
    samples: int
    seed: int = 0
    npz_side: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ArkvError(f"--{name} is {getattr(self, name)}: expected at least {least}")
        self._layout.check(self.prompts, self.samples)

    @property
    def _layout(self) -> Layout:
        return LAYOUTS[self.layout]

    @cached_property
    def files(self) -> list[PictureFile]:
        """All files with pictures, in the order of the pictures' numbers."""
        return self._layout.files(self.prompts, self.samples)

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self.prompts) * self.samples

    @property
    def settings(self) -> dict[str, Any]:
        """What two runs must have in common to work on the same folder, ready for JSON."""
        listed = json.dumps([[each.prompt, each.name, each.record] for each in self.prompts])
        digest = hashlib.sha256(listed.encode()).hexdigest()
        return {
            "prompts": f"{len(self.prompts)} with sha256 {digest[:16]}",
            "layout": self.layout,
            "samples": self.samples,
            "seed": self.seed,
        }

    def draw(
        self,
        decoder: Decoder,
        out: Path,
        *,
        settings: Mapping[str, Any],
        facts: Mapping[str, Any],
        texts: Mapping[str, str],
        sampling: Mapping[str, Any],
        batch_size: int = BATCH_SIZE,
        progress: bool = False,
    ) -> Statistics | None:
        """Draw what is not there yet, a batch at a time.

        Args:
            decoder: model and policy.
            out: a folder that is missing, empty, or holds what an earlier run of this job has left.
            settings: what the pictures depend on beside the job; ready for JSON. A folder that was begun
                with others is refused.
            facts: what else the index says of the run that began it; ready for JSON.
            texts: for every PNG file, beside prompt and seed.
            sampling: how tokens are drawn, as `decoder.generate` takes it.
            batch_size: pictures decoded at a time. Another one than before is no other job.
            progress: show a bar.

        Returns:
            What was drawn now; None if everything was there.

        Raises:
            ArkvError: the folder holds something else or was begun with other settings; a prompt is not one
                that the model can take; a file cannot be written; or as `decoder.generate`.
        """
        check_folder(out)
        check_prompts(decoder.model, self.prompts)
        given = {name: value for name, value in sampling.items() if value is not None}
        Sampling(**{**given, "top_k": given.get("top_k") or None}).check(decoder.model.spec.vocabulary)
        journal = Journal(out / INDEX, {**self.settings, **settings}, facts, key="file")
        for name, content in self._layout.beside(self.prompts).items():
            if not (out / name).exists():
                write_whole({out / name: content})
        missing = [file for file in self.files if not _is_there(out, journal.rows.get(file.file))]
        drawn = []
        with tqdm(total=self.pictures, unit="picture", disable=not progress) as bar:
            bar.update(self.pictures - sum(len(file.pictures) for file in missing))
            for file, images, stats in self._batches(decoder, missing, sampling, batch_size):
                drawn += stats
                self._write(out, file, images, texts, journal)
                bar.update(len(images))
        self._layout.finish(out, self.files, self.npz_side)
        return _total(drawn) if drawn else None

    def _batches(
        self, decoder: Decoder, missing: Sequence[PictureFile], sampling: Mapping[str, Any], size: int
    ) -> Iterator[tuple[PictureFile, list[Image.Image], list[Statistics]]]:
        """The files in order with their pictures, and statistics of the batches decoded since the last one.

        Batches lie where they would in a run from the beginning: what is in a batch decides on rounding. So
        a batch of which some files are there is decoded again as a whole.
        """
        home = {number: file for file in missing for number in file.pictures}
        prompt_of = {number: file.prompt for file in self.files for number in file.pictures}
        size = min(size, self.pictures)
        images: list[Image.Image] = []
        stats: list[Statistics] = []
        for start in sorted({number - number % size for number in home}):
            numbers = range(start, min(start + size, self.pictures))
            rows = list(numbers)
            if decoder.compile != "none":
                # A short last batch is filled up: a shape of its own would be compiled anew.
                rows += [rows[-1]] * (size - len(rows))
            result = decoder.generate(
                [self.prompts[prompt_of[number]].prompt for number in rows],
                seeds=[picture_seed(self.seed, number) for number in rows],
                **sampling,
            )
            stats.append(result.stats)
            for number, image in zip(numbers, result.images, strict=False):
                file = home.get(number)
                if file is None:
                    continue
                images.append(image)
                if number == file.pictures[-1]:
                    yield file, images, stats
                    images, stats = [], []

    def _write(
        self,
        out: Path,
        file: PictureFile,
        images: Sequence[Image.Image],
        texts: Mapping[str, str],
        journal: Journal,
    ) -> None:
        """Write a file and then its line, so that a line never speaks of a file that is not there."""
        prompt = self.prompts[file.prompt]
        seeds = [picture_seed(self.seed, number) for number in file.pictures]
        told = {"prompt": str(prompt.prompt), "seed": json.dumps(seeds if len(seeds) > 1 else seeds[0])}
        content = png(self._layout.compose(images), {**told, **texts})
        write_whole({out / file.file: content})
        row = {
            "file": file.file,
            "pictures": list(file.pictures),
            "seeds": seeds,
            "prompt": prompt.prompt,
            "name": prompt.name,
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        if journal.rows.get(file.file) != row:
            journal.append(row)


def check_folder(out: Path) -> None:
    """Find out whether a folder can hold a job, before anything is loaded.

    Raises:
        ArkvError: it is a file, or holds what no job has written, which an evaluator would count as well.
    """
    if out.exists() and not out.is_dir():
        raise ArkvError(f"cannot write {out}: expected a folder, and it is a file")
    if out.is_dir() and not (out / INDEX).exists() and any(p.name[0] != "." for p in out.iterdir()):
        raise ArkvError(f"{out} is not empty and has no {INDEX} of an earlier run: take another folder")


def check_prompts(model: Model, prompts: Sequence[Prompt]) -> None:
    """Look at every prompt before the first picture is begun.

    Raises:
        PromptError: one is not one that the model can take; says where it stands.
    """
    for prompt in {each.prompt: each for each in reversed(prompts)}.values():
        try:
            model.check_prompts([prompt.prompt])
        except PromptError as error:
            raise PromptError(f"{prompt.where}: {error}") from None


def _is_there(out: Path, row: Mapping[str, Any] | None) -> bool:
    """Whether a file is done. What has been deleted or cut short since is not."""
    try:
        return row is not None and (out / row["file"]).stat().st_size == row["bytes"]
    except (OSError, KeyError):
        return False


def _total(parts: Sequence[Statistics]) -> Statistics:
    return Statistics(
        pictures=sum(part.pictures for part in parts),
        tokens=sum(part.tokens for part in parts),
        steps=sum(part.steps for part in parts),
        seconds=sum(part.seconds for part in parts),
        kv_bytes=max(part.kv_bytes for part in parts),
        full_kv_bytes=max(part.full_kv_bytes for part in parts),
    )
