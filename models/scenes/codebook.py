"""The picture tokenizer of `scenes`: 2x2 px patches, each replaced by the nearest code."""

from __future__ import annotations

from typing import Final

import numpy
import torch
from einops import rearrange
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2  # type: ignore[import-untyped]

from arkv.models.scenes.drawing import SIDE
from arkv.models.scenes.grammar import BACKGROUNDS, COLORS

PATCH: Final = 2
"""The side of a patch in pixels."""

GRID: Final = SIDE // PATCH
"""The side of the grid of patches."""

TOKENS: Final = GRID * GRID
"""The tokens of one picture."""

PATCH_VALUES: Final = PATCH * PATCH * 3
"""The values of one patch."""

CODES: Final = 512
"""The usual number of codes."""

# Patches that k-means looks at, so that its time does not grow with the pictures.
_FIT_PATCHES: Final = 60_000
_FIT_ROUNDS: Final = 25

# Patches compared to all codes at a time: their table of 2 MiB stays in a core's cache.
_ENCODE_ROWS: Final = 1024


class Codebook:
    """A table of patches, by which a picture becomes a row of tokens and a row a picture.

    Attributes:
        vectors: The codes, float32 of shape [codes, PATCH_VALUES], with values from 0 (dark) to 1.
            The values of a patch go row by row, then pixel by pixel, then red, green, blue.
    """

    vectors: torch.Tensor

    def __init__(self, vectors: torch.Tensor | NDArray[numpy.float32]) -> None:
        """Takes the table of codes.

        Args:
            vectors: The codes, of shape [codes, PATCH_VALUES]; stored as float32.

        Raises:
            ValueError: The shape is another.
        """
        self.vectors = torch.as_tensor(vectors, dtype=torch.float32)
        if self.vectors.ndim != 2 or self.vectors.shape[1] != PATCH_VALUES:
            raise ValueError(
                f"expected codes of shape [codes, {PATCH_VALUES}], got {list(self.vectors.shape)}"
            )

    @classmethod
    def fit(cls, pictures: NDArray[numpy.uint8], size: int = CODES, seed: int = 0) -> Codebook:
        """Chooses the codes by k-means.

        The first codes are the nine plain colours, exact. The others are means of patches that
        show an edge, counted as often as they occur: plain patches would take up codes and leave
        fewer for the edges, on which the shapes depend, and with every distinct patch counted once
        straight edges, of which many are alike, would get too few and come out dotted.

        Args:
            pictures: The pictures to represent, uint8 of shape [B, SIDE, SIDE, 3].
            size: The number of codes.
            seed: Makes the choice repeatable.

        Raises:
            ValueError: There are too few edge patches, or the pictures are of another shape or
                type.
        """
        plain = numpy.array([*BACKGROUNDS.values(), *COLORS.values()], numpy.uint8)
        pinned = numpy.tile(plain, (1, PATCH * PATCH))
        patches = _to_patches(pictures).reshape(-1, PATCH_VALUES)
        colors = patches.reshape(-1, PATCH * PATCH, 3)
        edges = patches[(colors != colors[:, :1]).any(axis=(1, 2))]
        wanted = size - len(pinned)
        if len(edges) < wanted:
            raise ValueError(
                f"{len(edges)} edge patches are too few to choose {wanted} codes from: fit on more pictures"
            )
        rng = numpy.random.default_rng(seed)
        if len(edges) > _FIT_PATCHES:
            edges = rng.choice(edges, _FIT_PATCHES, replace=False)
        means, _ = kmeans2(edges.astype(numpy.float32) / 255, wanted, iter=_FIT_ROUNDS, minit="++", seed=rng)
        return cls(numpy.concatenate([pinned.astype(numpy.float32) / 255, means]))

    def encode(self, pictures: NDArray[numpy.uint8]) -> torch.Tensor:
        """Finds the nearest code (Euclidean; the first of equals) of every patch.

        Args:
            pictures: The pictures, uint8 of shape [B, SIDE, SIDE, 3].

        Returns:
            The tokens, int64 of shape [B, TOKENS], row by row from the top left, on the codebook's
            device.

        Raises:
            ValueError: The pictures are of another shape or type.
        """
        values = _to_patches(pictures).reshape(-1, PATCH_VALUES)
        patches = torch.from_numpy(values).to(self.vectors.device, torch.float32) / 255
        # The nearest code has the greatest p.c - |c|^2 / 2, as |p|^2 is the same for all codes.
        offsets = self.vectors.square().sum(dim=1) / -2
        table = self.vectors.T.contiguous()
        nearest = torch.empty(len(patches), dtype=torch.int64, device=patches.device)
        for start in range(0, len(patches), _ENCODE_ROWS):
            part = slice(start, start + _ENCODE_ROWS)
            nearest[part] = torch.addmm(offsets, patches[part], table).argmax(dim=1)
        return nearest.reshape(-1, TOKENS)

    def decode(self, tokens: torch.Tensor) -> NDArray[numpy.uint8]:
        """Puts the patches of the tokens together.

        Args:
            tokens: The tokens, of an integer type and shape [B, TOKENS] or [B, GRID, GRID].

        Returns:
            The pictures, uint8 of shape [B, SIDE, SIDE, 3].

        Raises:
            ValueError: The tokens are of another shape.
            IndexError: A token is outside the codebook.
        """
        if tokens.shape[1:] not in ((TOKENS,), (GRID, GRID)):
            raise ValueError(
                f"expected tokens of shape [B, {TOKENS}] or [B, {GRID}, {GRID}], got {list(tokens.shape)}"
            )
        if tokens.numel() and int(tokens.min()) < 0:
            raise IndexError(f"token {int(tokens.min())} is outside the codebook")
        values = (self.vectors.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
        patches = values[tokens.reshape(len(tokens), TOKENS).cpu().numpy()]
        return rearrange(
            patches,
            "b (row column) (y x rgb) -> b (row y) (column x) rgb",
            row=GRID,
            y=PATCH,
            x=PATCH,
        )


def _to_patches(pictures: NDArray[numpy.uint8]) -> NDArray[numpy.uint8]:
    """Cuts pictures into their patches, uint8 of shape [B, TOKENS, PATCH_VALUES]."""
    if pictures.dtype != numpy.uint8 or pictures.shape[1:] != (SIDE, SIDE, 3):
        raise ValueError(
            f"expected uint8 pictures of shape [B, {SIDE}, {SIDE}, 3], "
            f"got {pictures.dtype} of shape {list(pictures.shape)}"
        )
    return rearrange(pictures, "b (row y) (column x) rgb -> b (row column) (y x rgb)", y=PATCH, x=PATCH)
