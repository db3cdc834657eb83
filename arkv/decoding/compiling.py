"""The compile modes, and what they make of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast, get_args

import torch

from arkv.errors import ArkvError
from arkv.scalars import brief

Compile = Literal["none", "inductor", "cudagraphs"]
Function = TypeVar("Function", bound=Callable[..., Any])

# Every batch shape, budget and policy is a graph of its own; Dynamo's default of eight for a function is
# soon used up by somebody who compares policies.
GRAPHS_PER_FUNCTION = 256


def check_mode(mode: str, device: torch.device) -> None:
    """Raise `ArkvError` for a compile mode that there is not, at all or on this device."""
    if not isinstance(mode, str) or mode not in get_args(Compile):
        raise ArkvError(f"compile is {brief(mode)}: expected {' or '.join(map(repr, get_args(Compile)))}")
    if mode == "cudagraphs" and device.type != "cuda":
        raise ArkvError(
            f"compile is 'cudagraphs' and the model is on {device}: take 'inductor', or a CUDA device"
        )


def compiled(function: Function, mode: Compile) -> Function:
    """The function as the compile mode wants it: itself, or one static graph for every shape.

    Dynamo's limits on the graphs of a function are raised for the whole process where they are lower.
    """
    if mode == "none":
        return function
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, GRAPHS_PER_FUNCTION)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 8 * GRAPHS_PER_FUNCTION)
    return cast(Function, torch.compile(function, fullgraph=True, dynamic=False))
