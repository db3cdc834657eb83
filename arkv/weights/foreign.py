"""Checkpoints that somebody else has quantised: told by their tensors' names and refused by name.

Each library rounds in its own way, and its codes are not ours. What they were made from is published nearly
always, and is rounded here while it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from arkv.errors import CheckpointError

SIGNS: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes, in four bits (NF4 or FP4)": (
        ".quant_state.bitsandbytes__nf4",
        ".quant_state.bitsandbytes__fp4",
    ),
    "bitsandbytes, in eight bits": (".SCB",),
    "GPTQ": (".g_idx",),
    "AWQ or GPTQ": (".qweight", ".qzeros"),
    "torchao": ("_weight_qdata", ".weight.qdata", ":_data", "_weight_scale_and_zero"),
    "compressed-tensors": (".weight_packed",),
    "a library for float8": (".weight_scale_inv", ".weight_scale"),
}
"""Ends of names of tensors, by who writes them; what comes first decides."""

METHODS = {
    "bitsandbytes": "bitsandbytes",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "torchao": "torchao",
    "compressed-tensors": "compressed-tensors",
    "fp8": "a library for float8",
}
"""Who writes, by the `quant_method` of a configuration."""


def check_plain(where: str, names: Iterable[str]) -> None:
    """Refuse tensors that are not plain weights.

    Args:
        where: file or folder, for the message.
        names: of its tensors.

    Raises:
        CheckpointError: says who has quantised them and what to do.
    """
    names = list(names)
    for maker, ends in SIGNS.items():
        if any(name.endswith(ends) for name in names):
            raise _refused(where, maker)


def check_config(where: str, config: Mapping[str, Any]) -> None:
    """Refuse the configuration of weights that are not plain.

    Args:
        where: file, for the message.
        config: its object.

    Raises:
        CheckpointError: as `check_plain`.
    """
    described = config.get("quantization_config")
    if described is not None:
        described = described if isinstance(described, dict) else {}
        method = described.get("quant_method")
        maker = "some library" if method is None else METHODS.get(str(method), f"the method {method!r:.60}")
        raise _refused(f"{where} says in quantization_config that the checkpoint", maker)


def _refused(where: str, maker: str) -> CheckpointError:
    return CheckpointError(
        f"{where} is quantised by {maker}, whose codes are not read: give the plain checkpoint that "
        "it was made from, and weights='int8' or 'int4' rounds it while it is read"
    )
