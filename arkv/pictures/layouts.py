"""Files of pictures, as the official evaluators and the loaders of training data read them.

| layout | files | read by |
|---|---|---|
| `geneval` | `00000/metadata.jsonl`, `00000/samples/00000.png`: a folder a prompt | GenEval |
| `dpg` | `NAME.png`: the samples of a prompt in a square of two by two | DPG-Bench |
| `flat` | `000000.png` | clean-fid, and whatever takes a folder of pictures |
| `npz` | `000000.png` and, from them, `samples.npz` or `samples-256.npz` | ADM's evaluator, and LlamaGen's |
| `webdataset` | `000000.tar` with 256 pictures, their prompts and seeds | webdataset, and tar |
| `parquet` | `000000.parquet`, likewise | datasets of the hub, pandas, whatever reads tables |
"""

from __future__ import annotations

import io
import json
import re
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from PIL import Image

from arkv.errors import ArkvError
from arkv.pictures.claims import is_whole_png
from arkv.pictures.files import in_threads, png
from arkv.pictures.layout import ByPrompt, Layout, Picture, Wanted, said_of
from arkv.pictures.names import no_name, shortened
from arkv.pictures.npz import write_npz
from arkv.pictures.prompts import Prompt

SHARD = 256
"""Pictures in a file of the layouts that have many in one."""


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

    def name(self, position: int, number: int, prompts: Sequence[Prompt], samples: int) -> str:
        """A file a picture, in the folder of its prompt."""
        return f"{number // samples:05d}/samples/{number % samples:05d}.png"

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
        seen: dict[str, Prompt] = {}
        for prompt in prompts:
            # Whatever this disk does, many take names that differ in large and small letters for one.
            other = seen.setdefault(unicodedata.normalize("NFC", prompt.name).casefold(), prompt)
            if other is not prompt:
                both = f"both named {prompt.name}"
                if other.name != prompt.name:
                    both = f"named {prompt.name} and {other.name}, which is one name on many disks"
                raise ArkvError(
                    f"{prompt.where} and {other.where} are {both}: the layout of DPG-Bench names files after "
                    "prompts; take --layout flat"
                )
            if (why := no_name(f"{prompt.name}.png")) is not None:
                raise ArkvError(
                    f"{prompt.where} is named {shortened(prompt.name)}, which no file can be: {why}; rename "
                    "it, or take --layout flat"
                )

    def per_file(self, samples: int) -> int:
        """All samples of a prompt."""
        return samples

    def name(self, position: int, number: int, prompts: Sequence[Prompt], samples: int) -> str:
        """After the prompt."""
        return f"{prompts[number // samples].name}.png"

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
        return png(sheet, {**self._said_of(pictures), **texts})

    def is_of(self, content: bytes, wanted: Sequence[Wanted], texts: Mapping[str, str]) -> bool:
        """As the square says."""
        return is_whole_png(content, {**self._said_of(wanted), **texts})

    @staticmethod
    def _said_of(pictures: Sequence[Wanted] | Sequence[Picture]) -> dict[str, str]:
        first = pictures[0]
        if len(pictures) == 1:
            return said_of(first)
        return {**said_of(first), "seed": json.dumps([picture.seed for picture in pictures])}


class Npz(Layout):
    """Numbered pictures in one folder, and all of them once more in `samples.npz`.

    Source: `create_npz_from_sample_folder` in LlamaGen's `autoregressive/sample/sample_c2i_ddp.py`, and
    `evaluations/evaluator.py` of github.com/openai/guided-diffusion, which reads it.
    """

    def archive(self, side: int | None) -> str | None:
        """One of resized pictures has their side in its name."""
        return "samples.npz" if side is None else f"samples-{side}.npz"

    def side_of(self, name: str) -> int | None:
        """As the name says."""
        found = re.fullmatch(r"samples(?:-([1-9][0-9]{0,4}))?\.npz", name)
        return None if found is None else int(found[1] or 0)

    def write_archive(self, path: Path, pictures: Sequence[Path], side: int | None) -> None:
        """As numpy reads it.

        Raises:
            ArkvError: a file cannot be read or written.
        """
        write_npz(path, pictures, side)


class Shards(Layout):
    """Many pictures a file, in the order in which they are drawn.

    Attributes:
        suffix: of the files.
    """

    suffix = ""
    takes_some = True

    def per_file(self, samples: int) -> int:
        """As many as a shard has; in the last one are those that are left."""
        return SHARD

    def name(self, position: int, number: int, prompts: Sequence[Prompt], samples: int) -> str:
        """After its place."""
        return f"{position:06d}{self.suffix}"


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
                for name, member in {**_members(picture, texts), f"{picture.number:09d}.png": file}.items():
                    entry = tarfile.TarInfo(name)
                    entry.size = len(member)
                    archive.addfile(entry, io.BytesIO(member))
        return buffer.getvalue()

    def is_of(self, content: bytes, wanted: Sequence[Wanted], texts: Mapping[str, str]) -> bool:
        """As the members say, of which none is more or less."""
        members = _read_members(content)
        for picture in wanted:
            for name, member in _members(picture, texts).items():
                if members.pop(name, None) != member:
                    return False
            if not is_whole_png(members.pop(f"{picture.number:09d}.png", b""), said_of(picture)):
                return False
        return not members

    def texts_of(self, content: bytes) -> dict[str, str]:
        """As the first picture's record says."""
        for name, member in _read_members(content).items():
            if name.endswith(".json"):
                with suppress(ValueError, RecursionError):
                    return {str(key): str(value) for key, value in dict(json.loads(member)).items()}
        return {}


def _members(picture: Wanted | Picture, texts: Mapping[str, str]) -> dict[str, bytes]:
    """What an archive says of a picture, by name."""
    prompt = picture.prompt
    told = {"prompt": prompt.prompt, "name": prompt.name, "seed": picture.seed, **texts}
    kind = "cls" if str(prompt.prompt).isdecimal() else "txt"
    return {
        f"{picture.number:09d}.{kind}": str(prompt.prompt).encode(),
        f"{picture.number:09d}.json": json.dumps(told).encode(),
    }


def _read_members(content: bytes) -> dict[str, bytes]:
    """The files of an archive by name, nothing of which is written anywhere; none if it cannot be read."""
    members = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as archive:
            for entry in archive:
                file = archive.extractfile(entry) if entry.isreg() else None
                members[entry.name] = b"" if file is None else file.read()
    except (tarfile.TarError, OSError, ValueError, EOFError):
        return {}
    return members


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

    def is_of(self, content: bytes, wanted: Sequence[Wanted], texts: Mapping[str, str]) -> bool:
        """As the columns say."""
        import pyarrow
        import pyarrow.parquet

        if self.texts_of(content) != dict(texts):
            return False
        try:
            rows = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
        except (pyarrow.ArrowException, OSError):
            return False
        told = [(picture.number, picture.prompt.name, *said_of(picture).values()) for picture in wanted]
        there = [tuple(row.get(name) for name in ("number", "name", "prompt", "seed")) for row in rows]
        return [(*row[:3], str(row[3])) for row in there] == told and all(
            is_whole_png((row.get("image") or {}).get("bytes") or b"", said_of(picture))
            for row, picture in zip(rows, wanted, strict=True)
        )

    def texts_of(self, content: bytes) -> dict[str, str]:
        """As its metadata says."""
        import pyarrow
        import pyarrow.parquet

        try:
            metadata = pyarrow.parquet.read_schema(io.BytesIO(content)).metadata or {}
            return {str(key): str(value) for key, value in dict(json.loads(metadata[b"arkv"])).items()}
        except (pyarrow.ArrowException, OSError, KeyError, ValueError, TypeError, RecursionError):
            return {}


def png_files(pictures: Sequence[Picture]) -> list[bytes]:
    """PNG files that say prompt and seed."""
    return in_threads(lambda picture: picture.png({}), pictures)


LAYOUTS: dict[str, Layout] = {
    "geneval": GenEval(),
    "dpg": DPGBench(),
    "flat": Layout(),
    "npz": Npz(),
    "webdataset": WebDataset(),
    "parquet": Parquet(),
}
