"""Keys and values in eight or four bits: scales a slot, written once with the token and never again.

A key lies in its slot until another token overwrites both, so nothing is ever quantised twice and an error
does not grow with the length of the picture. Eviction, selection and statistics see nothing of it.

```text
int8, fp8   a code a number, one scale a vector                              number = code * scale
int4        two codes a byte, a scale and a zero for 32 numbers of a vector   number = zero + code * scale
```
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from arkv.errors import ArkvError
from arkv.scalars import brief

KvDtype = Literal["int8", "fp8", "int4"]

PACKED = torch.uint8
"""Of two codes of four bits: the one of number `i` below that of number `i + head_dim / 2`."""

KV_DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "int4": PACKED}
"""What keys and values can be stored as beside the model's own dtype."""

SCALE_DTYPE = torch.float32
"""Of the scale that every slot has with codes of eight bits, for its key and for its value."""

GROUP = 32
"""Numbers that share a scale and a zero, with codes of four bits; all of a head that has fewer."""

GROUP_DTYPE = torch.bfloat16
"""Of the scale and the zero of a group: the range of float32, and fine enough for sixteen codes."""


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
        raise ArkvError(f"kv_dtype is {brief(kv_dtype)}: expected {', '.join(map(repr, KV_DTYPES))} or None")
    return KV_DTYPES[kv_dtype]


def can_store(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether codes of a vector fill whole bytes and groups; those of eight bits always do."""
    return dtype != PACKED or (head_dim % 2 == 0 and head_dim % min(GROUP, head_dim) == 0)


def stored_width(dtype: torch.dtype, head_dim: int) -> int:
    """Elements of a stored vector.

    Args:
        dtype: that it is stored in.
        head_dim: its numbers.

    Raises:
        ArkvError: codes of four bits do not fill whole bytes and groups.
    """
    if dtype != PACKED:
        return head_dim
    if not can_store(dtype, head_dim):
        raise ArkvError(
            f"kv_dtype is 'int4' and heads have {head_dim} numbers: expected an even number, above {GROUP} a "
            f"multiple of it; take 'int8'"
        )
    return head_dim // 2


def scale_shape(dtype: torch.dtype, head_dim: int) -> tuple[torch.dtype, tuple[int, ...]] | None:
    """Dtype and shape of what stands beside a stored vector; None where nothing does.

    Args:
        dtype: that it is stored in.
        head_dim: its numbers.

    Returns:
        With codes of four bits the scales of all groups, then their zeros.
    """
    if dtype == PACKED:
        return GROUP_DTYPE, (2 * max(1, head_dim // GROUP),)
    return (SCALE_DTYPE, ()) if is_quantized(dtype) else None


def slot_bytes(dtype: torch.dtype, head_dim: int) -> int:
    """Bytes of a stored vector, with what stands beside it."""
    beside = scale_shape(dtype, head_dim)
    scales = 0 if beside is None else beside[0].itemsize * math.prod(beside[1])
    return stored_width(dtype, head_dim) * dtype.itemsize + scales


def is_quantized(dtype: torch.dtype) -> bool:
    """Whether numbers stored so need a scale."""
    return dtype in KV_DTYPES.values()


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Round each vector to codes, the largest of its numbers, or of a group of them, to the largest code.

    Args:
        x: `[..., head_dim]`, floating point.
        dtype: of `KV_DTYPES`.

    Returns:
        Of eight bits, codes `[..., head_dim]` and scales, `SCALE_DTYPE` `[...]`; a code times its scale is
        the number again, for int8 within half a scale, for float8 within a sixteenth of it. Of four bits,
        bytes `[..., head_dim / 2]`, and `GROUP_DTYPE` `[..., 2 groups]`, the scales and then the zeros; the
        number comes back within half a scale and a hundredth of its group's largest; finite up to 1.6e38 and,
        in float16, 65,000.
    """
    if dtype == PACKED:
        return _packed(x.to(SCALE_DTYPE))
    wide = x.to(SCALE_DTYPE)
    largest = float(torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max)
    # A vector of zeros has codes of zero at any scale but zero.
    scale = (wide.abs().amax(-1) / largest).clamp(min=torch.finfo(SCALE_DTYPE).tiny)
    codes = (wide / scale[..., None]).clamp(-largest, largest)
    return (codes if dtype.is_floating_point else codes.round()).to(dtype), scale


def dequantize(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers again, `[..., head_dim]` in `dtype`, from what `quantize` returned; as they are without."""
    if scale is None:
        return codes.to(dtype)
    if codes.dtype == PACKED:
        return _unpacked(codes, scale).to(dtype)
    return (codes.to(SCALE_DTYPE) * scale[..., None]).to(dtype)


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    groups = x.unflatten(-1, (max(1, x.shape[-1] // GROUP), -1))
    least, most = groups.aminmax(dim=-1)
    # Fractions first: the difference of two large numbers may be more than there is.
    step = (most / 15 - least / 15).clamp(min=torch.finfo(GROUP_DTYPE).tiny).to(GROUP_DTYPE)
    largest = torch.finfo(GROUP_DTYPE).max
    zero = least.clamp(-largest, largest).to(GROUP_DTYPE)
    # Codes are found for the scale and the zero as they are stored.
    wide = (groups - zero[..., None].float()) / step[..., None].float()
    low, high = wide.flatten(-2).round().clamp(0, 15).to(PACKED).chunk(2, dim=-1)
    return low | (high << 4), torch.cat([step, zero], dim=-1)


def _unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    wide = torch.cat([codes & 15, codes >> 4], dim=-1).to(SCALE_DTYPE)
    step, zero = scales.to(SCALE_DTYPE).chunk(2, dim=-1)
    groups = wide.unflatten(-1, (step.shape[-1], -1))
    return (groups * step[..., None] + zero[..., None]).flatten(-2)
