"""Janus-Pro's checkpoints: which models there are, and how to tell from the files which one it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from arkv.errors import CheckpointError
from arkv.models import vq
from arkv.models.config import MOST_TOKENS, Section, llama_shape
from arkv.models.pretrained import CONFIG_FILE, TOKENIZER_FILE
from arkv.models.transformer import MOST_LAYERS, MOST_WIDTH, TransformerConfig
from arkv.weights.files import is_file, read_config

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Layout = Literal["deepseek", "transformers"]
"""How a checkpoint names its tensors: as the first publication does, or as transformers does."""

LAYOUTS: dict[str, Layout] = {"multi_modality": "deepseek", "janus": "transformers"}
"""Layout by the `model_type` of the configuration."""

VOCABULARY = 102_400

BEGIN, PADDING, IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"  # noqa: RUF001

ROLES = ("<|User|>", "<|Assistant|>")
"""Tokens of Janus-Pro's template, which Janus 1.3B, a model of the same shape as the smaller one, has not."""

UNUSED: dict[Layout, tuple[str, ...]] = {
    "deepseek": (
        "vision_model.*",
        "aligner.*",
        "language_model.lm_head.weight",
        "language_model.model.layers.*.self_attn.rotary_emb.inv_freq",
        *(f"gen_vision_model.{pattern}" for pattern in vq.UNUSED),
    ),
    "transformers": (
        "model.vision_model.*",
        "model.aligner.*",
        "lm_head.weight",
        *(f"model.vqmodel.{pattern}" for pattern in vq.UNUSED),
    ),
}
"""Tensors for understanding pictures, for writing text, for encoding and training the codes; and frequencies
that follow from the configuration."""


@dataclass(frozen=True)
class Tokens:
    """Ids of the tokens that give a prompt its form. They differ between the sizes of the model.

    Attributes:
        begin: begins every prompt.
        padding: stands for every token of the text in the unconditional row.
        image: ends every prompt; a picture follows.
    """

    begin: int = 0
    padding: int = 1
    image: int = 2

    @classmethod
    def of(cls, tokenizer: Tokenizer, words: int) -> Tokens:
        """Look the tokens up by their names.

        Args:
            tokenizer: of the checkpoint.
            words: rows of the model's embedding.

        Raises:
            CheckpointError: there is no such token, or the model has not so many.
        """
        ids = []
        for name in (BEGIN, PADDING, IMAGE):
            found = tokenizer.token_to_id(name)
            if found is None:
                raise CheckpointError(f"the tokenizer has no token {name}: it is not Janus-Pro's")
            if found >= words:
                raise CheckpointError(
                    f"the tokenizer gives {name} the number {found}, and the model has {words} tokens: they "
                    "belong to two models"
                )
            ids.append(found)
        return cls(*ids)


@dataclass(frozen=True)
class JanusVariant:
    """One of the models of the family.

    Attributes:
        name: what the registry calls it.
        repository: where its weights are published.
        transformer: shape of the Llama.
        vocabulary: tokens of text.
        side: visual tokens along each side of a picture.
        vq: shape of the picture decoder; the table of codes that the Llama reads has the same shape as the
            decoder's.
        rope_theta: base of the rotary frequencies.
    """

    name: str
    repository: str
    transformer: TransformerConfig
    vocabulary: int = VOCABULARY
    side: int = 24
    vq: vq.VQConfig = vq.VQ16
    rope_theta: float = 10_000.0

    def is_like(self, other: JanusVariant) -> bool:
        """Whether it is another one but for what finetuning may change: the vocabulary and small numbers."""
        return other == replace(
            self,
            name=other.name,
            repository=other.repository,
            vocabulary=other.vocabulary,
            rope_theta=other.rope_theta,
            transformer=replace(self.transformer, norm_eps=other.transformer.norm_eps),
        )


JANUS_PRO_1B = JanusVariant(
    "janus-pro-1b",
    "deepseek-ai/Janus-Pro-1B",
    TransformerConfig(layers=24, width=2048, heads=16, kv_heads=16, head_dim=128, hidden=5632),
)
JANUS_PRO_7B = JanusVariant(
    "janus-pro-7b",
    "deepseek-ai/Janus-Pro-7B",
    TransformerConfig(layers=30, width=4096, heads=32, kv_heads=32, head_dim=128, hidden=11008),
)
PUBLISHED = (JANUS_PRO_1B, JANUS_PRO_7B)

RELATIVES = ("deepseek-ai/Janus-1.3B", "deepseek-ai/JanusFlow-1.3B")
"""Repositories of models that are not Janus-Pro, though one of them has the shape of the smaller one."""


def layout_of(folder: Path) -> Layout | None:
    """How the checkpoint in a folder names its tensors; None where there is none of this family."""
    if not is_file(folder / CONFIG_FILE):
        return None
    kind = read_config(folder / CONFIG_FILE).get("model_type")
    return LAYOUTS.get(kind) if isinstance(kind, str) else None


def read_variant(folder: Path, expected: JanusVariant | None = None) -> tuple[JanusVariant, Layout]:
    """Shape and layout of the checkpoint in a folder, from its configuration.

    Args:
        folder: with the configuration.
        expected: which model it has to be, by its shape; None for any.

    Returns:
        A variant by the name of the expected or published one that it is like, and the layout.

    Raises:
        CheckpointError: there is no configuration, or it is another model's.
    """
    if is_file(folder):
        raise CheckpointError(f"{folder} is a file: give the folder with {CONFIG_FILE} that it is in")
    path = folder / CONFIG_FILE
    config = read_config(path)
    layout = layout_of(folder)
    if layout is None:
        kind = config.get("model_type")
        raise CheckpointError(f"{folder} is not Janus-Pro: its configuration has the model_type {kind!r:.60}")
    described = Section(config, str(path))
    variant = _deepseek(described) if layout == "deepseek" else _transformers(described)
    if expected is not None and not variant.is_like(expected):
        raise CheckpointError(
            f"{folder} has {variant.transformer.layers} layers of width {variant.transformer.width}: "
            f"it is not {expected.name}"
        )
    known = PUBLISHED if expected is None else (expected,)
    like = next((one for one in known if variant.is_like(one)), variant)
    return replace(variant, name=like.name, repository=like.repository), layout


def check_repository(source: str | Path) -> None:
    """Refuse the published name of a relative.

    Raises:
        CheckpointError: it is the repository of one.
    """
    if source in RELATIVES:
        raise CheckpointError(
            f"{source} is not Janus-Pro: its prompts have another template, and no model here draws with it"
        )


def check_told(folder: Path, variant: JanusVariant) -> None:
    """Refuse to guess where the files do not say that it is Janus-Pro.

    Raises:
        CheckpointError: it says that it is another one, or it has the shape of Janus 1.3B, too, and not the
            tokens of Janus-Pro's template.
    """
    check_repository(str(read_config(folder / CONFIG_FILE).get("_name_or_path")))
    if not variant.is_like(JANUS_PRO_1B) or not is_file(folder / TOKENIZER_FILE):
        return
    tokenizer = read_config(folder / TOKENIZER_FILE)
    added = tokenizer.get("added_tokens")
    names = {token.get("content") for token in added if isinstance(token, dict)} if added else set()
    if not names.issuperset(ROLES):
        raise CheckpointError(
            f"{folder} may be Janus 1.3B, which has the shape of {variant.name} and another template: its "
            f"tokenizer has no token {ROLES[0]}; if it is Janus-Pro, say so, as in "
            f"load_model({variant.name!r}, source=...)"
        )


def _deepseek(described: Section) -> JanusVariant:
    described.ignore("model_type", "vision_config", "aligner_config")  # for understanding pictures
    parts = {
        "gen_vision_config": {"cls": ("VQ-16",), "n_embed": (8,), "image_token_size": (vq.VQ16.codes,)},
        "gen_aligner_config": {"depth": (2,), "projector_type": ("mlp_gelu",)},
        "gen_head_config": {},
    }
    for name, wanted in parts.items():
        if name not in described:
            continue
        part = described.section(name)
        parameters = part.section("params") if "params" in part else Section({}, part.where)
        for key, values in wanted.items():
            (part if key == "cls" else parameters).expect(key, *values)
        part.ignore("model_type", "cls")
        parameters.ignore("input_dim", "n_embed", "image_token_*")  # shapes, which the tensors have to have
        part.close()
        parameters.close()
    shape, words, theta = llama_shape(described.section("language_config"), VOCABULARY)
    described.expect("tie_word_embeddings", True, False)
    described.close()
    return JanusVariant("janus-pro", "", shape, words, vq=vq.VQ16, rope_theta=theta)


def _transformers(described: Section) -> JanusVariant:
    described.ignore("model_type")
    described.expect("tie_word_embeddings", True, False)  # of the head for text, which is not used
    shape, words, theta = llama_shape(described.section("text_config"), 32_000)
    vision = described.section("vision_config")
    pixels, patch = vision.whole("image_size", 384, 2**14), vision.whole("patch_size", 16, 2**10)
    if pixels < patch:
        raise CheckpointError(f"{vision.where} has patches of {patch} pixels in a picture of {pixels}")
    codes = _decoder(described.section("vq_config"))
    described.close()
    return JanusVariant("janus-pro", "", shape, words, pixels // patch, codes, theta)


def _decoder(described: Section) -> vq.VQConfig:
    """The picture decoder's shape; what is left out is as in VQ-16."""
    described.expect("double_latent", False)
    described.expect("in_channels", 3)
    described.expect("out_channels", 3)
    described.expect("num_hidden_layers", 2)  # of the aligner
    described.expect("hidden_act", "gelu")
    # Shapes that the tensors have to have, and a number that follows from those of the vision_config.
    described.ignore("model_type", "projection_dim", "image_token_embed_dim", "num_patches")
    multipliers = described.get("channel_multiplier", list(vq.VQ16.multipliers))
    described.ignore("channel_multiplier")
    numbers = (
        described.whole("num_embeddings", vq.VQ16.codes, MOST_TOKENS),
        described.whole("embed_dim", vq.VQ16.code_dim, MOST_WIDTH),
        described.whole("latent_channels", vq.VQ16.latent, MOST_WIDTH),
        described.whole("base_channels", vq.VQ16.channels, MOST_WIDTH),
    )
    blocks = described.whole("num_res_blocks", vq.VQ16.blocks - 1, MOST_LAYERS) + 1
    described.close()
    try:
        return vq.VQConfig(*numbers, multipliers=tuple(multipliers), blocks=blocks)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{described.where} describes no picture decoder: {error}") from None
