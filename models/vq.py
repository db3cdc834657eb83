"""The picture decoder that all families share: from codes of a VQGAN to pixels.

A codebook, a 1 x 1 convolution, and the convolutional decoder of taming-transformers (VQGAN, arXiv
2012.09841). LlamaGen (arXiv 2406.06525) normalises the rows of the codebook to length one and
attends to the whole picture at the lowest resolution, and Janus-Pro took its decoder over; Chameleon (arXiv
2405.09818, section 2.1) does neither. Emu3.5 has the attention alone. Emu3 and Lumina-mGPT 2.0 have it, and
norms that see the codes (`arkv.models.movq`). The encoder is not needed and not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from arkv.errors import NumericalError
from arkv.models.movq import NORM_GROUPS, FirstFrame, PlainNorm, SpatialNorm
from arkv.models.vq_names import Layout, file_name, slot_of
from arkv.weights.checkpoint import WeightSlot

Rounding = Literal["nearest", "even", "down"]
"""How a family makes whole numbers of its colours: LlamaGen to the nearest, Lumina-mGPT 2.0 to the nearest
and a half to the even one, the others downwards."""

UNUSED = ("encoder.*", "quant_conv.*", "quantize.codebook_used", "loss.*", "*.num_batches_tracked")
"""Patterns of the tensors of a checkpoint that only its encoder and its training use."""

MOST_LEVELS, MOST_BLOCKS, MOST_CHANNELS = 8, 64, 2**16
"""Bounds beyond all picture decoders there are: a file with other numbers is not built."""

# Half a GiB, and three of them are held.
MOST_NUMBERS = 2**27
"""Numbers in the widest activation of what is decoded at a time, whole pictures and at least one: bounds the
memory, not the pictures."""


@dataclass(frozen=True)
class VQConfig:
    """Shape of a picture decoder; the defaults are LlamaGen's VQ-16, which Janus-Pro has too.

    Attributes:
        codes: rows of the codebook.
        code_dim: width of one.
        latent: channels that enter the decoder.
        channels: channels at full resolution, before the multiplier; all channels are divisible by 32.
        multipliers: of the channels by level, the highest resolution first; each level but the first
            doubles the sides of the picture.
        blocks: residual blocks of a level.
        normalised: whether codes are scaled to length one.
        attention: whether there is attention after every block of the lowest resolution, and not only
            in the middle.
        spatial: whether norms see the codes.
        doublings: of the frames, for a decoder of films; its picture is the first frame. None for a decoder
            of pictures.
        mean: of the colours red, green and blue, on a scale from 0 to 1.
        std: of the same: a colour is what the decoder says times this, plus the mean.
    """

    codes: int = 16384
    code_dim: int = 8
    latent: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    normalised: bool = True
    attention: bool = True
    spatial: bool = False
    doublings: int | None = None
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        numbers = (self.codes, self.code_dim, self.latent, self.channels, self.blocks, *self.multipliers)
        if not self.multipliers or any(type(number) is not int or number < 1 for number in numbers):
            raise ValueError(f"{self}: expected whole numbers, at least 1")
        if len(self.multipliers) > MOST_LEVELS or self.blocks > MOST_BLOCKS:
            raise ValueError(f"more than {MOST_LEVELS} levels, or more than {MOST_BLOCKS} blocks of one")
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        if any(width % NORM_GROUPS or width > MOST_CHANNELS for width in widths):
            raise ValueError(
                f"levels of {widths} channels: expected multiples of {NORM_GROUPS}, {MOST_CHANNELS} at most"
            )
        if self.doublings is not None and (not 0 <= self.doublings <= MOST_LEVELS or not self.spatial):
            raise ValueError(
                f"{self.doublings} doublings of frames: expected {MOST_LEVELS} at most, and spatial norms"
            )
        if self.doublings is not None and self.code_dim != self.latent:
            raise ValueError(
                f"codes of {self.code_dim} numbers and {self.latent} channels: the same layers are for both"
            )

    @property
    def scale(self) -> int:
        """Pixels along the side of one code."""
        return int(2 ** (len(self.multipliers) - 1))

    @property
    def widest(self) -> int:
        """Channels at full resolution, at most: what is brought up there has those of the level below."""
        return self.channels * max(self.multipliers[:2])

    def norm(self, channels: int) -> nn.Module:
        """One of the norms that the decoder has everywhere."""
        return SpatialNorm(channels, self.code_dim) if self.spatial else PlainNorm(channels)


VQ16 = VQConfig()
"""LlamaGen's and Janus-Pro's: 16 pixels a code along each side."""

VQ8 = VQConfig(multipliers=(1, 2, 2, 4))
"""LlamaGen's finer one: 8 pixels a code along each side."""

CHAMELEON_VQ = VQConfig(codes=8192, code_dim=256, normalised=False, attention=False)
"""Chameleon's, which Lumina-mGPT draws with."""

MOVQ = VQConfig(code_dim=4, latent=4, channels=256, multipliers=(1, 2, 2, 4), normalised=False, spatial=True)
"""MoVQGAN's of 270 M parameters, encoder included, which Lumina-mGPT 2.0 draws with: 8 pixels a code."""


class ResidualBlock(nn.Module):
    """Two times norm, swish and 3 x 3 convolution, added to the input."""

    def __init__(self, config: VQConfig, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = config.norm(channels), config.norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to `[pictures, out, height, width]`.

        Args:
            x: activations.
            vectors: `[pictures, code_dim, rows, columns]` of the codes, for norms that look at them.
        """
        inner = self.conv1(F.silu(self.norm1(x, vectors)))
        inner = self.conv2(F.silu(self.norm2(inner, vectors)))
        return inner + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Every place of the picture looks at every other, with one head; added to the input."""

    def __init__(self, config: VQConfig, channels: int) -> None:
        super().__init__()
        self.norm = config.norm(channels)
        self.q, self.k, self.v, self.projection = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to the same shape; `vectors` as for `ResidualBlock`."""
        normed = self.norm(x, vectors)
        query, key, value = (
            rearrange(part(normed), "n c h w -> n (h w) c") for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.projection(rearrange(attended, "n (h w) c -> n c h w", h=x.shape[2]))


class Level(nn.Module):
    """The blocks of one resolution, and the step up to the next."""

    def __init__(self, config: VQConfig, channels: int, out: int, attention: bool, last: bool) -> None:
        super().__init__()
        blocks = config.blocks
        self.blocks = nn.ModuleList(ResidualBlock(config, out if i else channels, out) for i in range(blocks))
        self.attention = nn.ModuleList(AttentionBlock(config, out) for _ in range(blocks if attention else 0))
        self.upsample = None if last else nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to `out` channels, twice the size but for the last level."""
        for i, block in enumerate(self.blocks):
            x = block(x, vectors)
            if self.attention:
                x = self.attention[i](x, vectors)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0))


class Decoder(nn.Module):
    """From latent channels at the resolution of the codes to red, green and blue."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        lowest, last = channels[0], len(channels) - 1
        self.conv_in = nn.Conv2d(config.latent, lowest, 3, padding=1)
        self.middle = nn.ModuleList(
            [
                ResidualBlock(config, lowest, lowest),
                AttentionBlock(config, lowest),
                ResidualBlock(config, lowest, lowest),
            ]
        )
        self.levels = nn.ModuleList(
            Level(config, channels[max(i - 1, 0)], out, config.attention and i == 0, i == last)
            for i, out in enumerate(channels)
        )
        self.norm_out = config.norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        """`[pictures, latent, rows, columns]` to `[pictures, 3, height, width]`; `vectors` as for blocks."""
        x = self.conv_in(x)
        for part in (*self.middle, *self.levels):
            x = part(x, vectors)
        return cast(Tensor, self.conv_out(F.silu(self.norm_out(x, vectors))))


class VQDecoder(nn.Module):
    """Draws pictures from codes, on a raster of any size.

    Its weights stay in float32 whatever dtype it is moved to: they are few beside those of the transformer,
    and rounding them would be seen.

    Args:
        config: the shape; `VQ16`, `VQ8`, `CHAMELEON_VQ` and `MOVQ` are published ones.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codes, config.code_dim)
        self.post_quant = nn.Conv2d(config.code_dim, config.latent, 1)
        doublings = config.doublings
        self.first_frame = (
            None if doublings is None else FirstFrame(config.latent, config.blocks - 1, doublings)
        )
        self.decoder = Decoder(config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def exact(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(exact, recurse)  # type: ignore[no-untyped-call]

    def forward(self, codes: Tensor) -> Tensor:
        """Decode pictures at once.

        Args:
            codes: int64 `[pictures, rows, columns]`.

        Returns:
            float32 `[pictures, 3, height, width]`, about -1 to 1, not clamped.
        """
        vectors = self.codebook(codes)
        if self.config.normalised:
            vectors = F.normalize(vectors, dim=-1)
        vectors = rearrange(vectors, "n h w c -> n c h w")
        latent = self.post_quant(vectors)
        if self.first_frame is not None:
            latent, vectors = self.first_frame(latent), self.first_frame(vectors)
        return self.decoder(latent, vectors)

    @torch.no_grad()
    def pixels(self, codes: Tensor, rounding: Rounding) -> Tensor:
        """Draw any number of pictures, as many at a time as `MOST_NUMBERS` has room for.

        Args:
            codes: int64 `[pictures, rows, columns]`, on any device.
            rounding: as the family has it.

        Returns:
            uint8 `[pictures, height, width, 3]` on the CPU.

        Raises:
            NumericalError: a colour is NaN or infinite, which as a whole number would be black.
        """
        size = codes.shape[1] * codes.shape[2] * self.config.scale**2 * self.config.widest
        parts = codes.to(self.codebook.weight.device).split(max(1, MOST_NUMBERS // size))
        return torch.cat([self._colours(_finite(self(part)), rounding).cpu() for part in parts])

    def _colours(self, pixels: Tensor, rounding: Rounding) -> Tensor:
        if (mean := self.config.mean) == (std := self.config.std) == (0.5, 0.5, 0.5):
            return to_uint8(pixels, rounding)
        scale, shift = (pixels.new_tensor(numbers)[:, None, None] for numbers in (std, mean))
        return to_uint8((pixels * scale + shift) * 2 - 1, rounding)

    def weight_slots(self, layout: Layout, prefix: str = "") -> dict[str, WeightSlot]:
        """Where the tensors of a checkpoint go.

        Args:
            layout: how the checkpoint names them.
            prefix: what stands before these names.
        """
        levels = len(self.config.multipliers)
        return {
            prefix + file_name(name, layout, levels): slot_of(name, weight, layout)
            for name, weight in self.named_parameters()
        }


def _finite(pixels: Tensor) -> Tensor:
    if not pixels.isfinite().all():
        raise NumericalError(
            "the picture decoder produced NaN or infinity: its weights are damaged, or are another decoder's"
        )
    return pixels


def to_uint8(pixels: Tensor, rounding: Rounding) -> Tensor:
    """Colours as whole numbers from 0 to 255.

    Args:
        pixels: float32 `[pictures, 3, height, width]`, -1 to 1; what is outside is clamped.
        rounding: "nearest" as LlamaGen's sampling for evaluation has it, "even" as Lumina-mGPT 2.0, "down" as
            the others.

    Returns:
        uint8 `[pictures, height, width, 3]`.
    """
    scaled = pixels * 127.5 + 128 if rounding == "nearest" else (pixels + 1) / 2 * 255
    if rounding == "even":
        scaled = scaled.round()
    return rearrange(scaled.clamp(0, 255).to(torch.uint8), "n c h w -> n h w c")
