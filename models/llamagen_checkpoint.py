"""LlamaGen's checkpoints: which models there are, and the files that they are published in.

A file of weights says nothing of the side of its pictures, so a model is known by the published name of its
file, and by no other name.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from arkv.errors import CheckpointError
from arkv.models import vq
from arkv.models.transformer import TransformerConfig
from arkv.weights.files import is_file, is_folder
from arkv.weights.hub import fetch

UNUSED = ("freqs_cis",)
"""A table of rotations that some files carry; it is computed."""

CLASSES_REPOSITORY = "FoundationVision/LlamaGen"
CAPTIONS_REPOSITORY = "peizesun/llamagen_t2i"
VQ_MIXIN_FILE = "model.safetensors"
"""The picture decoder as `FoundationVision/vq-ds16-c2i` has it."""


@dataclass(frozen=True)
class Classes:
    """Conditioned on one of so many classes; one more stands for no condition."""

    count: int = 1000


@dataclass(frozen=True)
class Captions:
    """Conditioned on the states of a text encoder.

    Attributes:
        longest: tokens of a caption at most.
        width: of a state.
    """

    longest: int = 120
    width: int = 2048


@dataclass(frozen=True)
class LlamaGenVariant:
    """One of the models of the family.

    Attributes:
        name: what the registry calls it.
        file: name of its file of weights, as published.
        transformer: shape of the Llama.
        side: visual tokens along each side of a picture.
        kind: what it is conditioned on.
        guidance: scale that its pictures are best with.
        top_k: how many of the likeliest codes are drawn from; 0 for all.
        vq: shape of the picture decoder.
        vq_file: name of the decoder's file of weights.
        repository: where both files are published.
    """

    name: str
    file: str
    transformer: TransformerConfig
    side: int
    kind: Classes | Captions = Classes()
    guidance: float = 4.0
    top_k: int = 2000
    vq: vq.VQConfig = vq.VQ16
    vq_file: str = "vq_ds16_c2i.pt"
    repository: str = CLASSES_REPOSITORY


def _llama(layers: int, width: int, heads: int, hidden: int) -> TransformerConfig:
    return TransformerConfig(layers, width, heads, heads, width // heads, hidden, norm_eps=1e-5)


SIZES = {
    "B": _llama(12, 768, 12, 2048),
    "L": _llama(24, 1024, 16, 2816),
    "XL": _llama(36, 1280, 20, 3584),
    "XXL": _llama(48, 1536, 24, 4096),
    "3B": _llama(24, 3200, 32, 8704),
}
"""The sizes of the paper's table 1."""


def of_classes(size: str, pixels: int) -> LlamaGenVariant:
    """The model of classes of a size of `SIZES`, for square pictures of so many pixels a side."""
    return LlamaGenVariant(
        f"llamagen-{size.lower()}-{pixels}", f"c2i_{size}_{pixels}.pt", SIZES[size], pixels // 16
    )


def of_captions(stage: int, pixels: int) -> LlamaGenVariant:
    """The model of captions after a stage of its training, for square pictures of so many pixels a side."""
    return LlamaGenVariant(
        f"llamagen-t2i-xl-{pixels}",
        f"t2i_XL_stage{stage}_{pixels}.pt",
        SIZES["XL"],
        pixels // 16,
        Captions(),
        guidance=7.5,
        top_k=1000,
        vq_file="vq_ds16_t2i.pt",
        repository=CAPTIONS_REPOSITORY,
    )


def find_file(path: Path, variant: LlamaGenVariant) -> Path | None:
    """The variant's file, as published or as safetensors, if it is at a path or in the folder at a path."""
    names = (variant.file, str(Path(variant.file).with_suffix(".safetensors")))
    files = [path] if path.name in names else [path / name for name in names]
    return next((file for file in files if is_file(file)), None)


def find_weights(
    path: Path, variant: LlamaGenVariant | None, known: tuple[LlamaGenVariant, ...]
) -> tuple[LlamaGenVariant, Path]:
    """Which model is at a path, and its file.

    Args:
        path: file or folder.
        variant: the model that it has to be, by whatever name its file goes; None for any.
        known: the models there are.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if variant is not None and is_file(path):
        return variant, path
    found = [(v, file) for v in ([variant] if variant else known) if (file := find_file(path, v)) is not None]
    if len(found) == 1:
        return found[0]
    if not found:
        wanted = variant.file if variant else f"a file named as published, such as {known[0].file}"
        raise CheckpointError(f"{path} has not the weights of LlamaGen: expected {wanted}")
    raise CheckpointError(
        f"{path} has {' and '.join(file.name for _, file in found)}: give the path of one of them"
    )


def find_decoder(source: str | Path | None, file: Path, variant: LlamaGenVariant, token: str | None) -> Path:
    """The file of the picture decoder's weights.

    Args:
        source: file, folder or repository; None for the file beside the model's.
        file: the model's weights.
        variant: of the model.
        token: for the hub.

    Raises:
        CheckpointError: there is none.
    """
    name = variant.vq_file
    if source is None:
        if is_file(file.parent / name):
            return file.parent / name
        raise CheckpointError(
            f"there is no picture decoder {name} beside {file}: put it there, or name one with decoder="
        )
    path = fetch(source, (name,), (VQ_MIXIN_FILE,), token=token)
    if is_folder(path):
        found = [path / each for each in (name, VQ_MIXIN_FILE) if is_file(path / each)]
        if not found:
            raise CheckpointError(f"{path} has no picture decoder: expected {name} or {VQ_MIXIN_FILE} in it")
        return found[0]
    return path
