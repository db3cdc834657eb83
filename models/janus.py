"""Janus-Pro 1B and 7B (arXiv 2501.17811): text to pictures of 384 x 384 pixels.

A Llama reads the prompt. Pictures have a vocabulary of their own: a table of codes and an aligner lead into
the Llama, a head of two layers leads out, and LlamaGen's decoder draws. Understanding pictures, the model's
other half, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import CheckpointError, PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec
from arkv.models import vq
from arkv.models.padding import left_padded
from arkv.models.transformer import Transformer, TransformerConfig
from arkv.weights.checkpoint import WeightSlot, empty, load_weights_, read_config, weight_files
from arkv.weights.hub import fetch
from arkv.weights.packing import Linear

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Layout = Literal["deepseek", "transformers"]
"""How a checkpoint names its tensors: as the first publication does, or as transformers does."""

LAYOUTS: dict[Any, Layout] = {"multi_modality": "deepseek", "janus": "transformers"}
"""Layout by the `model_type` of the configuration."""

ROPE_THETA = 10_000.0
GUIDANCE = 5.0
PROMPT = "<|User|>: {prompt}\n\n<|Assistant|>:"

MAX_CONDITION = 512
"""Condition tokens at most. The model has 16,384 positions; far fewer do for any prompt."""

BEGIN, PADDING, IMAGE = "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>"  # noqa: RUF001

CONFIG_FILE, TOKENIZER_FILE = "config.json", "tokenizer.json"
NEEDED = (CONFIG_FILE, TOKENIZER_FILE)
CHOICES = ((*NEEDED, "model*.safetensors*"), (*NEEDED, "pytorch_model*.bin*"))
"""What is downloaded of a repository: safetensors where there are any."""

UNUSED: dict[Layout, tuple[str, ...]] = {
    "deepseek": (
        "vision_model.*",
        "aligner.*",
        "language_model.lm_head.weight",
        *(f"gen_vision_model.{pattern}" for pattern in vq.UNUSED),
    ),
    "transformers": (
        "model.vision_model.*",
        "model.aligner.*",
        "lm_head.weight",
        *(f"model.vqmodel.{pattern}" for pattern in vq.UNUSED),
    ),
}
"""Tensors for understanding pictures, for writing text, and for encoding and training the codes."""


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
    def of(cls, tokenizer: Tokenizer) -> Tokens:
        """Look the tokens up by their names.

        Raises:
            CheckpointError: there is no such token.
        """
        ids = []
        for name in (BEGIN, PADDING, IMAGE):
            found = tokenizer.token_to_id(name)
            if found is None:
                raise CheckpointError(f"the tokenizer has no token {name}: it is not Janus-Pro's")
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
    """

    name: str
    repository: str
    transformer: TransformerConfig
    vocabulary: int = 102_400
    side: int = 24
    vq: vq.VQConfig = vq.VQ16


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


class JanusPro(Model):
    """Janus-Pro: square pictures from a text.

    The prompt is put into one turn of a conversation and ends in the token that begins a picture. The
    unconditional row is as long, and all between its first and its last token is padding, which is attended
    to, as in training. Defaults as in the authors' `generation_inference.py`: guidance 5, temperature 1, the
    whole vocabulary.

    A prompt is a text; or a list of token ids, the first and the last token included, which is the only
    possibility without a tokenizer.

    Args:
        variant: which model.
        tokenizer: of the published checkpoint.
    """

    variant: ClassVar[JanusVariant | None] = None
    """The one model that a subclass is; None where the checkpoint says which."""

    def __init__(self, variant: JanusVariant, tokenizer: Tokenizer | None = None) -> None:
        super().__init__()
        config, codes = variant.transformer, variant.vq.codes
        self.tokenizer = tokenizer
        self.tokens = Tokens() if tokenizer is None else Tokens.of(tokenizer)
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=codes,
            grid=Grid(variant.side, variant.side),
            max_condition=MAX_CONDITION,
            guidance=GUIDANCE,
            width=config.width,
            hidden=config.hidden,
        )
        self.words = nn.Embedding(variant.vocabulary, config.width)
        self.transformer = Transformer(config)
        self.codes = nn.Embedding(codes, variant.vq.code_dim)
        self.aligner = nn.Sequential(
            nn.Linear(variant.vq.code_dim, config.width), nn.GELU(), nn.Linear(config.width, config.width)
        )
        self.output = nn.Sequential(
            Linear(config.width, config.width), nn.GELU(), Linear(config.width, codes)
        )
        self.vq = vq.VQDecoder(variant.vq)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a published checkpoint, or a finetuned one in the same layout.

        Args:
            source: folder, or name of a repository on the hub, in the layout of deepseek-ai or of
                transformers; None for the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no weight is read.
            revision: of the repository.
            token: for the hub.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
        """
        device = torch.device(device)
        if source is None:
            if cls.variant is None:
                raise CheckpointError("no checkpoint is named: give a folder or deepseek-ai/Janus-Pro-7B")
            if device.type == "meta":
                return empty(partial(cls, cls.variant, None), dtype, device)
            source = cls.variant.repository
        folder = fetch(source, *CHOICES, revision=revision, token=token)
        variant, layout = read_variant(folder)
        if cls.variant is not None and cls.variant != variant:
            raise CheckpointError(
                f"{folder} has {variant.transformer.layers} layers of width {variant.transformer.width}: "
                f"it is not {cls.variant.name}"
            )
        model = empty(partial(cls, variant, _tokenizer(folder)), dtype, device)
        if device.type != "meta":
            load_weights_(model.weight_slots(layout), weight_files(folder), UNUSED[layout])
        return model

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a folder has a checkpoint of this model in it, or a repository on the hub is its own."""
        if cls.variant is not None and source == cls.variant.repository:
            return True
        try:
            variant, _ = read_variant(Path(source))
        except CheckpointError:
            return False
        return cls.variant in (None, variant)

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[str | Sequence[int]]) -> None:
        """Tokenise every prompt.

        Raises:
            PromptError: a prompt is too long, has ids that there are not, or is a text where there is no
                tokenizer.
        """
        for prompt in prompts:
            self._ids(prompt)

    def condition(self, prompts: Sequence[str | Sequence[int]], guided: bool) -> Condition:
        """The prompts, left-padded to the longest; positions count from each row's first token.

        Raises:
            PromptError: as `check_prompts`.
        """
        rows = [self._ids(prompt) for prompt in prompts]
        if guided:
            rows += [[row[0], *[self.tokens.padding] * (len(row) - 2), row[-1]] for row in rows]
        spec = self.spec
        return left_padded(rows, self.tokens.padding, self.words, spec.grid.tokens, spec.head_dim, ROPE_THETA)

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, the first and the last token included."""
        shown = repr(prompt) if len(repr(prompt)) <= 60 else f"{prompt!r:.60}..."
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise PromptError(
                    f"{self.spec.name} has no tokenizer: give prompts as lists of token ids, or load the "
                    "model from a checkpoint"
                )
            text = PROMPT.format(prompt=prompt.strip())
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids = [self.tokens.begin, *ids, self.tokens.image]
        else:
            ids = [*prompt] if isinstance(prompt, Sequence) else []
            words = self.words.num_embeddings
            if len(ids) < 2 or any(type(i) is not int or not 0 <= i < words for i in ids):
                raise PromptError(
                    f"the prompt {shown} is neither a text nor a list of token ids from 0 to {words - 1}, "
                    "the first and the last token included"
                )
        if len(ids) > MAX_CONDITION:
            raise PromptError(f"the prompt {shown} has {len(ids)} tokens: expected at most {MAX_CONDITION}")
        return ids

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The code's vector, led into the Llama; the place does not matter."""
        return cast(Tensor, self.aligner(self.codes(tokens)))[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and two layers; every code may stand everywhere."""
        return cast(Tensor, self.output(self.transformer.norm(hidden)))[:, 0].float()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes; colours are rounded down, as by the authors."""
        return self.vq.pixels(rearrange(tokens, "n (h w) -> n h w", h=self.spec.grid.rows), "down")

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Short descriptions; without a tokenizer, as many random ids as such descriptions have."""
        rng = numpy.random.default_rng(seed)
        if self.tokenizer is not None:
            return [EXAMPLES[i] for i in rng.integers(len(EXAMPLES), size=count)]
        tokens, words = self.tokens, self.words.num_embeddings
        lengths = rng.integers(12, 24, size=count)
        return [[tokens.begin, *rng.integers(words, size=n).tolist(), tokens.image] for n in lengths]

    def weight_slots(self, layout: Layout) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go.

        Args:
            layout: how it names them.
        """
        if layout == "deepseek":
            llama, pictures = "language_model.model.", self.vq.weight_slots("llamagen", "gen_vision_model.")
            modules: dict[str, nn.Module] = {
                "gen_embed": self.codes,
                "gen_aligner.layers.0": self.aligner[0],
                "gen_aligner.layers.2": self.aligner[2],
                "gen_head.output_mlp_projector": self.output[0],
                "gen_head.vision_head": self.output[2],
            }
        else:
            llama, pictures = "model.language_model.", self.vq.weight_slots("transformers", "model.vqmodel.")
            modules = {
                "model.generation_embeddings": self.codes,
                "model.generation_aligner.fc1": self.aligner[0],
                "model.generation_aligner.hidden_layers.0": self.aligner[2],
                "model.generation_head.proj_out": self.output[0],
                "model.generation_head.vision_head": self.output[2],
            }
        modules[f"{llama}embed_tokens"] = self.words
        slots = {
            f"{name}.{kind}": WeightSlot(weight)
            for name, module in modules.items()
            for kind, weight in module.named_parameters()
        }
        return slots | self.transformer.weight_slots(llama) | pictures


class JanusPro1B(JanusPro):
    """Janus-Pro-1B: 384 x 384 pixels from a text."""

    variant = JANUS_PRO_1B


class JanusPro7B(JanusPro):
    """Janus-Pro-7B: 384 x 384 pixels from a text."""

    variant = JANUS_PRO_7B


EXAMPLES = (
    "a photo of a red bus next to a lake",
    "a corgi's head depicted as an explosion of a nebula",
    "three green apples on a wooden table",
    "a watercolour of a lighthouse in a storm",
    "an astronaut riding a horse in the desert",
    "a close-up of a bee on a yellow flower, with the garden out of focus behind it",
)


def read_variant(folder: Path) -> tuple[JanusVariant, Layout]:
    """Shape and layout of the checkpoint in a folder, from its configuration.

    Raises:
        CheckpointError: there is no configuration, or it is another model's.
    """
    config = read_config(folder / CONFIG_FILE)
    kind = config.get("model_type")
    if kind not in LAYOUTS:
        raise CheckpointError(f"{folder} is not Janus-Pro: its configuration has the model_type {kind!r}")
    try:
        variant = _described(config, LAYOUTS[kind])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} does not describe Janus-Pro: {type(error).__name__} {error}"
        ) from None
    for published in PUBLISHED:
        if replace(variant, name=published.name, repository=published.repository) == published:
            return published, LAYOUTS[kind]
    return variant, LAYOUTS[kind]


def _described(config: Mapping[str, Any], layout: Layout) -> JanusVariant:
    """The shape that a configuration describes; what it leaves out has the published values."""
    text = config["language_config" if layout == "deepseek" else "text_config"]
    variant = JanusVariant("janus-pro", "", _llama(text), text["vocab_size"], vq=vq.VQ16)
    if layout == "deepseek":
        return variant
    vision = config["vision_config"]
    side = vision.get("image_size", 384) // vision.get("patch_size", 16)
    return replace(variant, side=side, vq=_decoder(config["vq_config"]))


def _llama(described: Mapping[str, Any]) -> TransformerConfig:
    """A Llama's shape; what a configuration leaves out has the default of transformers' `LlamaConfig`."""
    heads = described.get("num_attention_heads", 32)
    width = described.get("hidden_size", 4096)
    rope = described.get("rope_parameters") or described
    if rope.get("rope_theta", ROPE_THETA) != ROPE_THETA or described.get("rope_scaling"):
        raise ValueError("rotary frequencies are not those of Janus-Pro")
    return TransformerConfig(
        layers=described.get("num_hidden_layers", 32),
        width=width,
        heads=heads,
        kv_heads=described.get("num_key_value_heads") or heads,
        head_dim=described.get("head_dim") or width // heads,
        hidden=described.get("intermediate_size", 11008),
        norm_eps=described.get("rms_norm_eps", 1e-6),
    )


def _decoder(described: Mapping[str, Any]) -> vq.VQConfig:
    """The picture decoder's shape; what is left out is as in VQ-16."""
    return vq.VQConfig(
        codes=described.get("num_embeddings", vq.VQ16.codes),
        code_dim=described.get("embed_dim", vq.VQ16.code_dim),
        latent=described.get("latent_channels", vq.VQ16.latent),
        channels=described.get("base_channels", vq.VQ16.channels),
        multipliers=tuple(described.get("channel_multiplier", vq.VQ16.multipliers)),
        blocks=described.get("num_res_blocks", vq.VQ16.blocks - 1) + 1,
    )


def _tokenizer(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer

    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}: copy it from the published repository")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare ones
        raise CheckpointError(f"{path} is damaged or not a tokenizer: {error}") from None
