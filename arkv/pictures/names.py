"""Names of files that come from somebody else."""

from __future__ import annotations

import os

LONGEST_NAME = 240
"""Bytes of a name; systems have 255, and a file in the making has a longer name."""

RESERVED = {"CON", "PRN", "AUX", "NUL"} | {f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)}


def no_name(name: str) -> str | None:
    """Why no file can have a name; None if one can."""
    if {"/", "\\"} & set(name) or any(ord(character) < 32 for character in name):
        return "it has a slash or a character that cannot be seen"
    if name.startswith("."):
        return "it begins with a dot"
    if os.name == "nt" and (set(name) & set(':*?"<>|') or name.partition(".")[0].upper() in RESERVED):
        return "Windows has no file of that name"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is no text"
    return None if size <= LONGEST_NAME else f"it has more than {LONGEST_NAME} bytes"


def shortened(name: str) -> str:
    """A name as it is told."""
    return repr(name) if len(name) <= 80 else f"{name[:80]!r} and so on"
