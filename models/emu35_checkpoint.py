"""Emu3.5's checkpoints: which models there are, and the files that they come in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from arkv.errors import CheckpointError
from arkv.models.config import MOST_TOKENS, Section, llama_shape
from arkv.models.emu3_checkpoint import EMU35_VOCABULARY
from arkv.models.emu3_tokens import RANKS_FILE, VISION_FILE, AnswerTokens
from arkv.models.pretrained import CONFIG_FILE
from arkv.models.sizes import Size
from arkv.models.transformer import MOST_LAYERS, MOST_WIDTH, TransformerConfig
from arkv.models.vq import VQConfig
from arkv.weights.files import check_content, is_file, read_config

SMALL_FILES = (CONFIG_FILE, RANKS_FILE, VISION_FILE)
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")

DECODER_REPOSITORY = "BAAI/Emu3.5-VisionTokenizer"
DECODER_CONFIG = "config.yaml"
DECODER_WEIGHTS = ("model.safetensors", "model.ckpt")
DECODER_FILES = tuple((DECODER_CONFIG, name) for name in DECODER_WEIGHTS)

EMU35_34B = TransformerConfig(
    layers=64, width=5120, heads=64, kv_heads=8, head_dim=128, hidden=25600, norm_eps=1e-5, qk_norm="rms"
)
"""What the published numbers of parameters lead to; of a checkpoint, its configuration is believed."""

IBQ = VQConfig(
    codes=131072,
    code_dim=256,
    latent=256,
    channels=256,
    multipliers=(1, 1, 2, 2, 4),
    blocks=5,
    normalised=False,
)
"""The picture decoder (IBQ, arXiv 2412.02692), as its number of parameters leads to; of a file,
`config.yaml` is believed."""

SIZES = tuple(
    (16 * columns, 16 * rows)
    for rows, columns in (
        *((64, 64), (55, 73), (73, 55), (47, 85)),
        *((85, 47), (52, 78), (78, 52), (41, 97)),
    )
)
"""Width and height in pixels of the eight ratios of the authors' program, the square first."""

UNCONDITIONAL_IDS = (2610, 525, 264, 10950, 17847, 13, 13872, 25, 220, 35560, 3846, 2821, 25, 220)
"""The text of the unconditional row, as tokens of the published tokenizer."""

UNUSED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)

TOKENS = AnswerTokens()


@dataclass(frozen=True)
class Emu35Variant:
    """One of the models of the family.

    Attributes:
        name: what the registry calls it.
        repository: where its weights are published.
        guidance: scale that its authors recommend.
        transformer: shape of the transformer.
        vocabulary: tokens of text and picture together.
        tokens: the ids that matter.
        vq: shape of the picture decoder.
        rope_theta: base of the rotary frequencies.
        sizes: width and height of its pictures, in pixels; the first where nothing is said.
        unconditional: text of the unconditional row, where there is no tokenizer.
    """

    name: str
    repository: str
    guidance: float
    transformer: TransformerConfig = EMU35_34B
    vocabulary: int = EMU35_VOCABULARY
    tokens: AnswerTokens = TOKENS
    vq: VQConfig = IBQ
    rope_theta: float = 1e6
    sizes: tuple[Size, ...] = SIZES
    unconditional: tuple[int, ...] = UNCONDITIONAL_IDS


EMU35_IMAGE = Emu35Variant("emu3.5-image", "BAAI/Emu3.5-Image", 5.0)
EMU35 = Emu35Variant("emu3.5", "BAAI/Emu3.5", 2.0)
VARIANTS = (EMU35_IMAGE, EMU35)


def is_emu35(folder: Path) -> bool:
    """Whether a folder has a configuration of this family in it; Emu3's has a smaller vocabulary."""
    if not is_file(folder / CONFIG_FILE):
        return False
    config = read_config(folder / CONFIG_FILE)
    words = config.get("vocab_size")
    return config.get("model_type") == "Emu3" and type(words) is int and words >= EMU35_VOCABULARY


def read_variant(folder: Path, variant: Emu35Variant) -> Emu35Variant:
    """A variant with the shape that the configuration in a folder tells of.

    Raises:
        CheckpointError: there is no configuration, or it is another model's.
    """
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder with {CONFIG_FILE} that it is in")
    path = folder / CONFIG_FILE
    described = Section(read_config(path), str(path))
    described.expect("tie_word_embeddings", False)
    described.ignore("image_area")
    shape, words, theta = llama_shape(
        described, variant.vocabulary, "Emu3", variant.transformer, variant.rope_theta
    )
    if words < variant.tokens.first_code + variant.vq.codes:
        raise CheckpointError(
            f"{folder} has a vocabulary of {words} tokens, and Emu3.5 has {variant.vocabulary}: it is of Emu3"
        )
    return replace(variant, transformer=shape, vocabulary=words, rope_theta=theta)


def read_decoder(variant: Emu35Variant, folder: Path) -> Emu35Variant:
    """A variant with the picture decoder that `config.yaml` in a folder describes, if it has one.

    Raises:
        CheckpointError: it is another kind of decoder, or has other codes.
    """
    path = folder / DECODER_CONFIG
    if not is_file(path):
        return variant
    check_content(path)
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    described = Section(content, str(path))
    if "model" in described:
        described = described.section("model").section("params")
    described.expect("l2_normalize", False)  # beside it there is training
    inner = described.section("ddconfig")
    for name, value in {"double_z": False, "in_channels": 3, "out_ch": 3}.items():
        inner.expect(name, value)
    multipliers = inner.get("ch_mult", list(IBQ.multipliers))
    levels = len(multipliers) if isinstance(multipliers, (list, tuple)) else 0
    # Numbers of pixels: attention is where the resolution of the training is halved to one of them.
    lowest = inner.whole("resolution", 256, MOST_WIDTH) // 2 ** max(levels - 1, 0)
    inner.expect("attn_resolutions", [lowest], [])
    numbers = (
        described.whole("n_embed", IBQ.codes, MOST_TOKENS),
        described.whole("embed_dim", IBQ.code_dim, MOST_WIDTH),
        inner.whole("z_channels", IBQ.latent, MOST_WIDTH),
        inner.whole("ch", IBQ.channels, MOST_WIDTH),
    )
    blocks = inner.whole("num_res_blocks", IBQ.blocks - 1, MOST_LAYERS) + 1
    attention = bool(inner.get("attn_resolutions", [lowest]))
    inner.close()
    try:
        decoder = VQConfig(*numbers, tuple(multipliers), blocks, False, attention)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{inner.where} describes no picture decoder: {error}") from None
    if (decoder.codes, decoder.scale) != (variant.vq.codes, variant.vq.scale):
        raise CheckpointError(
            f"{folder} draws {decoder.codes} codes of {decoder.scale} x {decoder.scale} pixels, and "
            f"{variant.name} has {variant.vq.codes} of {variant.vq.scale} x {variant.vq.scale}: it is "
            "another model's"
        )
    return replace(variant, vq=decoder)


def decoder_weights(folder: Path) -> Path:
    """The file of the picture decoder's weights in a folder.

    Raises:
        CheckpointError: there is none.
    """
    for name in DECODER_WEIGHTS:
        if is_file(folder / name):
            return folder / name
    raise CheckpointError(
        f"there is no picture decoder in {folder}: expected {' or '.join(DECODER_WEIGHTS)}, as "
        f"{DECODER_REPOSITORY} has it"
    )
