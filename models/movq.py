"""What MoVQ adds to the picture decoder of `arkv.models.vq`: norms that see the codes, and frames of a film.

In MoVQ (arXiv 2209.09002, section 3.2) every norm of the decoder is scaled and shifted, place by place, by
the vectors of the codes. Emu3 (arXiv 2409.18869, section 2.2) put layers over time in front, to decode films.
A picture is the first of the frames that they make, and the first frame depends on nothing but itself: of
every kernel only the last tap in time meets it, the others meet the emptiness before the film. So the layers
are kept in that form, as convolutions of a picture, at a quarter of the work.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NORM_GROUPS, NORM_EPS = 32, 1e-6

STATISTICS_EPS = 1e-5
"""Epsilon of the norms over time."""


class PlainNorm(nn.GroupNorm):
    """The normalisation of VQGAN, which looks at no code."""

    def __init__(self, channels: int) -> None:
        super().__init__(NORM_GROUPS, channels, NORM_EPS)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:  # type: ignore[override]
        """`[pictures, channels, height, width]` to the same shape."""
        return super().forward(x)


class SpatialNorm(nn.Module):
    """A normalisation whose scale and shift follow from the codes, place by place.

    Args:
        channels: of what is normalised.
        code_dim: width of a code's vector.
    """

    def __init__(self, channels: int, code_dim: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, NORM_EPS)
        self.scale, self.shift = (nn.Conv2d(code_dim, channels, 1) for _ in range(2))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` and vectors `[pictures, code_dim, rows, columns]`."""
        # What is said of a place is the same before places are repeated, and less work. One of the two at a
        # time: at full resolution each is as large as what is normalised.
        normed = self.norm(x) * F.interpolate(self.scale(vectors), x.shape[-2:])
        return normed + F.interpolate(self.shift(vectors), x.shape[-2:])


class StoredNorm(nn.Module):
    """Batch normalisation by the mean and the variance of the training.

    They are parameters and no buffers: they come from the checkpoint like every weight.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.mean = nn.Parameter(torch.zeros(channels), requires_grad=False)
        self.variance = nn.Parameter(torch.ones(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, rows, columns]` to the same shape."""
        return F.batch_norm(x, self.mean, self.variance, self.weight, self.bias, eps=STATISTICS_EPS)


class FrameBlock(nn.Module):
    """Two times stored norm, swish and 3 x 3 convolution, added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (StoredNorm(channels) for _ in range(2))
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, rows, columns]` to the same shape."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(inner)))


class FirstFrame(nn.Module):
    """Emu3's layers over time, as far as they make the first frame.

    Args:
        channels: of latents, and of the codes' vectors, which go through the same layers.
        blocks: residual blocks.
        doublings: steps that each double the frames; a convolution is left of each.
    """

    def __init__(self, channels: int, blocks: int, doublings: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FrameBlock(channels) for _ in range(blocks))
        self.doublings = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(doublings))

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, rows, columns]` to the same shape."""
        for block in self.blocks:
            x = block(x)
        for convolution in self.doublings:
            x = F.silu(convolution(x))
        return x
