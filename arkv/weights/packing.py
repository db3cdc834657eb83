"""Weights of linear layers in the order in which the CPU's matrix units read them.

A bfloat16 weight as a checkpoint has it is put in another order by oneDNN before every product. For the few
rows of a decoding step that takes as long as reading the weight, so `pack_` does it once: the products are
the same to the last bit, and a step reads its weights at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN chooses the order for a number of rows; this one serves fewer and more as well.
ROWS = 64


class Linear(nn.Linear):
    """A linear layer whose weight can be packed.

    A packed weight knows its shape and dtype, but not where its numbers are. Whoever asks for them, to save
    the weights or to move them to another device, is given the plain weight.

    Attributes:
        packed: whether it is packed. The tensor knows, too, but not while a graph is traced.
    """

    packed = False

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.packed:
            return packed_linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    def pack_(self) -> None:
        """Pack the weight, which is bfloat16 on a CPU that has `can_pack`; it takes no gradients then."""
        if not self.packed:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), ROWS)
            self.weight, self.packed = nn.Parameter(packed, requires_grad=False), True

    def unpack_(self) -> None:
        """Make the weight a plain one again."""
        if self.packed:
            self.weight, self.packed = self._plain(), False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        self.unpack_()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[f"{prefix}weight"] = self._plain().detach()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack_()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles; the copy can be packed again.
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        if self.packed:
            state["_parameters"] = state["_parameters"] | {"weight": self._plain()}
            state["packed"] = False
        return state

    def _plain(self) -> nn.Parameter:
        return nn.Parameter(self.weight.to_dense(), requires_grad=False)


def can_pack() -> bool:
    """Whether oneDNN has products of bfloat16 for this processor, which take packed weights."""
    # Elsewhere than on x86 the order may be another, and was not measured.
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_(model: nn.Module) -> None:
    """Pack what is `is_packable` among the weights of every `Linear` of a model; leave the rest as it is.

    Layer by layer, so that no more than one weight is there twice.
    """
    for module in model.modules():
        if isinstance(module, Linear) and is_packable(module.weight):
            module.pack_()


@contextmanager
def unpacked(model: nn.Module) -> Generator[None]:
    """Plain weights within; what was packed is packed again in the end, and what was taken stays plain."""
    packed = [module for module in model.modules() if isinstance(module, Linear) and module.packed]
    for module in packed:
        module.unpack_()
    try:
        yield
    finally:
        for module in packed:
            module.pack_()


def is_packable(weight: Tensor) -> bool:
    """Whether `pack_` packs it."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack()


@torch.library.custom_op("arkv::packed_linear", mutates_args=())
def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a packed weight; opaque to `torch.compile`.

    Args:
        input: bfloat16 `[..., in_features]`.
        weight: packed, `[out_features, in_features]`.
        bias: bfloat16 `[out_features]` or None.

    Returns:
        bfloat16 `[..., out_features]`.
    """
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")


@packed_linear.register_fake
def _(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])
