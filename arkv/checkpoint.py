"""Weight files into modules: strict, tensor by tensor, and never executing anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from arkv.errors import CheckpointError


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: the file is missing or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"the configuration {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"the configuration {path} is not a JSON object")
    return content


def read_weights_(module: nn.Module, path: Path) -> None:
    """Copy a safetensors file into the parameters and persistent buffers of a module, keeping their dtypes.

    Args:
        module: takes every tensor of the file, and has no other.
        path: the file; it is mapped into memory and read tensor by tensor.

    Raises:
        CheckpointError: the file is missing or damaged, or a tensor is missing, unexpected or misshapen;
            every such tensor is named, with both shapes.
    """
    wanted = module.state_dict()
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            problems = [
                f"{name} {tuple(t.shape)} is missing" for name, t in wanted.items() if name not in found
            ]
            problems += [
                f"{name} {shape} is unexpected" for name, shape in found.items() if name not in wanted
            ]
            problems += [
                f"{name} has shape {found[name]}, the model wants {tuple(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in found and found[name] != tuple(tensor.shape)
            ]
            if problems:
                raise CheckpointError(f"{path} does not fit the model: {'; '.join(problems)}")
            with torch.no_grad():
                for name, tensor in wanted.items():
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {error}") from None
