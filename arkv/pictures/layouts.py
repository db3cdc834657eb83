"""Files of pictures, as the official evaluators and the loaders of training data read them.

| layout | files | read by |
|---|---|---|
| `geneval` | `00000/metadata.jsonl`, `00000/samples/00000.png`: a folder a prompt | GenEval |
| `dpg` | `NAME.png`: the samples of a prompt in a square of two by two | DPG-Bench |
| `flat` | `000000.png` | clean-fid, and whatever takes a folder of pictures |
| `npz` | `000000.png` and, from them, `samples.npz` or `samples-256.npz` | ADM's evaluator, and LlamaGen's |
| `webdataset` | `000000.tar` with 256 pictures, their prompts and seeds | webdataset, and tar |
| `parquet` | `000000.parquet`, likewise | datasets of the hub, pandas, whatever reads tables |

A layout says which pictures are in a file, by their numbers. Numbers run through a job: they decide on seeds,
so they depend on the list of prompts and the samples alone.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy
from PIL import Image

from arkv.errors import ArkvError
from arkv.pictures.files import in_threads, part_of, png
from arkv.pictures.prompts import Prompt

SHARD = 256
"""Pictures in a file of the layouts that have many in one."""


@dataclass(frozen=True)
class PictureFile:
    """A file that is to be drawn.

    Attributes:
        file: below the folder of the job, with slashes.
        pictures: the numbers of the pictures in it, in order.
    """

    file: str
    pictures: tuple[int, ...]


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
        return png(self.image, {"prompt": str(self.prompt.prompt), "seed": str(self.seed), **texts})


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

    def files(self, prompts: Sequence[Prompt], samples: int, order: Sequence[int]) -> list[PictureFile]:
        """The files of a job.

        Args:
            prompts: of the job.
            samples: pictures of a prompt.
            order: the numbers of all pictures, 0 and up, as they are drawn; those of a prompt follow one
                another wherever they are numbered so.

        Returns:
            The files in the order in which they can be written.
        """
        return [PictureFile(f"{number:06d}.png", (number,)) for number in order]

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

    def finish(self, folder: Path, files: Sequence[PictureFile], side: int | None) -> None:
        """Write what is made of the finished pictures; with a side, of pictures resized to so many pixels.

        Args:
            folder: of the job.
            files: those there are, in the order of their pictures' numbers.
            side: width and height; None for as they were drawn.

        Raises:
            ArkvError: a file cannot be read or written.
        """
        return


class ByPrompt(Layout):
    """Pictures numbered prompt by prompt, four of each where nobody says another number."""

    samples = 4

    def prompt_of(self, number: int, prompts: int, samples: int) -> int:
        """The samples of a prompt follow one another."""
        return number // samples


class GenEval(ByPrompt):
    """A folder a prompt with its record, as `evaluation/evaluate_images.py` of GenEval walks through them.

    Source: github.com/djghosh13/geneval. Four samples a prompt; `grid.png`, which the authors' generator also
    writes, is not read by the evaluator and left out.
    """

    def check(self, prompts: Sequence[Prompt], samples: int) -> None:
        """Look for the records.

        Raises:
            ArkvError: a prompt has none.
        """
        if bad := [prompt for prompt in prompts if prompt.record is None]:
            raise ArkvError(
                f"{bad[0].where} has no record of GenEval, which its layout needs: give its "
                "evaluation_metadata.jsonl or take --layout flat"
            )

    def files(self, prompts: Sequence[Prompt], samples: int, order: Sequence[int]) -> list[PictureFile]:
        """A file a picture, in the folder of its prompt."""
        return [
            PictureFile(f"{number // samples:05d}/samples/{number % samples:05d}.png", (number,))
            for number in order
        ]

    def beside(self, prompts: Sequence[Prompt]) -> dict[str, bytes]:
        """The record of every prompt, one object a file."""
        return {
            f"{index:05d}/metadata.jsonl": (json.dumps(prompt.record) + "\n").encode()
            for index, prompt in enumerate(prompts)
        }


class DPGBench(ByPrompt):
    """A file a prompt, as `dpg_bench/compute_dpg_bench.py` of DPG-Bench cuts them up.

    Source: github.com/TencentQQGYLab/ELLA. The first `--pic-num` of these places are looked at, each
    `--resolution` pixels wide and high: top left, top right, bottom left, bottom right.
    """

    def check(self, prompts: Sequence[Prompt], samples: int) -> None:
        """Look at the number of samples and at the names.

        Raises:
            ArkvError: there are more than four samples, or a name cannot be one of a file, or stands twice.
        """
        if samples > 4:
            raise ArkvError(f"--samples is {samples}: DPG-Bench has room for 1 to 4 samples of a prompt")
        seen: dict[str, str] = {}
        for prompt in prompts:
            if prompt.name in seen:
                raise ArkvError(
                    f"{prompt.where} and {seen[prompt.name]} are both named {prompt.name}: the layout of "
                    "DPG-Bench names files after prompts; take --layout flat"
                )
            if not prompt.name or prompt.name.startswith(".") or {"/", "\\", "\0"} & set(prompt.name):
                raise ArkvError(f"{prompt.where} is named {prompt.name!r}, which no file can be")
            seen[prompt.name] = prompt.where

    def files(self, prompts: Sequence[Prompt], samples: int, order: Sequence[int]) -> list[PictureFile]:
        """All samples of a prompt in one file."""
        return [
            PictureFile(f"{prompts[order[start] // samples].name}.png", tuple(order[start : start + samples]))
            for start in range(0, len(order), samples)
        ]

    def content(self, pictures: Sequence[Picture], texts: Mapping[str, str]) -> bytes:
        """A single sample as it is; more of them from left to right, then below.

        Raises:
            ArkvError: the pictures are not square, so the evaluator would cut them wrongly.
        """
        first = pictures[0]
        width, height = first.image.size
        if width != height:
            raise ArkvError(f"the pictures are {width} x {height}: DPG-Bench cuts out squares")
        if len(pictures) == 1:
            return first.png(texts)
        sheet = Image.new("RGB", (2 * width, 2 * height))
        for place, picture in enumerate(pictures):
            sheet.paste(picture.image, (place % 2 * width, place // 2 * height))
        seeds = json.dumps([picture.seed for picture in pictures])
        return png(sheet, {"prompt": str(first.prompt.prompt), "seed": seeds, **texts})


class Npz(Layout):
    """Numbered pictures in one folder, and all of them once more in `samples.npz`.

    Source: `create_npz_from_sample_folder` in LlamaGen's `autoregressive/sample/sample_c2i_ddp.py`, and
    `evaluations/evaluator.py` of github.com/openai/guided-diffusion, which reads it.
    """

    def finish(self, folder: Path, files: Sequence[PictureFile], side: int | None) -> None:
        """Write the archive, unless it is there; one of resized pictures has their side in its name.

        Raises:
            ArkvError: a file cannot be read or written.
        """
        path = folder / ("samples.npz" if side is None else f"samples-{side}.npz")
        if not path.exists():
            write_npz(path, [folder / file.file for file in files], side)


class Shards(Layout):
    """Many pictures a file, in the order in which they are drawn.

    Attributes:
        suffix: of the files.
    """

    suffix = ""
    takes_some = True

    def files(self, prompts: Sequence[Prompt], samples: int, order: Sequence[int]) -> list[PictureFile]:
        """As many pictures a file as a shard has; in the last one are those that are left."""
        return [
            PictureFile(f"{start // SHARD:06d}{self.suffix}", tuple(order[start : start + SHARD]))
            for start in range(0, len(order), SHARD)
        ]


class WebDataset(Shards):
    """Archives whose members belong together by the name before the first dot.

    Source: github.com/webdataset/webdataset. A picture is `000000017.png`, its prompt `.txt` or, if it is
    a class, `.cls`, and `.json` has both, the seed and how it was made.
    """

    suffix = ".tar"

    def content(self, pictures: Sequence[Picture], texts: Mapping[str, str]) -> bytes:
        """An archive without dates or owners."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            for picture, file in zip(pictures, png_files(pictures), strict=True):
                prompt = picture.prompt
                told = {"prompt": prompt.prompt, "name": prompt.name, "seed": picture.seed, **texts}
                kind = "cls" if str(prompt.prompt).isdecimal() else "txt"
                members = {
                    "png": file,
                    kind: str(prompt.prompt).encode(),
                    "json": json.dumps(told).encode(),
                }
                for suffix, member in members.items():
                    entry = tarfile.TarInfo(f"{picture.number:09d}.{suffix}")
                    entry.size = len(member)
                    archive.addfile(entry, io.BytesIO(member))
        return buffer.getvalue()


class Parquet(Shards):
    """Tables with a picture a row; the column `image` is what `datasets` calls one.

    Source: huggingface.co/docs/datasets, `Image`: `bytes` of a file and its `path`.
    """

    suffix = ".parquet"

    def check(self, prompts: Sequence[Prompt], samples: int) -> None:
        """Look for the library.

        Raises:
            ArkvError: it is not installed.
        """
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError:
            raise ArkvError("the layout parquet needs pyarrow: pip install 'arkv[parquet]'") from None

    def content(self, pictures: Sequence[Picture], texts: Mapping[str, str]) -> bytes:
        """A table; the texts are in its metadata."""
        import pyarrow
        import pyarrow.parquet

        files = [
            {"bytes": file, "path": f"{picture.number:09d}.png"}
            for picture, file in zip(pictures, png_files(pictures), strict=True)
        ]
        table = pyarrow.table(
            {
                "number": pyarrow.array([picture.number for picture in pictures], pyarrow.int64()),
                "name": [picture.prompt.name for picture in pictures],
                "prompt": [str(picture.prompt.prompt) for picture in pictures],
                "seed": pyarrow.array([picture.seed for picture in pictures], pyarrow.int64()),
                "image": files,
            }
        )
        features = {"image": {"_type": "Image"}}
        features |= {name: {"dtype": "int64", "_type": "Value"} for name in ("number", "seed")}
        features |= {name: {"dtype": "string", "_type": "Value"} for name in ("name", "prompt")}
        told = {"huggingface": json.dumps({"info": {"features": features}}), "arkv": json.dumps(dict(texts))}
        buffer = io.BytesIO()
        # Pictures are compressed already.
        pyarrow.parquet.write_table(table.replace_schema_metadata(told), buffer, compression="none")
        return buffer.getvalue()


def png_files(pictures: Sequence[Picture]) -> list[bytes]:
    """PNG files that say prompt and seed."""
    return in_threads(lambda picture: picture.png({}), pictures)


def write_npz(path: Path, pictures: Sequence[Path], side: int | None = None) -> None:
    """Write pictures as one array, holding one of them in memory at a time.

    Args:
        path: where an archive with the array `arr_0` appears when it is complete: uint8
            `[pictures, height, width, 3]`, not compressed; the same bytes for the same pictures.
        pictures: RGB files of one size.
        side: width and height in pixels that they are resized to; None for as they are.

    Raises:
        ArkvError: a picture is damaged or of another size, or the archive cannot be written.
    """
    part = part_of(path)
    try:
        size = _open(pictures[0]).size
        header = {
            "descr": numpy.dtype(numpy.uint8).str,
            "fortran_order": False,
            "shape": (len(pictures), side or size[1], side or size[0], 3),
        }
        with part.open("wb") as file:
            # The date of a ZipInfo is a fixed one.
            entry = zipfile.ZipInfo("arr_0.npy")
            with zipfile.ZipFile(file, "w") as archive, archive.open(entry, "w", force_zip64=True) as array:
                numpy.lib.format.write_array_header_1_0(array, header)
                for picture in pictures:
                    array.write(_pixels(picture, size, side))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise ArkvError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def _open(picture: Path) -> Image.Image:
    try:
        with Image.open(picture) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError) as error:  # Pillow raises both for damaged files
        raise ArkvError(f"cannot read {picture}: {getattr(error, 'strerror', None) or error}") from None


def _pixels(picture: Path, size: tuple[int, int], side: int | None) -> bytes:
    image = _open(picture)
    if image.size != size:
        raise ArkvError(
            f"{picture} is {image.width} x {image.height}, others are {size[0]} x {size[1]}: an array takes "
            "pictures of one size"
        )
    return (image if side is None else _resized(image, side)).tobytes()


def _resized(image: Image.Image, side: int) -> Image.Image:
    """Bicubically with torch, as LlamaGen's authors do: Pillow's filter is another one, and FID can tell."""
    import torch

    colours = torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None].float()
    resized = torch.nn.functional.interpolate(colours, (side, side), mode="bicubic")
    return Image.fromarray(resized[0].round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy())


LAYOUTS: dict[str, Layout] = {
    "geneval": GenEval(),
    "dpg": DPGBench(),
    "flat": Layout(),
    "npz": Npz(),
    "webdataset": WebDataset(),
    "parquet": Parquet(),
}
