"""Emu3's checkpoints: which models there are, and the files that they come in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from pathlib import Path
from typing import Literal

from arkv.errors import CheckpointError
from arkv.models.config import MOST_TOKENS, Section, llama_shape
from arkv.models.emu3_tokens import RANKS_FILE, TOKENS, VISION_FILE, Tokens
from arkv.models.pretrained import CONFIG_FILE, TOKENIZER_FILE
from arkv.models.sizes import Size
from arkv.models.transformer import MOST_LAYERS, MOST_WIDTH, TransformerConfig
from arkv.models.vq import MOVQ, VQConfig
from arkv.weights.checkpoint import tensor_names
from arkv.weights.files import is_file, is_folder, place, read_config
from arkv.weights.hub import fetch

Layout = Literal["baai", "transformers"]
"""How a checkpoint is laid out: as the first publication is, or as transformers writes it."""

LAYOUTS: dict[str, Layout] = {"Emu3": "baai", "emu3": "transformers"}
"""Layout by the `model_type` of the configuration."""

COLOURS_FILE = "preprocessor_config.json"
DECODER_REPOSITORY = "BAAI/Emu3-VisionTokenizer"

SMALL_FILES = ((CONFIG_FILE, RANKS_FILE, VISION_FILE), (CONFIG_FILE, TOKENIZER_FILE, COLOURS_FILE))
"""What is downloaded before the weights, by layout."""
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")
DECODER_FILES = ((CONFIG_FILE, COLOURS_FILE, "*.safetensors"), (CONFIG_FILE, "*.safetensors"))

MAX_RATIO = 4
"""Longest side of a picture over its shortest. The authors' program has no bound; this one is arkv's."""

NEGATIVE_PROMPT = (
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst "
    "quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
NEGATIVE_IDS = (
    *(10303, 416, 11, 3873, 61590, 11, 3873, 6078, 11, 1467, 11, 1465, 11, 7402, 19225, 11, 4960, 15723, 11),
    *(16745, 18509, 11, 60143, 11, 11785, 4271, 11, 3347, 4271, 11, 4622, 4271, 11, 54566, 35036, 11, 11957),
    *(11, 88006, 11, 5934, 11, 99055, 13),
)
"""The same as tokens of the published tokenizer, for models that are loaded without one."""

SUFFIX = " masterpiece, film grained, best quality."
"""What the authors put behind every prompt."""

CHAT_POSITIONS = 131_072
"""Positions of Emu3-Chat, which reads pictures, by its configuration; the models that draw have fewer."""

EMU3_8B = TransformerConfig(
    layers=32, width=4096, heads=32, kv_heads=8, head_dim=128, hidden=14336, norm_eps=1e-5
)
EMU3_VQ = replace(MOVQ, codes=32768, doublings=2)
ROPE_THETA = 1e6
VOCABULARY = 184_622

UNUSED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Emu3Variant:
    """One of the models of the family.

    Attributes:
        name: what the registry calls it.
        repository: where its weights are published.
        area: of its pictures, in pixels.
        copies: repositories with the same weights in the layout of transformers.
        transformer: shape of the transformer.
        vocabulary: tokens of text and picture together.
        tokens: the ids that matter.
        vq: shape of the picture decoder.
        rope_theta: base of the rotary frequencies.
        negative: tokens of the negative prompt, where there is no tokenizer.
    """

    name: str
    repository: str
    area: int
    copies: tuple[str, ...] = ()
    transformer: TransformerConfig = EMU3_8B
    vocabulary: int = VOCABULARY
    tokens: Tokens = TOKENS
    vq: VQConfig = EMU3_VQ
    rope_theta: float = ROPE_THETA
    negative: tuple[int, ...] = NEGATIVE_IDS

    @property
    def square(self) -> Size:
        """Width and height in pixels of the square picture."""
        side = round((self.area / self.scale**2) ** 0.5) * self.scale
        return side, side

    @property
    def scale(self) -> int:
        """Pixels along each side of a code."""
        return self.vq.scale

    @property
    def sizes(self) -> list[Size]:
        """Width and height in pixels of every picture of about this area, the widest first.

        Those that the authors' rule gives for some ratio `r` of width to height: in codes, the root of
        `area * r` and of `area / r`, rounded.
        """
        codes = self.area / self.scale**2
        longest, shortest = int((codes * MAX_RATIO) ** 0.5) + 1, int((codes / MAX_RATIO) ** 0.5)
        return [
            (width * self.scale, height * self.scale)
            for width in range(longest, shortest - 1, -1)
            for height in range(ceil(codes / (width + 0.5) - 0.5), floor(codes / (width - 0.5) + 0.5) + 1)
            if max(width, height) <= MAX_RATIO * min(width, height)
        ]

    def is_like(self, other: Emu3Variant) -> bool:
        """Whether it has the shape of another one, but for what finetuning may change."""
        shape = replace(self.transformer, norm_eps=other.transformer.norm_eps)
        return (shape, self.vq.codes) == (other.transformer, other.vq.codes)


EMU3_GEN = Emu3Variant(
    "emu3-gen", "BAAI/Emu3-Gen", 720 * 720, ("BAAI/Emu3-Gen-hf", "Emu3-community/Emu3-Gen-hf")
)
EMU3_STAGE1 = Emu3Variant("emu3-stage1", "BAAI/Emu3-Stage1", 512 * 512)
VARIANTS = (EMU3_GEN, EMU3_STAGE1)


def layout_of(folder: Path) -> Layout | None:
    """How the checkpoint in a folder is laid out; None where there is none of this family.

    Emu3.5, which has the same `model_type`, is told apart by its vocabulary.
    """
    if not is_file(folder / CONFIG_FILE):
        return None
    config = read_config(folder / CONFIG_FILE)
    kind, words = config.get("model_type"), config.get("vocab_size")
    if type(words) is int and words >= EMU35_VOCABULARY:
        return None
    return LAYOUTS.get(kind) if isinstance(kind, str) else None


EMU35_VOCABULARY = 282_926
"""Tokens of Emu3.5, which has more codes."""


def read_variant(folder: Path, expected: Emu3Variant | None = None) -> tuple[Emu3Variant, Layout]:
    """Shape and layout of the checkpoint in a folder, from its configuration.

    Args:
        folder: with the configuration.
        expected: which model it has to be, by its shape and by the area of its pictures; None for any.

    Raises:
        CheckpointError: there is no configuration, it is another model's, or it does not say which of the
            models it is.
    """
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder with {CONFIG_FILE} that it is in")
    path, layout = folder / CONFIG_FILE, layout_of(folder)
    config = read_config(path)
    if layout is None:
        kind, words = config.get("model_type"), config.get("vocab_size")
        raise CheckpointError(
            f"{folder} is not Emu3: its configuration has the model_type {kind!r:.60} and a vocabulary of "
            f"{words!r:.20}"
        )
    described = Section(config, str(path))
    area: int | None = None
    decoder: VQConfig | None = None
    described.expect("tie_word_embeddings", False)
    if layout == "baai":
        described.ignore("image_area")
        area, inner, kind = image_area(folder), described, "Emu3"
    else:
        described.ignore("model_type", "vocabulary_map")
        inner, kind = described.section("text_config"), "emu3_text_model"
        inner.expect("tie_word_embeddings", False)
        decoder = decoder_shape(described.section("vq_config"))
    shape, words, theta = llama_shape(inner, VOCABULARY, kind, EMU3_8B, ROPE_THETA)
    described.close()
    like = _variant_of(folder, area, expected)
    found = replace(like, transformer=shape, vocabulary=words, rope_theta=theta, vq=decoder or like.vq)
    if not found.is_like(like):
        raise CheckpointError(
            f"{folder} has {shape.layers} layers of width {shape.width} and {found.vq.codes} codes: it is "
            f"not {like.name}"
        )
    return found, layout


def _variant_of(folder: Path, area: int | None, expected: Emu3Variant | None) -> Emu3Variant:
    if expected is not None:
        if area not in (None, expected.area):
            raise CheckpointError(
                f"{folder} is made for pictures of {area} pixels (image_area): it is not {expected.name}, "
                f"which has {expected.area}"
            )
        return expected
    told = [variant for variant in VARIANTS if variant.area == area]
    if not told:
        raise CheckpointError(
            f"{folder} does not say by its image_area which of {' and '.join(v.name for v in VARIANTS)} it "
            "is: load it by its name"
        )
    return told[0]


def check_told(folder: Path) -> None:
    """Refuse to guess where the files have the shape of a model that draws and are probably none.

    Raises:
        CheckpointError: by its positions it is Emu3-Chat.
    """
    config = read_config(folder / CONFIG_FILE)
    inner = config.get("text_config", config)
    positions = inner.get("max_position_embeddings") if isinstance(inner, dict) else None
    if type(positions) is int and positions >= CHAT_POSITIONS:
        raise CheckpointError(
            f"{folder} may be Emu3-Chat, which reads pictures and does not draw: it has {positions} "
            f"positions; if it does draw, name it, as in load_model({EMU3_GEN.name!r}, source=...)"
        )


def image_area(folder: Path) -> int | None:
    """The area of the pictures that the configuration in a folder tells of, in pixels.

    Raises:
        CheckpointError: it is none.
    """
    described = Section(read_config(folder / CONFIG_FILE), str(folder / CONFIG_FILE))
    return described.whole("image_area", 0, MOST_TOKENS) if "image_area" in described else None


def read_decoder(variant: Emu3Variant, folder: Path) -> Emu3Variant:
    """A variant with the picture decoder that the configuration in a folder describes, if it has one.

    Raises:
        CheckpointError: it is another kind of decoder, or has other codes.
    """
    path = folder / CONFIG_FILE
    if is_file(path):
        decoder = decoder_shape(Section(read_config(path), str(path)))
        if (decoder.codes, decoder.scale) != (variant.vq.codes, variant.vq.scale):
            raise CheckpointError(
                f"{folder} draws {decoder.codes} codes of {decoder.scale} x {decoder.scale} pixels, and "
                f"{variant.name} has {variant.vq.codes} of {variant.vq.scale} x {variant.vq.scale}: it "
                "is another model's"
            )
        variant = replace(variant, vq=decoder)
    return with_colours(variant, folder)


def decoder_shape(described: Section) -> VQConfig:
    """The picture decoder's shape, under the names of either layout.

    Raises:
        CheckpointError: it is another kind of decoder.
    """
    described.expect("model_type", "Emu3VisionVQ", "emu3_vqgan")
    multipliers = described.get("ch_mult", described.get("channel_multiplier", [1, 2, 2, 4]))
    levels = len(multipliers) if isinstance(multipliers, (list, tuple)) else 0
    described.expect("attn_resolutions", [levels - 1])  # numbers of levels
    for name, value in {
        "double_z": False,
        "double_latent": False,
        "in_channels": 3,
        "out_channels": 3,
        "num_attention_heads": 1,
    }.items():
        described.expect(name, value)
    described.ignore("hidden_size")  # follows from the channels
    frames = described.whole("temporal_downsample_factor", 4, 2**8)
    if frames & (frames - 1):
        raise CheckpointError(f"{described.where} has {frames} frames: expected a power of two")

    def number(usual: int, most: int, *names: str) -> int:
        return described.whole(next((name for name in names if name in described), names[0]), usual, most)

    codes = number(EMU3_VQ.codes, MOST_TOKENS, "codebook_size")
    code_dim = number(EMU3_VQ.code_dim, MOST_WIDTH, "embed_dim")
    latent = number(EMU3_VQ.latent, MOST_WIDTH, "z_channels", "latent_channels")
    channels = number(EMU3_VQ.channels, MOST_WIDTH, "ch", "base_channels")
    blocks = number(EMU3_VQ.blocks - 1, MOST_LAYERS, "num_res_blocks") + 1
    described.close()
    try:
        return VQConfig(
            codes,
            code_dim,
            latent,
            channels,
            tuple(multipliers),
            blocks,
            normalised=False,
            spatial=True,
            doublings=frames.bit_length() - 1,
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{described.where} describes no picture decoder: {error}") from None


def with_colours(variant: Emu3Variant, folder: Path) -> Emu3Variant:
    """A variant with mean and spread of the colours as a folder's preprocessor has them, if it has one.

    Raises:
        CheckpointError: the file has no three numbers for one of them.
    """
    path = folder / COLOURS_FILE
    if not is_file(path):
        return variant
    found = {}
    for field, name in (("mean", "image_mean"), ("std", "image_std")):
        numbers = read_config(path).get(name, [0.5] * 3)
        is_colour = isinstance(numbers, list) and len(numbers) == 3
        if not is_colour or not all(isinstance(one, float) and 0 < one < 1 for one in numbers):
            raise CheckpointError(
                f"{path} says {name} is {numbers!r:.60}: expected three numbers between 0 and 1"
            )
        found[field] = tuple(numbers)
    return replace(variant, vq=replace(variant.vq, mean=found["mean"], std=found["std"]))


def find_decoder(
    source: str | Path | None,
    folder: Path,
    token: str | None,
    repository: str = DECODER_REPOSITORY,
    choices: Sequence[Sequence[str]] = DECODER_FILES,
) -> Path:
    """The folder of the picture decoder.

    Args:
        source: folder or repository; None for a folder of the published name in or beside the checkpoint's,
            else for the published repository.
        folder: of the checkpoint.
        token: for the hub.
        repository: the published one.
        choices: patterns of the files that it has, or has instead.

    Raises:
        CheckpointError: there is none.
    """
    if source is None:
        name = repository.split("/")[1]
        near = [folder / name, folder.parent / name]
        source = next((path for path in near if is_folder(path)), repository)
    path = fetch(source, *choices, token=token)
    return place(path.parent if is_file(path) else path)


def prefixes(files: Sequence[Path]) -> tuple[str, str, str]:
    """What stands before the names of the layers, the name of the head, and what stands before the decoder's.

    Versions of transformers before 5 wrote other names than those since.
    """
    names = {name for path in files for name in tensor_names(path)}
    if any(name.startswith("text_model.") for name in names):
        return "text_model.model.", "text_model.lm_head.weight", "vqmodel."
    return "model.text_model.", "lm_head.weight", "model.vqmodel."
