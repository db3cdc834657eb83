"""Keys and values in eight bits: one scale a slot, written once with the token and never again.

A key lies in its slot until another token overwrites both, so nothing is ever quantised twice and an error
does not grow with the length of the picture. Eviction, selection and statistics see nothing of it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from arkv.errors import ArkvError
from arkv.scalars import brief

KvDtype = Literal["int8", "fp8"]

KV_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
"""What keys and values can be stored as beside the model's own dtype."""

SCALE_DTYPE = torch.float32
"""Of the scale that every slot has then, for its key and for its value."""


def storage_dtype(kv_dtype: str | None, dtype: torch.dtype) -> torch.dtype:
    """The dtype of the stored keys and values.

    Args:
        kv_dtype: one of `KV_DTYPES`, or None for the model's own.
        dtype: the model's own.

    Raises:
        ArkvError: there is no such storage.
    """
    if kv_dtype is None:
        return dtype
    if not isinstance(kv_dtype, str) or kv_dtype not in KV_DTYPES:
        raise ArkvError(
            f"kv_dtype is {brief(kv_dtype)}: expected {' or '.join(map(repr, KV_DTYPES))}, or None"
        )
    return KV_DTYPES[kv_dtype]


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether numbers stored so need a scale."""
    return dtype in KV_DTYPES.values()


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each vector to codes of eight bits, the largest of its numbers to the largest code.

    Args:
        x: `[..., head_dim]`, floating point.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Codes `[..., head_dim]` and scales, `SCALE_DTYPE` `[...]`; a code times its scale is the number again,
        for int8 within half a scale, for float8 within a sixteenth of it.
    """
    wide = x.to(SCALE_DTYPE)
    largest = float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)
    # A vector of zeros has codes of zero at any scale but zero.
    scale = (wide.abs().amax(-1) / largest).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
    codes = (wide / scale[..., None]).clamp(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes `[..., head_dim]` times scales `[...]`, in `dtype`; without a scale, the numbers themselves."""
    if scale is None:
        return codes.to(dtype)
    return (codes.to(SCALE_DTYPE) * scale[..., None]).to(dtype)
