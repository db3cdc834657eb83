"""Products of few rows with weights of eight and four bits on CUDA: an operator opaque to `torch.compile`."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

FEW = 64
"""Rows up to which reading codes beats a product with the plain matrix, which is made anew every time."""

DTYPES = (torch.bfloat16, torch.float16)


def serves(input: Tensor) -> bool:
    """Whether there is a kernel for a product with this input `[rows, columns]`."""
    on_cuda = input.device.type == "cuda" and find_spec("triton") is not None
    return on_cuda and len(input) <= FEW and input.dtype in DTYPES
