"""What is to be drawn from a list of prompts: numbered pictures, their seeds, their files, and the batches.

A picture's number decides on its seed, so neither the order nor the batches nor the number of workers
changes what is drawn, beyond rounding. Batches lie where they would in a run from the beginning wherever a
run was taken up again, so that in the end the pictures are those of a run that nothing disturbed.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar, overload

import numpy
from numpy.typing import NDArray

from arkv.errors import ArkvError
from arkv.pictures.layout import Layout, PictureFile, Wanted
from arkv.pictures.layouts import LAYOUTS
from arkv.pictures.prompts import Prompt
from arkv.scalars import brief

MOST_PICTURES = 10**8
"""Pictures of a job: a run keeps some forty bytes of each."""

MOST_SIDE = 2**14

Item = TypeVar("Item")


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
        layout: one of `arkv.pictures.layouts.LAYOUTS`.
        samples: pictures of a prompt.
        seed: of the job.
        npz_side: pixels that the pictures of an archive are resized to; None for as they are. The pictures
            themselves do not depend on it.
        earlier: how many prompts the list had whenever more were added to it. Each of these parts is numbered
            for itself, behind those before it, so that what was drawn of them stays.

    Raises:
        ArkvError: a number is out of range, or the prompts do not go with the layout.
    """

    prompts: Sequence[Prompt]
    layout: str
    samples: int
    seed: int = 0
    npz_side: int | None = None
    earlier: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_number("seed", self.seed, 0, 2**64 - 1)
        check_number("samples", self.samples, 1, math.inf)
        if self.pictures > MOST_PICTURES:
            raise ArkvError(
                f"{len(self.prompts)} prompts with {brief(self.samples)} samples are {brief(self.pictures)} "
                f"pictures: a job has room for {MOST_PICTURES}; make several of it"
            )
        if self.npz_side is not None:
            if self.layout != "npz":
                raise ArkvError(f"npz_side is for the layout npz, and the layout is {self.layout}")
            check_number("npz_side", self.npz_side, 1, MOST_SIDE)
        if self.placing.per_file(self.samples) < 1:
            raise ArkvError(f"the layout {self.layout} has no picture in a file")
        self.placing.check(self.prompts, self.samples)

    @property
    def placing(self) -> Layout:
        """How pictures are laid out in files."""
        return LAYOUTS[self.layout]

    @property
    def pictures(self) -> int:
        """How many pictures there are."""
        return len(self.prompts) * self.samples

    @cached_property
    def _starts(self) -> list[int]:
        """Numbers of the first prompts of the parts, and of the one behind the last."""
        return [0, *self.earlier, len(self.prompts)]

    @cached_property
    def _file_starts(self) -> list[int]:
        """Places of the first files of the parts, and of the one behind the last."""
        starts, each = [0], self.placing.per_file(self.samples)
        for first, behind in pairwise(self._starts):
            starts.append(starts[-1] + -(-(behind - first) * self.samples // each))
        return starts

    def prompt(self, number: int) -> Prompt:
        """What a picture shows."""
        return self.prompts[self._prompt_of(number)]

    def _prompt_of(self, number: int) -> int:
        return prompt_of(number, self._starts, self.samples, self.placing)

    def picture_seed(self, number: int) -> int:
        """What a picture is drawn from."""
        return picture_seed(self.seed, number)

    @cached_property
    def _order(self) -> NDArray[numpy.int64]:
        lengths = [0 if str(each.prompt).isdecimal() else -len(each.prompt) for each in self.prompts]
        parts = []
        for first, behind in pairwise(self._starts):
            numbers = numpy.arange(first * self.samples, behind * self.samples)
            # Numbers are in order already, and stay so among those of one length.
            shown = numpy.array([lengths[self._prompt_of(number)] for number in numbers.tolist()])
            parts.append(numbers[numpy.argsort(shown, kind="stable")])
        return numpy.concatenate(parts)

    @property
    def order(self) -> list[int]:
        """The numbers of all pictures as they are drawn, those with the longest texts first.

        A batch is padded to its longest prompt, so that prompts of a length belong together; and what takes
        the most memory shows in the first batch that it does not fit.
        """
        return [int(number) for number in self._order]

    @cached_property
    def files(self) -> Sequence[PictureFile]:
        """All files with pictures, as they are drawn; each made when asked for: there may be millions."""
        return Computed(self._file, self._file_starts[-1])

    def _file(self, position: int) -> PictureFile:
        part = bisect_right(self._file_starts, position) - 1
        each, behind = self.placing.per_file(self.samples), self._starts[part + 1] * self.samples
        start = self._starts[part] * self.samples + (position - self._file_starts[part]) * each
        numbers = tuple(self._order[start : min(start + each, behind)].tolist())
        return PictureFile(self.placing.name(position, numbers[0], self.prompts, self.samples), numbers)

    @cached_property
    def _places(self) -> NDArray[numpy.int32]:
        """Where every picture comes in the order."""
        places = numpy.empty(self.pictures, numpy.int32)
        places[self._order] = numpy.arange(self.pictures, dtype=numpy.int32)
        return places

    def position(self, number: int) -> int:
        """Which of the files a picture is in."""
        part = bisect_right(self._starts, number // self.samples) - 1
        within = int(self._places[number]) - self._starts[part] * self.samples
        return self._file_starts[part] + within // self.placing.per_file(self.samples)

    def row(self, file: PictureFile) -> dict[str, Any]:
        """What an index says of a file before it is drawn, ready for JSON."""
        prompts = [self.prompt(number) for number in file.pictures]
        row: dict[str, Any] = {
            "file": file.file,
            "pictures": list(file.pictures),
            "seeds": [self.picture_seed(number) for number in file.pictures],
        }
        if len({prompt.name for prompt in prompts}) == 1:
            row |= {"prompt": prompts[0].prompt, "name": prompts[0].name}
        return row

    def wanted(self, file: PictureFile) -> list[Wanted]:
        """The pictures of a file, in order."""
        return [Wanted(number, self.prompt(number), self.picture_seed(number)) for number in file.pictures]

    def units(self, batch_size: int) -> Units:
        """The work in parts that do not depend on each other: whole files, a batch wherever that is possible.

        Args:
            batch_size: pictures decoded at a time.
        """
        together = max(1, batch_size // len(self.files[0].pictures))
        return Units(self.files, self._file_starts, together)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What two runs must have in common to work on the same folder, ready for JSON."""
        parts = {"extended": list(self.earlier)} if self.earlier else {}
        return {
            "prompts": account_of(self.prompts),
            **parts,
            "layout": self.layout,
            "samples": self.samples,
            "seed": self.seed,
        }

    def continuing(self, run: Mapping[str, Any]) -> Job:
        """This job as what goes on with another, whose list of prompts this one's may begin with.

        Args:
            run: settings of the other, as an index has them.

        Raises:
            ChangedPromptsError: the lists differ otherwise.
        """
        there, earlier = run.get("prompts"), run.get("extended", [])
        count = int(str(there).partition(" ")[0]) if str(there).partition(" ")[0].isdecimal() else 0
        parts = [0, *earlier, count] if isinstance(earlier, list) else []
        rising = all(isinstance(part, int) for part in parts) and all(a < b for a, b in pairwise(parts))
        if parts and rising and count <= len(self.prompts) and account_of(self.prompts[:count]) == there:
            more = (count,) if count < len(self.prompts) else ()
            return replace(self, earlier=(*earlier, *more))
        raise ChangedPromptsError(there, account_of(self.prompts))

    def includes(self, run: Mapping[str, Any]) -> bool:
        """Whether an index that was begun with these settings is of this job, or of it with fewer prompts."""
        if all(run.get(name) == self.settings.get(name) for name in ("prompts", "extended")):
            return True
        with suppress(ChangedPromptsError):
            earlier = self.continuing(run).earlier
            return earlier == self.earlier[: len(earlier)]
        return False


class ChangedPromptsError(ArkvError):
    """A list of prompts does not begin with the one that a job was begun with.

    Args:
        there: account of the job's.
        here: of the other.
    """

    def __init__(self, there: object, here: str) -> None:
        super().__init__(f"prompts is {json.dumps(there)} there and {json.dumps(here)} here")


class Computed(Sequence[Item]):
    """A sequence whose items are computed when they are asked for.

    Args:
        item: from a place to the item.
        length: number of items.
    """

    def __init__(self, item: Callable[[int], Item], length: int) -> None:
        self._item, self._length = item, length

    def __len__(self) -> int:
        return self._length

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    @overload
    def __getitem__(self, place: int) -> Item: ...

    @overload
    def __getitem__(self, place: slice) -> list[Item]: ...

    def __getitem__(self, place: int | slice) -> Item | list[Item]:
        if isinstance(place, slice):
            return [self._item(each) for each in range(*place.indices(self._length))]
        if not -self._length <= place < self._length:
            raise IndexError(place)
        return self._item(place % self._length)


class Units(Computed[list[PictureFile]]):
    """Parts of the work: so many files each, but none across what was added to a list of prompts.

    Args:
        files: of the job.
        starts: places of the first files of the parts of the list, and of the one behind the last.
        together: files in a unit.
    """

    def __init__(self, files: Sequence[PictureFile], starts: Sequence[int], together: int) -> None:
        self._firsts: list[range] = [range(a, b, together) for a, b in pairwise(starts)]
        self._starts, self._together = list(starts), together
        self._counts = [0, *accumulate(map(len, self._firsts))]
        self._files = files
        super().__init__(self._unit, self._counts[-1])

    def _unit(self, number: int) -> list[PictureFile]:
        part = bisect_right(self._counts, number) - 1
        first = self._firsts[part][number - self._counts[part]]
        return list(self._files[first : min(first + self._together, self._starts[part + 1])])

    def containing(self, position: int) -> int:
        """The number of the unit that a file is in."""
        part = bisect_right(self._starts, position) - 1
        return self._counts[part] + (position - self._starts[part]) // self._together

    def holding(self, positions: Iterable[int]) -> list[int]:
        """The numbers of the units that some files are in, in order."""
        return sorted({self.containing(position) for position in positions})


def prompt_of(number: int, starts: Sequence[int], samples: int, placing: Layout) -> int:
    """Which of the prompts a picture shows.

    Args:
        number: of the picture.
        starts: first prompts of the parts of a list, and the number of all.
        samples: pictures of a prompt.
        placing: layout of the job.
    """
    part = bisect_right(starts, number // samples) - 1
    first, behind = starts[part : part + 2]
    return first + placing.prompt_of(number - first * samples, behind - first, samples)


def account_of(prompts: Sequence[Prompt]) -> str:
    """A list of prompts as settings tell of it."""
    digest = hashlib.sha256()
    for number, each in enumerate(prompts):
        digest.update(b", " if number else b"[")
        digest.update(json.dumps([each.prompt, each.name, each.record]).encode())
    digest.update(b"]")
    return f"{len(prompts)} with sha256 {digest.hexdigest()[:16]}"


def check_number(name: str, value: object, least: int, most: float) -> None:
    """Raise `ArkvError` unless a value is a whole number of a range."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        bound = "" if most == math.inf else f" to {most:,}"
        raise ArkvError(f"{name} is {brief(value)}: expected a whole number from {least}{bound}")
