"""How the published families come by their weights: one door for every part of every model.

A family says which files there are, what its configuration means and where each tensor goes. Everything
else is the same for all: an empty model, strict loading, the tokenizer without what it was last used for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from arkv.errors import CheckpointError
from arkv.machine.defaults import torchs_own
from arkv.machine.memory import allocated
from arkv.model import Model, PicturesOnly
from arkv.weights.checkpoint import WeightSlot, load_weights_
from arkv.weights.files import check_content, is_file
from arkv.weights.lora import read_adapter
from arkv.weights.quantization import WeightDtype
from arkv.weights.quantized import QuantizedLinear, layers, quantize_

if TYPE_CHECKING:
    from tokenizers import Tokenizer

AnyModule = TypeVar("AnyModule", bound=nn.Module)
AnyModel = TypeVar("AnyModel", bound=Model)

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"

DESCRIBED = (CONFIG_FILE, TOKENIZER_FILE)
CHOICES = ((*DESCRIBED, "model*.safetensors*"), (*DESCRIBED, "pytorch_model*.bin*"))
"""What is downloaded of a repository in the layout of transformers: safetensors where there are any."""


@dataclass(frozen=True)
class Part:
    """Some tensors of a model and the files that they are in.

    Attributes:
        slots: where the tensors go, by their names in the files.
        files: the parts of one checkpoint.
        unused: patterns of names that the files may have and the model does not use.
    """

    slots: Mapping[str, WeightSlot]
    files: Sequence[Path]
    unused: Sequence[str] = ()


def empty(
    build: Callable[[], AnyModule],
    dtype: torch.dtype,
    device: torch.device,
    weights: WeightDtype | None = None,
) -> AnyModule:
    """A module in evaluation mode whose weights are yet to be read.

    Args:
        build: makes the module.
        dtype: of its weights, but for those that keep their own.
        device: where to put them; the meta device has shapes only.
        weights: how the weights of a model's blocks are stored; None for as they are.

    Raises:
        MemoryLimitError: the device has not as much memory free.
    """
    with torchs_own(device), torch.device("meta"):  # nothing is drawn at random only to be overwritten
        module = build().to(dtype)
        if weights is not None and isinstance(module, Model):
            quantize_(module, weights)
    return allocated(module, device).eval()


def load(
    build: Callable[[], AnyModule],
    dtype: torch.dtype,
    device: torch.device | str,
    parts: Callable[[AnyModule], Iterable[Part]],
    weights: WeightDtype | None = None,
    lora: str | Path | None = None,
) -> AnyModule:
    """A module in evaluation mode with every one of its weights read from a file.

    Args:
        build: makes the module.
        dtype: of its weights, but for those that keep their own.
        device: where to put them. For the meta device no weight is read.
        parts: the checkpoints of the module's parts, which together have all of its weights; that of the
            transformer first.
        weights: how the weights of a model's blocks are stored: they are rounded as they are read, so that no
            more than one plain weight is in memory; None for as they are.
        lora: place of an adapter for the first part, merged into it before it is rounded.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or misshapen.
        MemoryLimitError: the device has not as much memory free.
    """
    device = torch.device(device)
    module = empty(build, dtype, device, weights)
    if device.type == "meta":
        return module
    adapter = None if lora is None else read_adapter(lora)
    quantized = {_memory(layer.weight): layer for _, layer in layers(module)}
    filled = Counter[int]()
    for part in parts(module):
        slots = {name: _taken(slot, quantized) for name, slot in part.slots.items()}
        if adapter is None:
            load_weights_(slots, part.files, part.unused)
        else:
            adapter.check(slots, part.unused)
            with adapter.merging() as merged:
                load_weights_(slots, part.files, part.unused, merged)
            adapter = None
        for slot in slots.values():
            filled[_memory(slot.target)] += slot.target.numel()
    for name, weight in slots_of(module).items():
        if filled[_memory(weight.target)] < weight.target.numel():
            raise AssertionError(f"{type(module).__name__} reads no file into its weight {name}")
    return module


def pictures_only(
    build: Callable[[], AnyModel], device: torch.device | str, part: Callable[[AnyModel], Part]
) -> PicturesOnly:
    """A model of which the picture decoder alone takes memory.

    Args:
        build: makes the model.
        device: where to put the picture decoder.
        part: its weights in a checkpoint, which may have others, too.

    Raises:
        CheckpointError: a file is missing or damaged, or a tensor is missing or misshapen.
        MemoryLimitError: the device has not as much memory free.
    """
    model = empty(build, torch.float32, torch.device("meta"))
    assert model.picture_part is not None
    allocated(model.picture_part, torch.device(device))
    found = part(model)
    load_weights_(found.slots, found.files, found.unused)
    return PicturesOnly(model)


def slots_of(module: nn.Module) -> dict[str, WeightSlot]:
    """Where the tensors of a checkpoint go that has parameters and persistent buffers under their own names.

    Of a quantised layer it is the plain weight that has a place.
    """
    plain = {f"{name}.weight": layer.weight for name, layer in layers(module)}
    rounded = {f"{name}.{part}" for name, _ in layers(module) for part in ("codes", "scales")}
    own = {name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if name not in rounded}
    return {name: WeightSlot(tensor) for name, tensor in (own | plain).items()}


def _taken(slot: WeightSlot, quantized: Mapping[int, QuantizedLinear]) -> WeightSlot:
    """A slot whose tensor is rounded, where its target is some rows of a quantised layer's weight."""
    layer = quantized.get(_memory(slot.target))
    if layer is None:
        return slot
    target, columns = slot.target, layer.in_features
    if target.shape[1:] != (columns,) or target.stride() != (columns, 1):
        raise AssertionError(f"a tensor of shape {tuple(target.shape)} is no rows of a weight of {layer}")
    return replace(slot, take=partial(layer.quantize_, first=target.storage_offset() // columns))


def _memory(tensor: Tensor) -> int:
    """What tells one piece of memory from another, on the meta device too."""
    return cast(int, tensor.untyped_storage()._cdata)


def place_of(source: str | Path | None, repository: str | None, example: str) -> str | Path:
    """Where a checkpoint is: the place that was given, else the repository of the only variant.

    Raises:
        CheckpointError: there is neither.
    """
    if source is not None:
        return source
    if repository is None:
        raise CheckpointError(f"no checkpoint is named: give {example}")
    return repository


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a file, or in the folder at a path, as if it had never been used.

    A file carries the padding, truncation and dropout of whoever saved it last. None of it is the model's.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    from tokenizers import Tokenizer

    path = path if is_file(path) else path / TOKENIZER_FILE
    if not is_file(path):
        raise CheckpointError(
            f"{path.parent} has no {path.name}: copy it from the repository that the weights are from"
        )
    check_content(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare ones
        raise CheckpointError(
            f"{path} is damaged or not a tokenizer: {' '.join(str(error).split())}"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer
