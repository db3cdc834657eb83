"""Weights of linear layers in the order in which the CPU's matrix units read them.

A bfloat16 weight as a checkpoint has it is put in another order by oneDNN before every product. For the few
rows of a decoding step that takes as long as reading the weight, so `pack_` does it once: the products are
the same to the last bit, and a step reads its weights at the speed of the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

# oneDNN chooses the order for a number of rows; this one serves fewer and more as well.
ROWS = 64


class Packable(nn.Module):
    """A layer with a parameter that can be put in another order, on a CPU.

    Whoever asks for it, to save the layer or to move it to another device, is given the plain one.

    Attributes:
        packed_name: what the parameter is called.
        packed: whether it is packed. The tensor knows, too, but not while a graph is traced.
    """

    packed_name: ClassVar[str]
    packed = False

    def can_pack(self) -> bool:
        """Whether there is another order for it, where it is now."""
        raise NotImplementedError

    def _pack(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def _unpack(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError

    def pack_(self) -> None:
        """Pack the parameter of a layer that can be packed; it takes no gradients then."""
        if not self.packed:
            self._set(self._pack(self._parameter.detach()), packed=True)

    def unpack_(self) -> None:
        """Make the parameter a plain one again."""
        if self.packed:
            self._set(self._plain(), packed=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.unpack_()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed:
            destination[f"{prefix}{self.packed_name}"] = self._plain()

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.unpack_()
        super()._load_from_state_dict(*arguments)

    def __getstate__(self) -> dict[str, Any]:
        # For copies and pickles; the copy can be packed again.
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        if self.packed:
            plain = nn.Parameter(self._plain(), requires_grad=False)
            state["_parameters"] = state["_parameters"] | {self.packed_name: plain}
            state["packed"] = False
        return state

    @property
    def _parameter(self) -> Tensor:
        return cast(Tensor, getattr(self, self.packed_name))

    def _plain(self) -> Tensor:
        return self._unpack(self._parameter.detach())

    def _set(self, tensor: Tensor, packed: bool) -> None:
        setattr(self, self.packed_name, nn.Parameter(tensor, requires_grad=False))
        self.packed = packed


class Linear(Packable, nn.Linear):
    """A linear layer whose weight can be packed.

    A packed weight knows its shape and dtype, but not where its numbers are.
    """

    packed_name = "weight"

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        if self.packed:
            return packed_linear(input, self.weight, self.bias)
        return F.linear(input, self.weight, self.bias)

    def can_pack(self) -> bool:
        """Whether the weight is bfloat16 on a CPU that has `can_pack`."""
        return is_packable(self.weight)

    def _pack(self, tensor: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_linear_weight(tensor, ROWS)

    def _unpack(self, tensor: Tensor) -> Tensor:
        return tensor.to_dense()


def can_pack() -> bool:
    """Whether oneDNN has products of bfloat16 for this processor, which take packed weights."""
    # Elsewhere than on x86 the order may be another, and was not measured.
    is_x86 = torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_(model: nn.Module) -> None:
    """Pack every layer of a model that can be packed; leave the rest as it is.

    Layer by layer, so that no more than one weight is there twice.
    """
    for module in model.modules():
        if isinstance(module, Packable) and module.can_pack():
            module.pack_()


@contextmanager
def unpacked(model: nn.Module) -> Generator[None]:
    """Plain weights within; what was packed is packed again in the end, and what was taken stays plain."""
    packed = [module for module in model.modules() if isinstance(module, Packable) and module.packed]
    for module in packed:
        module.unpack_()
    try:
        yield
    finally:
        for module in packed:
            module.pack_()


def is_packable(weight: Tensor) -> bool:
    """Whether `Linear` packs such a weight."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_pack()


def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`torch.nn.functional.linear` with a packed weight; opaque to `torch.compile`.

    Args:
        input: bfloat16 `[..., in_features]`.
        weight: packed, `[out_features, in_features]`.
        bias: bfloat16 `[out_features]` or None.

    Returns:
        bfloat16 `[..., out_features]`.
    """
    return torch.ops.arkv.packed_linear.default(input, weight, bias)


def _of_onednn(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(input, weight, bias, "none", [], "")


def _shaped(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _mapped(
    info: Any, dims: tuple[int | None, ...], input: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, int]:
    # One product of all rows, not one for each.
    return packed_linear(input.movedim(dims[0] or 0, 0), weight, bias), 0


def _no_gradient(context: Any, gradient: Tensor) -> Tensor:
    raise RuntimeError(
        "a packed weight passes no gradients on: take the model's plain weights, within "
        "arkv.weights.packing.unpacked(model)"
    )


# Without the wrapper of `torch.library.custom_op`, which takes as long as a product of a small model.
_LIBRARY = torch.library.Library("arkv", "FRAGMENT")
_LIBRARY.define("packed_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl(_LIBRARY, "packed_linear", "CompositeExplicitAutograd")(_of_onednn)
torch.library.register_fake("arkv::packed_linear", _shaped, lib=_LIBRARY)
torch.library.register_autograd("arkv::packed_linear", _no_gradient, lib=_LIBRARY)
torch.library.register_vmap("arkv::packed_linear", _mapped, lib=_LIBRARY)
