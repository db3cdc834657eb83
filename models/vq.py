"""The picture decoder that all three families share: from codes of a VQGAN to pixels.

A codebook, a 1 x 1 convolution, and the convolutional decoder of taming-transformers (VQGAN, arXiv
2012.09841). LlamaGen (arXiv 2406.06525) normalises the rows of the codebook to length one and
attends to the whole picture at the lowest resolution, and Janus-Pro took its decoder over; Chameleon (arXiv
2405.09818, section 2.1) does neither. The encoder is not needed and not here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from arkv.errors import NumericalError
from arkv.weights.checkpoint import WeightSlot

Layout = Literal["llamagen", "transformers", "taming"]
"""How a checkpoint names the tensors: LlamaGen and the original Janus; Janus in transformers; Chameleon."""

Rounding = Literal["nearest", "down"]
"""How a family makes whole numbers of its colours: LlamaGen to the nearest, Janus and Chameleon downwards."""

UNUSED = ("encoder.*", "quant_conv.*", "quantize.codebook_used", "loss.*")
"""Patterns of the tensors of a checkpoint that only its encoder and its training use."""

NORM_GROUPS, NORM_EPS = 32, 1e-6

MOST_LEVELS, MOST_BLOCKS, MOST_CHANNELS = 8, 64, 2**16
"""Bounds beyond all picture decoders there are: a file with other numbers is not built."""

# The widest activations of a 1024 x 1024 picture are half a GiB each, and three of them are held.
MAX_PIXELS = 1024 * 1024
"""Pixels decoded at a time, whole pictures and at least one: bounds the memory, not the pictures."""


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
    """

    codes: int = 16384
    code_dim: int = 8
    latent: int = 256
    channels: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 3
    normalised: bool = True
    attention: bool = True

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

    @property
    def scale(self) -> int:
        """Pixels along the side of one code."""
        return int(2 ** (len(self.multipliers) - 1))


VQ16 = VQConfig()
"""LlamaGen's and Janus-Pro's: 16 pixels a code along each side."""

VQ8 = VQConfig(multipliers=(1, 2, 2, 4))
"""LlamaGen's finer one: 8 pixels a code along each side."""

CHAMELEON_VQ = VQConfig(codes=8192, code_dim=256, normalised=False, attention=False)
"""Chameleon's, which Lumina-mGPT draws with."""


class ResidualBlock(nn.Module):
    """Two times norm, swish and 3 x 3 convolution, added to the input."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = group_norm(channels), group_norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels, out, 1) if channels != out else None

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to `[pictures, out, height, width]`."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nn.Module):
    """Every place of the picture looks at every other, with one head; added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.projection = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to the same shape."""
        normed = self.norm(x)
        query, key, value = (
            rearrange(part(normed), "n c h w -> n (h w) c") for part in (self.q, self.k, self.v)
        )
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.projection(rearrange(attended, "n (h w) c -> n c h w", h=x.shape[2]))


class Level(nn.Module):
    """The blocks of one resolution, and the step up to the next."""

    def __init__(self, channels: int, out: int, blocks: int, attention: bool, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(out if i else channels, out) for i in range(blocks))
        self.attention = nn.ModuleList(AttentionBlock(out) for _ in range(blocks if attention else 0))
        self.upsample = None if last else nn.Conv2d(out, out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, channels, height, width]` to `out` channels, twice the size but for the last level."""
        for i, block in enumerate(self.blocks):
            x = block(x)
            if self.attention:
                x = self.attention[i](x)
        return x if self.upsample is None else self.upsample(F.interpolate(x, scale_factor=2.0))


class Decoder(nn.Module):
    """From latent channels at the resolution of the codes to red, green and blue."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        channels = [config.channels * multiplier for multiplier in reversed(config.multipliers)]
        lowest = channels[0]
        self.conv_in = nn.Conv2d(config.latent, lowest, 3, padding=1)
        self.middle = nn.Sequential(
            ResidualBlock(lowest, lowest), AttentionBlock(lowest), ResidualBlock(lowest, lowest)
        )
        self.levels = nn.Sequential(
            *(
                Level(
                    channels[max(i - 1, 0)],
                    out,
                    config.blocks,
                    attention=config.attention and i == 0,
                    last=i == len(channels) - 1,
                )
                for i, out in enumerate(channels)
            )
        )
        self.norm_out = group_norm(channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[pictures, latent, rows, columns]` to `[pictures, 3, height, width]`."""
        x = self.levels(self.middle(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class VQDecoder(nn.Module):
    """Draws pictures from codes, on a raster of any size.

    Its weights stay in float32 whatever dtype it is moved to: they are few beside those of the transformer,
    and rounding them would be seen.

    Args:
        config: the shape; `VQ16`, `VQ8` and `CHAMELEON_VQ` are the published ones.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.codebook = nn.Embedding(config.codes, config.code_dim)
        self.post_quant = nn.Conv2d(config.code_dim, config.latent, 1)
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
        return self.decoder(self.post_quant(rearrange(vectors, "n h w c -> n c h w")))

    @torch.no_grad()
    def pixels(self, codes: Tensor, rounding: Rounding) -> Tensor:
        """Draw any number of pictures, `MAX_PIXELS` at a time.

        Args:
            codes: int64 `[pictures, rows, columns]`, on any device.
            rounding: as the family has it.

        Returns:
            uint8 `[pictures, height, width, 3]` on the CPU.

        Raises:
            NumericalError: a colour is NaN or infinite, which as a whole number would be black.
        """
        size = codes.shape[1] * codes.shape[2] * self.config.scale**2
        parts = codes.to(self.codebook.weight.device).split(max(1, MAX_PIXELS // size))
        return torch.cat([to_uint8(_finite(self(part)), rounding).cpu() for part in parts])

    def weight_slots(self, layout: Layout, prefix: str = "") -> dict[str, WeightSlot]:
        """Where the tensors of a checkpoint go.

        Args:
            layout: how the checkpoint names them.
            prefix: what stands before these names.
        """
        levels = len(self.config.multipliers)
        return {
            prefix + file_name(name, layout, levels): WeightSlot(weight)
            for name, weight in self.named_parameters()
        }


def _finite(pixels: Tensor) -> Tensor:
    if not pixels.isfinite().all():
        raise NumericalError(
            "the picture decoder produced NaN or infinity: its weights are damaged, or are another decoder's"
        )
    return pixels


def group_norm(channels: int) -> nn.GroupNorm:
    """The normalisation that VQGAN has everywhere."""
    return nn.GroupNorm(NORM_GROUPS, channels, NORM_EPS)


def to_uint8(pixels: Tensor, rounding: Rounding) -> Tensor:
    """Colours as whole numbers from 0 to 255.

    Args:
        pixels: float32 `[pictures, 3, height, width]`, -1 to 1; what is outside is clamped.
        rounding: "nearest" as LlamaGen's sampling for evaluation has it, "down" as Janus and Lumina-mGPT.

    Returns:
        uint8 `[pictures, height, width, 3]`.
    """
    scaled = pixels * 127.5 + 128 if rounding == "nearest" else (pixels + 1) / 2 * 255
    return rearrange(scaled.clamp(0, 255).to(torch.uint8), "n c h w -> n h w c")


def file_name(name: str, layout: Layout, levels: int) -> str:
    """The name of a parameter of `VQDecoder` in a checkpoint that decodes in so many levels."""
    renames = {
        r"^codebook": "quantize.embedding",
        r"^post_quant": "post_quant_conv",
        r"\.shortcut": ".nin_shortcut",
        r"\.attention": ".attn",
        r"\.projection": ".proj_out",
        r"\.upsample": ".upsample.conv",
    }
    if layout == "llamagen":
        renames |= {r"\.middle": ".mid", r"\.levels": ".conv_blocks", r"\.blocks": ".res"}
    else:
        renames |= {
            r"\.middle\.0": ".mid.block_1",
            r"\.middle\.1": ".mid.attn_1",
            r"\.middle\.2": ".mid.block_2",
            r"\.levels": ".up",
            r"\.blocks": ".block",
        }
    for pattern, replacement in renames.items():
        name = re.sub(pattern, replacement, name)
    if layout == "taming":  # counts its levels from the highest resolution, and runs through them backwards
        name = re.sub(r"(?<=\.up\.)\d+", lambda level: str(levels - 1 - int(level[0])), name)
    return name
