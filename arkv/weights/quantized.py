"""Linear layers with weights in eight or four bits, in place of those of a model's blocks.

What is not in a block stays as it is: embeddings, the head, the picture decoder. So do norms.

A product of few rows reads the codes as they are: PyTorch's own product on the CPU, a kernel of ours on CUDA
(`arkv.weights.products`). Where there is neither, or where rows are many, the plain matrix is made first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from arkv.errors import ArkvError
from arkv.model import Model
from arkv.weights import int4_order, products
from arkv.weights.packing import Packable
from arkv.weights.quantization import (
    WeightDtype,
    can_quantize,
    codes_shape,
    dequantize,
    group_of,
    parts_of,
    quantize,
    scales_shape,
)

CPU_DTYPE = torch.bfloat16
"""What PyTorch's products for the CPU are fast with; float32 and float16 they take a number at a time."""

FEW_ON_CPU = 16
"""Rows up to which its product with eight bits beats one with the plain matrix, made anew every time."""


class QuantizedLinear(Packable):
    """A linear layer whose weight is codes and scales (see `arkv.weights.quantization`).

    Codes of four bits on a CPU are packed for its product by `pack_`, and plain codes again for whoever saves
    or moves them.

    Args:
        in_features: numbers of an input.
        out_features: numbers of an output.
        bias: added to the output, or None.
        weights: how the weight is stored.
        dtype: of the scales, and of what goes in and out.
        device: where they are.

    Attributes:
        scales: of `scales_shape`.
        codes: of `codes_shape`.
        weight: shape and dtype of the plain weight, on the meta device: it says where parts of it go.
    """

    packed_name = "codes"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None,
        weights: WeightDtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weights = in_features, out_features, weights
        shape = (out_features, in_features, weights)
        stored = torch.int8 if weights == "int8" else torch.uint8
        self.scales = _constant(torch.empty(scales_shape(*shape), dtype=dtype, device=device))
        self.codes = _constant(torch.empty(codes_shape(*shape), dtype=stored, device=device))
        self.bias = bias
        self.weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        rows = input.flatten(0, -2)
        if self.packed:
            group = self.in_features // len(self.scales)
            output = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.codes, group, self.scales)
        elif self._reads_codes_on_cpu(rows):
            output = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scales)
        elif products.serves(rows):
            output = products.small_product(rows, self.codes, self.scales)
        elif self.weights == "int8" and rows.dtype != torch.float16:  # which may overflow before it is scaled
            output = F.linear(rows, self.codes.to(rows.dtype)) * self.scales
        else:
            return F.linear(input, self.dequantized(), self.bias)
        output = output.unflatten(0, input.shape[:-1])
        return output if self.bias is None else output + self.bias

    def _reads_codes_on_cpu(self, rows: Tensor) -> bool:
        is_few = rows.dtype == CPU_DTYPE and len(rows) <= FEW_ON_CPU
        return self.weights == "int8" and rows.device.type == "cpu" and is_few

    def dequantized(self) -> Tensor:
        """The weight that the codes stand for, `[out_features, in_features]`."""
        codes = self._unpack(self.codes) if self.packed else self.codes
        return dequantize(codes, self.scales, self.weights)

    def quantize_(self, matrix: Tensor, first: int = 0) -> None:
        """Set some rows of the weight, a part at a time.

        Args:
            matrix: floating point `[rows, in_features]`, on any device.
            first: row of the weight that its first row is.
        """
        for start, part in parts_of(matrix):
            codes, scales = quantize(part.to(self.codes.device), self.weights, self.scales.dtype)
            rows = slice(first + start, first + start + len(part))
            self.codes[rows] = codes
            self.scales[(rows,) if self.weights == "int8" else (slice(None), rows)] = scales

    def can_pack(self) -> bool:
        """Whether PyTorch has a fast product for the CPU that wants these codes in another order."""
        return self.weights == "int4" and self.codes.device.type == "cpu" and self.scales.dtype == CPU_DTYPE

    def _pack(self, tensor: Tensor) -> Tensor:
        return int4_order.pack(tensor)

    def _unpack(self, tensor: Tensor) -> Tensor:
        return int4_order.unpack(tensor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        applied = super()._apply(fn, recurse)
        self.weight = self.weight.to(self.scales.dtype)
        return applied

    def extra_repr(self) -> str:
        """Sizes and storage."""
        group = f", group={group_of(self.in_features)}" if self.weights == "int4" else ""
        return f"{self.in_features}, {self.out_features}, weights={self.weights}{group}"


def quantize_(model: Model, weights: WeightDtype) -> None:
    """Put a `QuantizedLinear` in place of every linear layer of the blocks whose weight can be stored so.

    Layer by layer, so that no more than one weight is there twice. On the meta device there is nothing to
    round: what is read afterwards is rounded on its way (see `layers`).

    Args:
        model: with plain weights, or on the meta device.
        weights: how to store them.

    Raises:
        ArkvError: there is no layer whose weight can be stored so.
    """
    for parent, name, layer in [*_linear_layers(model)]:
        if not can_quantize(layer.out_features, layer.in_features, weights):
            continue
        if isinstance(layer, Packable):
            layer.unpack_()
        weight = layer.weight.detach()
        shape = (layer.in_features, layer.out_features, layer.bias)
        small = QuantizedLinear(*shape, weights, weight.dtype, weight.device)
        if not weight.is_meta:
            small.quantize_(weight)
        setattr(parent, name, small)
    if next(layers(model), None) is None:
        raise ArkvError(
            f"weights is {weights!r}, and no layer of {model.spec.name} can be stored so: leave it out"
        )


def layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Name and layer of everything that is quantised in a model."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name, module


def _linear_layers(model: Model) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Every linear layer of the blocks, with the module that has it and its name there."""
    for block in model.blocks:
        for parent in block.modules() if isinstance(block, nn.Module) else ():
            for name, child in parent.named_children():
                if isinstance(child, nn.Linear):
                    yield parent, name, child


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
