"""How numbered pictures are laid out in files.

A layout says which pictures are in a file, by their numbers. Numbers run through a job: they decide on seeds,
so they depend on the list of prompts and the samples alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from arkv.pictures.claims import is_whole_png, png_texts
from arkv.pictures.files import png
from arkv.pictures.prompts import Prompt


@dataclass(frozen=True, slots=True)
class PictureFile:
    """A file that is to be drawn.

    Attributes:
        file: below the folder of the job, with slashes.
        pictures: the numbers of the pictures in it, in order.
    """

    file: str
    pictures: tuple[int, ...]


@dataclass(frozen=True)
class Wanted:
    """A picture that is to be drawn, and how.

    Attributes:
        number: within the job.
        prompt: what it shows.
        seed: what it is drawn from.
    """

    number: int
    prompt: Prompt
    seed: int


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn, and how.

    Attributes:
        number: within the job.
        image: RGB.
        prompt: what it shows.
        seed: what it was drawn from.
    """

    number: int
    image: Image.Image
    prompt: Prompt
    seed: int

    def png(self, texts: Mapping[str, str]) -> bytes:
        """The picture as a PNG file that says prompt, seed and the texts."""
        return png(self.image, {**said_of(self), **texts})


def said_of(picture: Wanted | Picture) -> dict[str, str]:
    """What the file of a picture says of it alone."""
    return {"prompt": str(picture.prompt.prompt), "seed": str(picture.seed)}


class Layout:
    """Numbered pictures in one folder; what other layouts have otherwise, they say.

    All prompts come before the second sample of any: an inception score is taken over parts of 5,000
    pictures (`compute_inception_score` of ADM's evaluator), each of which should show all classes.

    Attributes:
        samples: pictures of a prompt, where nobody says another number.
        takes_some: whether a file is written that lacks a picture, because it could not be drawn.
    """

    samples = 1
    takes_some = False

    def prompt_of(self, number: int, prompts: int, samples: int) -> int:
        """Which of the prompts a picture shows."""
        return number % prompts

    def check(self, prompts: Sequence[Prompt], samples: int) -> None:
        """Look at the list before the first picture is begun.

        Raises:
            ArkvError: the evaluator could not read the result.
        """
        return

    def per_file(self, samples: int) -> int:
        """Pictures in a file, at most."""
        return 1

    def name(self, position: int, number: int, prompts: Sequence[Prompt], samples: int) -> str:
        """The name of a file below the folder of the job.

        Args:
            position: of the file among those of the job, as they are drawn.
            number: of its first picture.
            prompts: of the job.
            samples: pictures of a prompt.
        """
        return f"{number:06d}.png"

    def beside(self, prompts: Sequence[Prompt]) -> dict[str, bytes]:
        """Contents of the files that are no pictures, by their names below the folder of the job."""
        return {}

    def content(self, pictures: Sequence[Picture], texts: Mapping[str, str]) -> bytes:
        """A file, the same for the same pictures.

        Args:
            pictures: what is in it, in order.
            texts: what else there is to say of how they were made.
        """
        (picture,) = pictures
        return picture.png(texts)

    def is_of(self, content: bytes, wanted: Sequence[Wanted], texts: Mapping[str, str]) -> bool:
        """Whether a file is whole and says of itself that it has these pictures.

        Args:
            content: of the file, which anybody may have written.
            wanted: what should be in it, in order.
            texts: what else `content` was given.
        """
        (picture,) = wanted
        return is_whole_png(content, {**said_of(picture), **texts})

    def texts_of(self, content: bytes) -> dict[str, str]:
        """What a file says of how it was made, as far as that can be read; nothing if it cannot."""
        return png_texts(content)

    def archive(self, side: int | None) -> str | None:
        """Name of the file that has all pictures once more; None where there is none."""
        return None

    def side_of(self, name: str) -> int | None:
        """The pixels that pictures of an archive are resized to, 0 for none; None for no archive."""
        return None

    def write_archive(self, path: Path, pictures: Sequence[Path], side: int | None) -> None:
        """Write what is made of the finished pictures; with a side, of pictures resized to so many pixels.

        Args:
            path: of the archive.
            pictures: files in the order of their numbers.
            side: width and height; None for as they were drawn.

        Raises:
            ArkvError: a file cannot be read or written.
        """
        raise NotImplementedError


class ByPrompt(Layout):
    """Pictures numbered prompt by prompt, four of each where nobody says another number."""

    samples = 4

    def prompt_of(self, number: int, prompts: int, samples: int) -> int:
        """The samples of a prompt follow one another."""
        return number // samples
