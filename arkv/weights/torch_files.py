"""Files that `torch.save` wrote: their tensors are read, nothing in them is executed, what is beside is told.

Training programs keep all kinds of objects beside the tensors: numpy scalars, paths, callbacks. `torch.load`
refuses such a file whole. Here every class that it does not know is replaced by one that only swallows what
it is given, so the tensors can be had; a file that names something with which code could be run is refused.
"""

from __future__ import annotations

import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from arkv.errors import CheckpointError, warn

WRAPPINGS = ("model", "module", "state_dict")
"""Keys under which training programs put the tensors of a `.pt` file."""

AVERAGED = ("ema", "model_ema", "ema_state_dict")
"""Keys under which they put averaged weights beside them."""

PLAIN_BUILTINS = {"set", "frozenset", "complex", "bytearray", "bytes", "slice", "range", "list", "dict"}
PLAIN_BUILTINS |= {"tuple", "int", "float", "str", "bool", "object"}

RUNNERS = {"os", "posix", "nt", "sys", "subprocess", "shutil", "runpy", "importlib", "imp", "socket", "pty"}
RUNNERS |= {"ctypes", "code", "codeop", "webbrowser", "timeit", "commands", "pip", "asyncio", "threading"}
RUNNERS |= {"multiprocessing", "concurrent", "operator", "types", "io"}
"""Modules with which a file could run something; a name of one of them is no data."""

MOST_CLASSES = 64

Kind = Literal["object", "mapping", "list"]


class Unread:
    """In place of an object of an unknown class; holds nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Take whatever the class would have taken."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take whatever the class would have taken."""

    def __setstate__(self, state: object) -> None:
        """Forget it."""


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, not yet read but for those in the oldest format.

    Warns of what lies beside them and is passed over.

    Raises:
        CheckpointError: it is damaged, would run something, or has no tensors by name.
    """
    content, unread = _load(path)
    if isinstance(content, Unread):
        name = type(content).__name__
        raise CheckpointError(
            f"{path} holds a whole {name}, not its weights: save the state_dict() of it with torch.save"
        )
    if isinstance(content, dict):
        wrapping = next((key for key in WRAPPINGS if isinstance(content.get(key), dict)), None)
        averaged = next((key for key in AVERAGED if isinstance(content.get(key), dict)), None)
        if wrapping is not None:
            if averaged is not None:
                warn(
                    f"{path} has averaged weights, {averaged!r}, beside {wrapping!r}, which is what is read: "
                    f"to draw with the averaged ones, save that part as a file of its own"
                )
            content = content[wrapping]
        elif averaged is not None:
            raise CheckpointError(
                f"{path} has averaged weights only, {averaged!r}: save that part as a file of its own"
            )
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}: expected tensors by name")
    if unread:
        warn(f"{path} has objects beside its tensors that are passed over: {', '.join(sorted(unread))}")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _load(path: Path) -> tuple[Any, set[str]]:
    """What is in a file, and the names of the classes that `Unread` stands for."""
    kinds: dict[str, Kind] = {}
    mapped = zipfile.is_zipfile(path)
    while True:
        stands_in = {name: _stand_in(name, kind) for name, kind in kinds.items()}
        # Training programs keep their arguments in a Namespace, which holds values and runs nothing.
        safe: list[Any] = [Namespace, *((maker, name) for name, maker in stands_in.items())]
        try:
            with torch.serialization.safe_globals(safe):
                return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True), set(kinds)
        except Exception as error:  # whatever unpacking a damaged file runs into
            reason = " ".join(str(error).split()) or type(error).__name__
            if not _learn(reason, kinds):
                if runs := _runner(reason):
                    reason = f"reading it would run {runs}"
                elif kinds:
                    told = ", ".join(sorted(kinds))
                    reason = f"it has {told} beside its tensors; save the state_dict() alone"
                raise CheckpointError(
                    f"{path} is damaged or not a file of weights: {reason.split('. ')[0]}"
                ) from None


def _learn(reason: str, kinds: dict[str, Kind]) -> bool:
    """Note what a file of which the reading failed has in it; False where that does not help."""
    if name := _unknown(reason):
        if _runs(name) or name in kinds or len(kinds) >= MOST_CLASSES:
            return False
        kinds[name] = "mapping" if name == "collections.defaultdict" else "object"
        return True
    for name, kind in kinds.items():
        if kind == "object" and f"{name}'>" in reason:
            if "SETITEM" in reason:
                kinds[name] = "mapping"
                return True
            if "append" in reason or "extend" in reason:
                kinds[name] = "list"
                return True
    return False


def _unknown(reason: str) -> str | None:
    """The full name of the class or function that `torch.load` complains of."""
    found = re.search(r"GLOBAL (\S+) was not an allowed global", reason)
    if found is None:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"


def _runs(name: str) -> bool:
    module, _, member = name.rpartition(".")
    if module == "builtins":
        return member not in PLAIN_BUILTINS
    return module.split(".")[0] in RUNNERS


def _runner(reason: str) -> str | None:
    if name := _unknown(reason):
        return name.removeprefix("builtins.") if _runs(name) else None
    found = re.search(r"GLOBAL (\S+) whose module \S+ is blocked", reason)
    return None if found is None else found[1]


def _stand_in(name: str, kind: Kind) -> Callable[..., Any]:
    """A class that takes whatever a file has for the class of this name."""
    if kind == "object":
        return type(name, (Unread,), {})
    made = OrderedDict if kind == "mapping" else list

    def make(cls: type, *_: Any, **__: Any) -> Any:
        return made()

    return type(name, (), {"__new__": make})
