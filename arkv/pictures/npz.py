"""Many pictures as one array, as ADM's evaluator reads it."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy
from PIL import Image

from arkv.errors import ArkvError
from arkv.pictures.files import write_whole


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
    size = _open(pictures[0]).size
    header = {
        "descr": numpy.dtype(numpy.uint8).str,
        "fortran_order": False,
        "shape": (len(pictures), side or size[1], side or size[0], 3),
    }

    def write(file: BinaryIO) -> None:
        # The date of a ZipInfo is a fixed one.
        entry = zipfile.ZipInfo("arr_0.npy")
        with zipfile.ZipFile(file, "w") as archive, archive.open(entry, "w", force_zip64=True) as array:
            numpy.lib.format.write_array_header_1_0(array, header)
            for picture in pictures:
                array.write(_pixels(picture, size, side))

    write_whole({path: write})


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
