"""Weight files into modules: strict, tensor by tensor, and never executing anything."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from zlib import crc32

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arkv.errors import CheckpointError
from arkv.weights.files import check_content, is_file
from arkv.weights.foreign import check_plain
from arkv.weights.quantized import QuantizedLinear
from arkv.weights.torch_files import read_tensors

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes of weights that are what they say, as a safetensors file calls them."""

# What was read through a mapping stays in memory until the file is closed, so it is closed now and then.
OPENINGS = 32

MOST_PROBLEMS = 30

Names = Mapping[str, tuple[tuple[int, ...], bool]]
"""Tensors of a file: their shapes, and whether they are plain floating-point numbers."""


@dataclass(frozen=True)
class WeightSlot:
    """Where one tensor of a checkpoint goes.

    Attributes:
        target: parameter, buffer, or a view of one, that it is copied into, on its device and in its dtype.
        convert: makes a tensor of the target's shape from the one in the file; None where they are alike.
        shape: shape in the file; None for the target's.
        take: takes the converted tensor, where it is not copied as it is; the target then only says of which
            shape it is.
    """

    target: Tensor
    convert: Callable[[Tensor], Tensor] | None = None
    shape: tuple[int, ...] | None = None
    take: Callable[[Tensor], None] | None = None

    @property
    def wanted(self) -> tuple[int, ...]:
        """The shape that the tensor has to have in the file."""
        return tuple(self.target.shape) if self.shape is None else self.shape


def load_weights_(
    slots: Mapping[str, WeightSlot],
    files: Sequence[Path],
    unused: Sequence[str] = (),
    change: Callable[[str, Tensor], Tensor] | None = None,
) -> None:
    """Copy the tensors of a checkpoint to where they belong, one at a time.

    Beside the targets no more than about a thirtieth of a file is in memory at any time. Nothing is copied
    from a checkpoint that does not fit.

    Args:
        slots: by the names that the tensors have in the checkpoint.
        files: its parts: `.safetensors`, or what `torch.save` wrote, bare or under one of `WRAPPINGS`.
        unused: patterns of names that the checkpoint may have and the model does not use.
        change: makes of a tensor, by its name, the one that is used, of the same shape; None for nothing.

    Raises:
        CheckpointError: a file is missing or damaged, the weights are quantised, or a tensor is missing,
            unexpected, misshapen or not of floating-point numbers where the model's are.
    """
    found = {path: _names(path) for path in files}
    together = {name: facts for names in found.values() for name, facts in names.items()}
    where = str(files[0]) if len(files) == 1 else f"the checkpoint in {files[0].parent}"
    check_plain(where, together)
    if len(together) < sum(map(len, found.values())):
        counts = Counter(name for names in found.values() for name in names)
        raise CheckpointError(f"{where} has {counts.most_common(1)[0][0]} in two files: remove one of them")
    if slots and not slots.keys() & together.keys():
        raise CheckpointError(
            f"{where} belongs to another model or has another layout: it has {_some(together)}, "
            f"the model wants {_some(slots)}"
        )
    if problems := [*_problems(slots, together, unused)]:
        more = len(problems) - MOST_PROBLEMS
        told = problems[:MOST_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise CheckpointError(f"{where} does not fit the model: {'; '.join(told)}")
    with torch.no_grad():
        for path, names in found.items():
            for part in _parts([name for name in names if name in slots], names):
                with opened(path) as read:
                    for name in part:
                        tensor = read(name) if change is None else change(name, read(name))
                        _fill_(slots[name], tensor, name)


def draw_weights_(module: nn.Module, seed: int, prefix: str = "") -> None:
    """Fill a module with random weights of ordinary size, where they are: for measuring, not for pictures.

    Matrices keep the variance of what goes through them, norms scale by one, biases are zero.

    Args:
        module: on any device but meta.
        seed: the same weights for one seed on one kind of device.
        prefix: the name of the module in the model that it is a part of.
    """

    def draw_(matrix: Tensor, name: str) -> None:
        # Of its name, so that a part of a model gets what it gets with all of it.
        drawn_from = crc32(f"{seed} {name}".encode())
        generator = torch.Generator(matrix.device).manual_seed(drawn_from)
        matrix.normal_(0.0, matrix[0].numel() ** -0.5, generator=generator)

    with torch.no_grad():
        for path, owner in module.named_modules(prefix=prefix):
            for name, parameter in owner.named_parameters(path, recurse=False):
                if isinstance(owner, QuantizedLinear) and not name.endswith("bias"):
                    continue
                if parameter.ndim < 2:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    draw_(parameter, name)
            if isinstance(owner, QuantizedLinear):
                plain = torch.empty_like(owner.weight, device=owner.codes.device)
                draw_(plain, f"{path}.weight")
                owner.quantize_(plain)


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in one file.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return set(_names(path))


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in one file, by name.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    return {name: shape for name, (shape, _) in _names(path).items()}


@contextmanager
def opened(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Gives a function from the name of a tensor to the tensor, mapped into memory."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    else:
        yield read_tensors(path).__getitem__


def _names(path: Path) -> Names:
    if not is_file(path):
        raise CheckpointError(f"there is no checkpoint {path}")
    check_content(path)
    if path.suffix != ".safetensors":
        return {n: (tuple(t.shape), t.dtype in FLOATS.values()) for n, t in read_tensors(path).items()}
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {n: (tuple(s.get_shape()), s.get_dtype() in FLOATS) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or not a safetensors file: {_line(error)}") from None


def _problems(slots: Mapping[str, WeightSlot], found: Names, unused: Sequence[str]) -> Iterator[str]:
    """What is wrong, tensors that differ in a number only (those of all layers) put together."""
    yield from _grouped((name, f"{s.wanted} is missing") for name, s in slots.items() if name not in found)
    yield from _grouped(
        (name, f"{shape} is unexpected")
        for name, (shape, _) in found.items()
        if name not in slots and not any(fnmatchcase(name, pattern) for pattern in unused)
    )
    yield from _grouped(
        (name, f"has shape {found[name][0]}, the model wants {slot.wanted}")
        for name, slot in slots.items()
        if name in found and found[name][0] != slot.wanted
    )
    yield from _grouped(
        (name, "is quantised or not of floating-point numbers; the model wants plain weights")
        for name, slot in slots.items()
        if name in found and slot.target.is_floating_point() and not found[name][1]
    )


def _grouped(problems: Iterable[tuple[str, str]]) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for name, problem in problems:
        groups.setdefault((re.sub(r"(?<=\.)\d+(?=\.)", "*", name), problem), []).append(name)
    for (pattern, problem), names in groups.items():
        yield f"{names[0] if len(names) == 1 else f'{pattern} ({len(names)} of them)'} {problem}"


def _parts(names: list[str], facts: Names) -> Iterator[list[str]]:
    """The names in groups of about equal numbers of elements, none of which is more than one tensor over."""
    sizes = {name: torch.Size(facts[name][0]).numel() for name in names}
    most, part, held = sum(sizes.values()) // OPENINGS, list[str](), 0
    for name in names:
        if part and held + sizes[name] > most:
            yield part
            part, held = [], 0
        part.append(name)
        held += sizes[name]
    if part:
        yield part


def _fill_(slot: WeightSlot, tensor: Tensor, name: str) -> None:
    converted = tensor if slot.convert is None else slot.convert(tensor)
    if converted.shape != slot.target.shape:  # copy_ would broadcast
        raise ValueError(
            f"{name} is converted to {tuple(converted.shape)}, its target is {tuple(slot.target.shape)}"
        )
    if slot.take is None:
        slot.target.copy_(converted)
    else:
        slot.take(converted)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "no tensors"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
