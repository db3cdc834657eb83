"""What decides on a result beside its settings: whose code, which weights, which files.

Rows of results are found again by it, so that one that other code has made is not taken for this one's.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from arkv.allocator import Allocator
from arkv.errors import ArkvError
from arkv.jobs.fingerprint import NOBODYS, OURS, source_files, top_package
from arkv.model import Model, ModelSpec
from arkv.policy import CachePolicy
from arkv.registry import origin_of
from arkv.weights.packing import unpacked

Facts = Mapping[str, Any]
"""What decides, by what it is of; ready for JSON."""

DIGITS = 16


def facts_of_policy(policy: CachePolicy, spec: ModelSpec) -> Facts:
    """Whose code a policy is, and what it reads.

    Args:
        policy: with its parameters, which are not part of the facts; the policies in it are.
        spec: of the model that it is for.

    Returns:
        `package`, the distribution and version that registered it, `source`, a digest of the files of its
        class and of those that it derives from, `files`, digests of what it reads, and facts of the policies
        in it.
    """
    facts: dict[str, Any] = facts_of_class(type(policy))
    if files := policy.files(spec):
        facts["files"] = {path.name: _file_digest(path) for path in files}
    inner = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    inner += [policy.scorer] if isinstance(policy, Allocator) else []
    for each in inner:
        if isinstance(each, CachePolicy):
            facts[type(each).__name__] = facts_of_policy(each, spec)
    return facts


def facts_of_model(model: Model) -> Facts:
    """Whose code a model is, and a digest of its weights; reads all of them."""
    return facts_of_class(type(model)) | {"weights": weights_digest(model)}


def facts_of_class(kind: type) -> dict[str, str]:
    """The distribution and version that registered a policy or a model, and a digest of its source.

    The source is that of the files that it and its bases are in, torch and Python aside, and of all files of
    the package that it belongs to if that is not this one, because helpers lie beside a class. Comments,
    docstrings and layout do not count.
    """
    bases = [each for each in kind.__mro__ if top_package(each) not in NOBODYS]
    digest = hashlib.sha256()
    for name in dict.fromkeys(each.__module__ for each in bases):
        digest.update(_source(name, [each for each in bases if each.__module__ == name]).encode())
    for path in sorted(source_files(kind)) if top_package(kind) != OURS else ():
        digest.update(_code_of_file(path).encode())
    return {
        "package": origin_of("policy" if issubclass(kind, CachePolicy) else "model", kind),
        "source": digest.hexdigest()[:DIGITS],
    }


def weights_digest(model: Model) -> str:
    """A digest of all weights as a checkpoint has them: names, shapes, dtypes and numbers."""
    digest = hashlib.sha256()
    with unpacked(model):
        for name, tensor in sorted(model.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            if tensor.device.type != "meta":
                content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(memoryview(content.numpy()))
    return digest.hexdigest()[:DIGITS]


def prompts_digest(prompts: Iterable[Any]) -> str:
    """A digest of prompts, in order."""
    return hashlib.sha256("\n".join(map(repr, prompts)).encode()).hexdigest()[:DIGITS]


def changes(there: Facts | None, here: Facts) -> list[str]:
    """What decides otherwise here than it did there, in words; empty where nothing does.

    Args:
        there: of a row that was found; None where it does not say.
        here: of this run.
    """
    if there is None:
        return ["it does not say whose code made it"]
    told = []
    for name in dict.fromkeys([*there, *here]):
        old, new = there.get(name), here.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            told += [f"{name} {change}" for change in changes(old, new)]
        elif old != new:
            told.append(f"{name} was {old} and is {new}")
    return told


def _source(module: str, classes: list[type]) -> str:
    """The code of a module, or of some of its classes where it has no file; nothing if neither is known."""
    try:
        return _code(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        pass
    try:
        return "\n".join(map(inspect.getsource, classes))
    except (OSError, TypeError):
        return ""


def _code(source: str) -> str:
    """Source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                documented = ast.get_docstring(node, clean=False) is not None
                node.body = node.body[documented:]
    return ast.unparse(tree)


def _code_of_file(path: Path) -> str:
    """The code of a file; all of its text where that is not Python."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return _code(text)
    except (SyntaxError, ValueError):
        return text


def _file_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:DIGITS]
    except OSError as error:
        raise ArkvError(f"cannot read {path}: {error.strerror}") from None
