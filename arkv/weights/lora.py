"""LoRA adapters as peft saves them, merged into the plain weights while these are read.

An adapter (arXiv 2106.09685) is two narrow matrices for each of some weights: `B A`, times a scale, is added
to the weight. Merged, it costs nothing when pictures are drawn, and weights are rounded after it.
Everything is checked before a weight is read, and a field of the configuration that nobody here knows is
refused: it may change every number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor

from arkv.errors import CheckpointError
from arkv.weights.checkpoint import WeightSlot, opened, tensor_shapes
from arkv.weights.files import is_file, read_config
from arkv.weights.hub import fetch

CONFIG_FILE, WEIGHT_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the name that a module has in the model."""

DESCRIBED = (
    # What it was made from and for; which of these modules have matrices, the file says.
    *("peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision"),
    *("inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform"),
    *("layers_pattern", "megatron_core", "runtime_config", "init_lora_weights", "ensure_weight_tying"),
    *("eva_config", "qalora_group_size"),
)
"""Fields that change nothing in the merged weights."""

COMPUTED = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")

CHANGED_BASES = ("pissa", "olora", "loftq", "corda", "lora_ga")
"""Beginnings of values of `init_lora_weights` after which the adapter is for other base weights."""

IDENTITY: Mapping[str, tuple[Any, ...]] = {"bias": ("none",)}
"""Fields that have to have one of these values, or none."""


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        path: its folder.
        scales: of the product, by the name of the weight in the checkpoint.
        shapes: rows and columns of those weights.
    """

    path: Path
    scales: Mapping[str, float]
    shapes: Mapping[str, tuple[int, int]]

    def check(self, slots: Mapping[str, WeightSlot], unused: Sequence[str]) -> None:
        """Refuse an adapter of another model, or one that would change no picture.

        Args:
            slots: where the weights go, by their names in the checkpoint.
            unused: patterns of names that the checkpoint has and the model does not use, such as the encoder
                of pictures that a prompt may show; what an adapter adds to them is passed over.

        Raises:
            CheckpointError: the checkpoint has not all of its weights, or in another shape, or all of them
                are unused.
        """
        used = [name for name in self.shapes if not any(fnmatchcase(name, pattern) for pattern in unused)]
        if not used:
            raise CheckpointError(
                f"the adapter {self.path} is for {_some(list(self.shapes))} only, which no picture is drawn "
                "with: leave it out"
            )
        if absent := [name for name in used if name not in slots]:
            raise CheckpointError(
                f"the adapter {self.path} is for {_some(absent)}, which the checkpoint has not; it has "
                f"{_some(sorted(set(slots) - set(self.shapes)))}: it was trained on another model or layout"
            )
        for name in used:
            shape = self.shapes[name]
            if slots[name].wanted != shape:
                raise CheckpointError(
                    f"the adapter {self.path} is for a {name} of shape {shape}, the model's is "
                    f"{slots[name].wanted}: it was trained on another model"
                )

    @contextmanager
    def merging(self) -> Iterator[Callable[[str, Tensor], Tensor]]:
        """Gives what adds the adapter to a weight, by its name in the checkpoint, in float32.

        Weights that the adapter has nothing for stay as they are.
        """
        with opened(self.path / WEIGHT_FILE) as read:

            def merged(name: str, weight: Tensor) -> Tensor:
                if name not in self.scales:
                    return weight
                down, up = (read(key).float() for key in _keys(name))
                return weight.float().addmm(up, down, alpha=self.scales[name])

            yield merged


def read_adapter(source: str | Path, token: str | None = None) -> Adapter:
    """Look at an adapter.

    Args:
        source: folder, or name of a repository on the hub, with `adapter_config.json` and
            `adapter_model.safetensors`.
        token: for the hub.

    Raises:
        CheckpointError: it is not there, damaged, no LoRA, or of a kind that is not merged here.
    """
    folder = fetch(source, (CONFIG_FILE, WEIGHT_FILE), token=token)
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder with {CONFIG_FILE} and {WEIGHT_FILE}")
    config = read_config(folder / CONFIG_FILE)
    _check_config(config, folder)
    if not is_file(folder / WEIGHT_FILE):
        raise CheckpointError(f"{folder} has no {WEIGHT_FILE}: save the adapter with safe_serialization=True")
    shapes = tensor_shapes(folder / WEIGHT_FILE)
    wanted = [key for key in shapes if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if wanted or not shapes:
        raise CheckpointError(
            f"the adapter {folder} has {_some(wanted)}: only matrices lora_A and lora_B of linear layers "
            "can be merged"
        )
    modules = sorted({key.rpartition(".lora_")[0] for key in shapes})
    scales, bases = {}, {}
    for module in modules:
        name = f"{module.removeprefix(PREFIX)}.weight"
        down, up = (shapes.get(key) for key in _keys(name))
        if not module.startswith(PREFIX) or down is None or up is None:
            raise CheckpointError(f"the adapter {folder} is not complete: {module} lacks one of its matrices")
        rank, alpha = _rank_and_alpha(config, name.removesuffix(".weight"))
        if len(down) != 2 or len(up) != 2 or not down[0] == up[1] == rank:
            raise CheckpointError(
                f"the adapter {folder} has matrices of shape {down} and {up} for {name}, and rank {rank} "
                "in its configuration"
            )
        scales[name] = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        bases[name] = (up[0], down[1])
    return Adapter(folder, scales, bases)


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` for what is no plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{folder} is no LoRA: its configuration has the peft_type {kind!r:.60}")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGED_BASES):
        raise CheckpointError(
            f"the adapter {folder} was begun by {start!r:.60}, which changes the base weights: save it with "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    for field, value in config.items():
        if field in (*DESCRIBED, *COMPUTED) or value in (None, False, {}, []):
            continue
        if value not in IDENTITY.get(field, ()):
            raise CheckpointError(
                f"the adapter {folder} has {field} {value!r:.60} in its configuration, which cannot be "
                "merged: merge it with peft's merge_and_unload and give the checkpoint that it saves"
            )
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise CheckpointError(f"the adapter {folder} has a {field} that is no object")


def _rank_and_alpha(config: Mapping[str, Any], module: str) -> tuple[int, float]:
    """As peft finds them: of the first pattern that the end of the module's name matches, else the common."""
    found = []
    for field, patterns in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        named = config.get(patterns) or {}
        try:
            key = next((key for key in named if re.match(rf"(.*\.)?({key})$", module)), None)
        except re.error as error:
            raise CheckpointError(f"the adapter's {patterns} has a pattern that is none: {error}") from None
        value = config.get(field) if key is None else named[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise CheckpointError(
                f"the adapter's {field} of {module} is {value!r:.60}: expected a number above 0"
            )
        found.append(value)
    return int(found[0]), float(found[1])


def _keys(name: str) -> tuple[str, str]:
    module = f"{PREFIX}{name.removesuffix('.weight')}"
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "no tensors"
