"""The decoder-only transformer that every model family shares.

Unusual on purpose: a block is cut in two at its attention. `Block.project` gives queries, keys and
values, `Block.merge` takes what attention returned. Between the two stands whoever owns the keys: the
causal pass of this file (training, prefill, reference) or the runtime with its slot store. So one set
of weights serves both and the model knows nothing of caches.

RMSNorm (arXiv 1910.07467) before each half, SwiGLU (arXiv 2002.05202), grouped heads (arXiv
2305.13245), no biases; queries, keys and values are one projection, gate and up are another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arkv.attention.reference import causal_attention
from arkv.models.rope import rotate
from arkv.weights.checkpoint import WeightSlot
from arkv.weights.packing import Linear

MOST_WIDTH, MOST_LAYERS = 2**17, 1024
"""Bounds of any size, and of the layers: beyond all models there are, so that a file cannot ask for more."""

HEAD_NORM_EPS = 1e-5
"""Epsilon of the normalisation of queries and keys, which Chameleon sets apart from that of its RMSNorms."""


HeadNorms = Literal[False, "layer", "rms"]


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a transformer.

    Attributes:
        layers: number of blocks.
        width: size of the residual stream.
        heads: query heads.
        kv_heads: key and value heads; divides `heads`.
        head_dim: width of one head.
        hidden: width of the SwiGLU inside.
        norm_eps: epsilon of every RMSNorm.
        qk_norm: how queries and keys are normalised before they are rotated: "layer" by a `HeadNorm`, as in
            Chameleon; "rms" by an `RMSNorm` that all heads of a layer share, as in Qwen3; False for not.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm_eps: float = 1e-6
    qk_norm: HeadNorms = False

    def __post_init__(self) -> None:
        for field in ("layers", "width", "heads", "kv_heads", "head_dim", "hidden"):
            value = getattr(self, field)
            if type(value) is not int or not 1 <= value <= MOST_WIDTH:
                raise ValueError(f"{field} is {value!r:.40}: expected a whole number from 1 to {MOST_WIDTH}")
        eps = self.norm_eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 <= eps < 1:
            raise ValueError(f"norm_eps is {eps!r:.40}: expected a number from 0 to 1")
        if self.layers > MOST_LAYERS:
            raise ValueError(f"layers is {self.layers}: expected at most {MOST_LAYERS}")
        if self.qk_norm not in ("layer", "rms", False):
            raise ValueError(f"qk_norm is {self.qk_norm!r:.40}: expected 'layer', 'rms' or False")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key heads do not divide {self.heads} query heads")


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, at least in float32, then scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape and dtype."""
        # The scale is not left to torch: it multiplies before it rounds, and published models after.
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class HeadNorm(nn.Module):
    """LayerNorm within each head, then a scale and a shift of the head's own.

    Keeps the norms of queries and keys from growing in training (Chameleon, arXiv 2405.09818, section 2.3).

    Args:
        heads: number of heads.
        head_dim: width of one.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, head_dim))
        self.bias = nn.Parameter(torch.zeros(heads, head_dim))

    def forward(self, x: Tensor) -> Tensor:
        """`[..., heads, head_dim]` to the same shape and dtype."""
        return F.layer_norm(x, x.shape[-1:], eps=HEAD_NORM_EPS) * self.weight + self.bias


def _head_norm(config: TransformerConfig, heads: int) -> nn.Module | None:
    if config.qk_norm == "layer":
        return HeadNorm(heads, config.head_dim)
    return RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm == "rms" else None


class Block(nn.Module):
    """One pre-norm transformer block, cut in two at its attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        inner = config.heads * config.head_dim
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = Linear(config.width, inner + 2 * config.kv_heads * config.head_dim, bias=False)
        self.query_norm, self.key_norm = (_head_norm(config, heads) for heads in (self.heads, self.kv_heads))
        self.output = Linear(inner, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_up = Linear(config.width, 2 * config.hidden, bias=False)
        self.down = Linear(config.hidden, config.width, bias=False)

    def project(self, hidden: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of new tokens, rotated to their positions.

        Args:
            hidden: `[rows, tokens, width]`.
            rotation: float32 `[rows or 1, tokens, head_dim]`, cosines then sines.

        Returns:
            Queries `[rows, tokens, heads, head_dim]`, keys and values `[rows, tokens, kv_heads, head_dim]`.
        """
        projected = self.qkv(self.attention_norm(hidden))
        projected = projected.unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            query, key, value = projected.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
            return rotate(self.query_norm(query), rotation), rotate(self.key_norm(key), rotation), value
        # Both at once: run eagerly, a step of a small model is as long as its list of operations.
        both, value = projected.split([self.heads + self.kv_heads, self.kv_heads], dim=-2)
        query, key = rotate(both, rotation).split([self.heads, self.kv_heads], dim=-2)
        return query, key, value

    def merge(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Add attention's result and the MLP to the residual stream.

        Args:
            hidden: `[rows, tokens, width]`, what `project` was given.
            attended: `[rows, tokens, heads, head_dim]`.

        Returns:
            `[rows, tokens, width]`.
        """
        hidden = hidden + self.output(attended.flatten(-2))
        gate, up = self.gate_up(self.mlp_norm(hidden)).chunk(2, dim=-1)
        return hidden + self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """A stack of blocks and the final norm; embedding and output head belong to the family."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, hidden: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Every position at once, under causal attention: for training and as the runtime's reference.

        Args:
            hidden: `[rows, tokens, width]` embeddings.
            rotation: float32 `[rows or 1, tokens, head_dim]`, cosines then sines.
            mask: bool `[rows, tokens]`, False where a token is padding that nobody may look at.

        Returns:
            `[rows, tokens, width]` after the final norm.
        """
        for block in cast("list[Block]", self.blocks):
            query, key, value = block.project(hidden, rotation)
            hidden = block.merge(hidden, causal_attention(query, key, value, mask))
        return self.norm(hidden)

    def weight_slots(self, prefix: str = "", norm_rows: int = 1) -> dict[str, WeightSlot]:
        """Where the tensors of a checkpoint go that names them as Llama and Chameleon do in transformers.

        Args:
            prefix: what stands before `layers.0.` and `norm.weight`.
            norm_rows: rows of the checkpoint's query and key norms, each of which is for an equal number of
                neighbouring heads; divides both numbers of heads.
        """
        slots = {f"{prefix}norm.weight": WeightSlot(self.norm.weight)}
        for layer, block in enumerate(cast("list[Block]", self.blocks)):
            slots |= {
                f"{prefix}layers.{layer}.{name}": slot
                for name, slot in _block_slots(block, norm_rows).items()
            }
        return slots


def _block_slots(block: Block, norm_rows: int) -> dict[str, WeightSlot]:
    kv_width = block.kv_heads * block.head_dim
    query, key, value = block.qkv.weight.split([block.heads * block.head_dim, kv_width, kv_width])
    gate, up = block.gate_up.weight.chunk(2)
    slots = {
        "input_layernorm": block.attention_norm.weight,
        "self_attn.q_proj": query,
        "self_attn.k_proj": key,
        "self_attn.v_proj": value,
        "self_attn.o_proj": block.output.weight,
        "post_attention_layernorm": block.mlp_norm.weight,
        "mlp.gate_proj": gate,
        "mlp.up_proj": up,
        "mlp.down_proj": block.down.weight,
    }
    named = {f"{name}.weight": WeightSlot(weight) for name, weight in slots.items()}
    for name, norm in (("q_norm", block.query_norm), ("k_norm", block.key_norm)):
        for kind, weight in () if norm is None else norm.named_parameters():
            is_shared = weight.ndim == 1  # by all heads, here as in the file
            slot = WeightSlot(weight) if is_shared else _spread_rows(weight, norm_rows)
            named[f"self_attn.{name}.{kind}"] = slot
    return named


def _spread_rows(target: Tensor, rows: int) -> WeightSlot:
    """A slot for fewer rows than the target's, each repeated."""
    repeats = len(target) // rows
    return WeightSlot(target, lambda weight: weight.repeat_interleave(repeats, 0), (rows, target.shape[1]))
