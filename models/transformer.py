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
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arkv.attention import causal_attention
from arkv.models.rope import rotate


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
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.kv_heads} key heads do not divide {self.heads} query heads")


class RMSNorm(nn.Module):
    """Divide by the root mean square over the last axis, in float32, then scale."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` to the same shape and dtype."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Block(nn.Module):
    """One pre-norm transformer block, cut in two at its attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        inner = config.heads * config.head_dim
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.qkv = nn.Linear(config.width, inner + 2 * config.kv_heads * config.head_dim, bias=False)
        self.output = nn.Linear(inner, config.width, bias=False)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        self.gate_up = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

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
        query, key, value = projected.split([self.heads, self.kv_heads, self.kv_heads], dim=-2)
        return rotate(query, rotation), rotate(key, rotation), value

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
