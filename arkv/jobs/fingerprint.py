"""What decides on a picture, by content: names stay when what they stand for is replaced.

Weights are known by samples of every tensor, which a finetuned checkpoint of the same shapes changes;
tokenizers and the files that a policy reads by all of their content; code by its distribution, version and
source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arkv.model import Model
from arkv.policy import CachePolicy
from arkv.registry import GROUPS
from arkv.weights.quantized import QuantizedLinear

SAMPLES = 64
"""Numbers that are looked at of a tensor, evenly spread."""

LENGTH = 16
"""Hexadecimal digits of a fingerprint."""

OURS = "arkv"
NOBODYS = frozenset({"builtins", "abc", "typing", "torch"})
"""Packages of bases that say nothing of a class."""


def code(cls: type) -> str:
    """Where a class comes from: distribution and version, if one registers it, and a digest of its source.

    Of a class of this package, the source is that of the files that its bases are in; of any other, all files
    of the package that it belongs to, because helpers lie beside it.
    """
    bases = (base for base in cls.__mro__ if top_package(base) not in NOBODYS)
    files = {path for base in bases for path in source_files(base)}
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} ".encode() + hashlib.sha256(file.read_bytes()).digest())
    return f"{_origin(cls)} {digest.hexdigest()[:LENGTH]}"


def top_package(cls: type) -> str:
    """The package that a class is in, without what is below it."""
    return cls.__module__.partition(".")[0]


def source_files(cls: type) -> Iterator[Path]:
    """The file of a class; of somebody else's, all files of the package that it belongs to."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    if file is None or not (path := Path(file)).is_file():
        return
    top = top_package(cls)
    root = getattr(sys.modules.get(top), "__file__", None)
    if top != OURS and root is not None and Path(root).name == "__init__.py":
        yield from Path(root).parent.rglob("*.py")
    yield path


def _origin(cls: type) -> str:
    point = _point(cls)
    if point is None or point.dist is None:
        return f"{cls.__module__}.{cls.__qualname__}"
    return f"{point.dist.name} {point.dist.version}"


def name_of(cls: type) -> str:
    """The name that a class is registered under, or where it is."""
    point = _point(cls)
    return f"{cls.__module__}.{cls.__qualname__}" if point is None else point.name


def _point(cls: type) -> EntryPoint | None:
    for group in GROUPS.values():
        for point in entry_points(group=group):
            if (point.module, point.attr) == (cls.__module__, cls.__qualname__):
                return point
    return None


def code_and_files(policy: CachePolicy) -> dict[str, str]:
    """A policy's code, and the content of the files that its parameters name."""
    told = {"policy_code": code(type(policy))}
    if isinstance(scorer := getattr(policy, "scorer", None), CachePolicy):  # of an allocator
        told |= {f"scorer_{name}": value for name, value in code_and_files(scorer).items()}
    for field in dataclasses.fields(policy):
        value = getattr(policy, field.name)
        if isinstance(value, (str, Path)) and (path := Path(value).expanduser()).is_file():
            told[f"policy_{field.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()[:LENGTH]
    return told


def weights_of(model: Model) -> str | None:
    """A model's weights and tables; None where it has shapes and no weights.

    Independent of where they lie and of how they are packed.
    """
    if model.device.type == "meta":
        return None
    digest = hashlib.sha256()
    for name, value in _contents(model, "", set()):
        digest.update(f"{name} ".encode() + value)
    return digest.hexdigest()[:LENGTH]


def _contents(owner: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, bytes]]:
    """Tensors and tokenizers of a module and of what it holds, be it registered as a part of it or not."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    if isinstance(owner, nn.Module):
        # Codes of few bits may be packed for this processor; their scales are other ones for other weights.
        left_out = {*owner._non_persistent_buffers_set, *(("codes",) * isinstance(owner, QuantizedLinear))}
        for name, tensor in [*owner._parameters.items(), *owner._buffers.items()]:
            if tensor is not None and name not in left_out:
                yield f"{prefix}{name}", _sampled(tensor)
        for name, module in owner._modules.items():
            if module is not None:
                yield from _contents(module, f"{prefix}{name}.", seen)
    for name, value in sorted(getattr(owner, "__dict__", {}).items()):
        if name.startswith("_"):
            continue
        if callable(getattr(value, "to_str", None)):  # tokenizers have it
            yield f"{prefix}{name}", hashlib.sha256(str(value.to_str()).encode()).digest()
        elif isinstance(value, nn.Module):
            yield from _contents(value, f"{prefix}{name}.", seen)


def _sampled(tensor: Tensor) -> bytes:
    """Shape, dtype and some of the numbers of a tensor, the first and the last among them."""
    plain = (tensor.to_dense() if tensor.is_mkldnn else tensor).detach().flatten()
    places = torch.linspace(0, max(0, len(plain) - 1), min(SAMPLES, len(plain)), dtype=torch.float64)
    some = plain[places.long().to(plain.device)].cpu().contiguous()
    told = f"{tuple(tensor.shape)} {tensor.dtype} ".encode()
    return told + some.view(torch.uint8).numpy().tobytes() if len(plain) else told


def digest(values: Mapping[str, Any]) -> str:
    """A digest of values that are ready for JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:LENGTH]
