"""Products of few rows with weights of eight and four bits on CUDA: an operator opaque to `torch.compile`."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from arkv.weights.quantization import dequantize

FEW = 64
"""Rows up to which reading codes beats a product with the plain matrix, which is made anew every time."""

DTYPES = (torch.bfloat16, torch.float16)

HAS_TRITON = find_spec("triton") is not None  # looked up here: a graph that is traced cannot ask


def serves(input: Tensor) -> bool:
    """Whether there is a kernel for a product with this input `[rows, columns]`."""
    return input.device.type == "cuda" and HAS_TRITON and len(input) <= FEW and input.dtype in DTYPES


@torch.library.custom_op("arkv::small_product", mutates_args=())
def small_product(input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    """A linear layer whose weight is codes and scales, as `arkv.weights.quantization` has them.

    Args:
        input: `[rows, columns]`.
        codes: of a weight `[outer, columns]`.
        scales: in the dtype of the input.

    Returns:
        `[rows, outer]` in the dtype of the input.
    """
    return F.linear(input, dequantize(codes, scales, "int8" if codes.dtype == torch.int8 else "int4"))


@small_product.register_kernel("cuda")
def _(input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    from arkv.weights.triton_kernels import multiply

    return multiply(input, codes, scales)


@small_product.register_fake
def _(input: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
    return input.new_empty(len(input), len(codes))
