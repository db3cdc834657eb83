"""What the file of a picture says of itself, read from files that anybody may have written."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

from PIL import Image

# What Pillow raises for what is no picture, or not to its end.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def is_whole_png(content: bytes, texts: Mapping[str, str]) -> bool:
    """Whether a file is a PNG that can be read to its end and says these texts of itself, and no others."""
    if png_texts(content) != dict(texts):
        return False
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()  # every chunk up to the last
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except UNREADABLE:
        return False
    return True


def png_texts(content: bytes) -> dict[str, str]:
    """What stands before the pixels of a PNG; nothing if it is none."""
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            return {str(name): str(text) for name, text in getattr(image, "text", {}).items()}
    except UNREADABLE:
        return {}
