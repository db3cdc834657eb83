"""LlamaGen (arXiv 2406.06525): pictures of ImageNet's classes, or from a caption.

A Llama over the codes of a picture. Its rotary angles turn with row and column; the condition, a class or
the states of a T5 encoder, is turned by nothing at all: the published tables have zeros there instead of
cosines, so queries and keys of condition tokens are zero and only their values speak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy
import torch
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import Self

from arkv.errors import CheckpointError, PromptError
from arkv.grid import Grid
from arkv.model import Block, Condition, Model, ModelSpec, PicturesOnly
from arkv.models import transformer, vq
from arkv.models.captions import CaptionEncoder, encoder_for
from arkv.models.imagenet import class_names, class_number
from arkv.models.llamagen_checkpoint import (
    UNUSED,
    Captions,
    Classes,
    LlamaGenVariant,
    find_decoder,
    find_file,
    find_weights,
    of_captions,
    of_classes,
)
from arkv.models.pretrained import Part, empty, load, pictures_only, place_of
from arkv.models.prompting import shown
from arkv.models.rope import grid_rotation
from arkv.models.transformer import Transformer
from arkv.scalars import whole
from arkv.weights.checkpoint import WeightSlot
from arkv.weights.files import place
from arkv.weights.hub import fetch, is_hub_id
from arkv.weights.packing import Linear
from arkv.weights.quantization import WeightDtype

ROPE_THETA = 10_000.0
TEXT_ENCODER = "google/flan-t5-xl"


class LlamaGen(Model):
    """LlamaGen: square pictures of a class or from a caption.

    A class is given by its number or its name in ImageNet (see `arkv.models.imagenet`), a caption as a text;
    or, which is the only possibility without a text encoder, as a float tensor `[tokens, width]` of its
    states. The unconditional row is a class of its own, or as many vectors that were learnt for it as the
    caption has tokens.

    Defaults as in the authors' `sample_c2i.py` (guidance 4, the 2,000 likeliest codes) and `sample_t2i.py`
    (guidance 7.5, the 1,000 likeliest), temperature 1, guidance of all tokens. Their FID is measured with
    other ones: the whole vocabulary and guidance 2.0 (B, L), 1.75 (XL, XXL) or 1.65 (3B). Their
    `cfg_interval=n` is `guided_tokens=n + 2`.

    Args:
        variant: which model.
        encoder: of captions.
    """

    variant: ClassVar[LlamaGenVariant | None] = None
    """The one model that a subclass is; None where the name of the file says which."""

    def __init__(self, variant: LlamaGenVariant, encoder: CaptionEncoder | None = None) -> None:
        super().__init__()
        config, codes, kind = variant.transformer, variant.vq.codes, variant.kind
        self.kind = kind
        self.spec = ModelSpec(
            name=variant.name,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            vocabulary=codes,
            grid=Grid(variant.side, variant.side),
            max_condition=1 if isinstance(kind, Classes) else kind.longest,
            guidance=variant.guidance,
            width=config.width,
            hidden=config.hidden,
            top_k=variant.top_k,
        )
        self.codes = nn.Embedding(codes, config.width)
        self.transformer = Transformer(config)
        self.output = Linear(config.width, codes, bias=False)
        if isinstance(kind, Classes):
            self.classes = nn.Embedding(kind.count + 1, config.width)
        else:
            self.caption = nn.Sequential(
                nn.Linear(kind.width, config.width, bias=False),
                nn.GELU(approximate="tanh"),
                nn.Linear(config.width, config.width, bias=False),
            )
            self.unconditional = nn.Parameter(torch.zeros(kind.longest, kind.width))
        self.vq = vq.VQDecoder(variant.vq)
        self.encoder = encoder

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
        text_encoder: str | Path | None = TEXT_ENCODER,
        revision: str | None = None,
        token: str | None = None,
        weights: WeightDtype | None = None,
        lora: str | Path | None = None,
    ) -> Self:
        """Load a published checkpoint, or one that the authors' programs wrote.

        Args:
            source: file of weights, the folder that it is in, or name of a repository on the hub; None for
                the repository of this class's variant.
            dtype: of the weights but for the picture decoder's, which are float32.
            device: where to put them. For the meta device no weight is read.
            decoder: file of the picture decoder's weights, a folder that it is in, or name of a repository;
                None for the one beside the weights.
            text_encoder: folder or repository of the text encoder, for models of captions only; None for
                none, if captions are given as states.
            revision: of the repository named by `source`.
            token: for the hub.
            weights: how those of the blocks are stored; None for as they are.
            lora: folder or repository of an adapter to merge into the weights.

        Raises:
            CheckpointError: a file is missing, damaged, or belongs to another model.
        """
        known, device = cls.variant, torch.device(device)
        if source is None and known is not None and device.type == "meta":
            return empty(partial(cls, known), dtype, device, weights)
        variant, file = cls._find(source, revision, token)

        def parts(model: LlamaGen) -> Iterator[Part]:
            yield Part(model.weight_slots(), [file], UNUSED)
            pictures = find_decoder(decoder, file, variant, token)
            yield Part(model.vq.weight_slots("llamagen"), [pictures], vq.UNUSED)

        model = load(partial(cls, variant), dtype, device, parts, weights, lora)
        if isinstance(variant.kind, Captions) and text_encoder is not None and device.type != "meta":
            kind = variant.kind
            model.encoder = encoder_for(kind.width, text_encoder, kind.longest, dtype, device, token)
        return model

    @classmethod
    def load_picture_decoder(
        cls,
        source: str | Path | None = None,
        *,
        device: torch.device | str = "cpu",
        decoder: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
        **others: Any,
    ) -> PicturesOnly:
        """Load the picture decoder and nothing else; arguments and errors as for `from_pretrained`."""
        variant, file = cls._find(source, revision, token)
        pictures = find_decoder(decoder, file, variant, token)
        return pictures_only(
            partial(cls, variant),
            device,
            lambda model: Part(model.vq.weight_slots("llamagen"), [pictures], vq.UNUSED),
        )

    @classmethod
    def _find(
        cls, source: str | Path | None, revision: str | None, token: str | None
    ) -> tuple[LlamaGenVariant, Path]:
        """Which model is at a place, and its file."""
        known = cls.variant
        source = place_of(source, known.repository if known else None, f"a file such as {VARIANTS[0].file}")
        if known is None and is_hub_id(source):
            raise CheckpointError(f"{source} may have several models: load one by its name or class")
        wanted = () if known is None else (known.file, known.vq_file)
        return find_weights(fetch(source, wanted, revision=revision, token=token), known, VARIANTS)

    @classmethod
    def recognises(cls, source: str | Path) -> bool:
        """Whether a path is that of this model's file, by its published name, or of its folder."""
        variants = VARIANTS if cls.variant is None else (cls.variant,)
        return any(find_file(place(source), variant) is not None for variant in variants)

    @property
    def blocks(self) -> Sequence[Block]:
        """The transformer blocks in order."""
        return cast("Sequence[Block]", self.transformer.blocks)

    def check_prompts(self, prompts: Sequence[Any]) -> None:
        """Look up every class, or look at the shape of every caption.

        Raises:
            PromptError: there is no such class; or a caption is no text, is a text where there is no encoder,
                or is a tensor of another shape.
        """
        for prompt in prompts:
            if isinstance(self.kind, Classes):
                self._class(prompt)
            else:
                self._check_caption(prompt)

    def condition(self, prompts: Sequence[Any], guided: bool) -> Condition:
        """One token a class; the tokens of a caption, left-padded to the longest.

        Raises:
            PromptError: as `check_prompts`.
        """
        if isinstance(self.kind, Classes):
            numbers = [self._class(prompt) for prompt in prompts]
            numbers += [self.kind.count] * len(prompts) if guided else []
            embeddings = self.classes(torch.tensor(numbers, device=self.device))[:, None]
            mask = torch.ones(embeddings.shape[:2], dtype=torch.bool, device=self.device)
        else:
            states = self._states(prompts)
            length = max(map(len, states))
            padded = torch.stack([nn.functional.pad(x, (0, 0, length - len(x), 0)) for x in states])
            absent = torch.tensor([length - len(x) for x in states], device=self.device)
            mask = torch.arange(length, device=self.device) >= absent[:, None]
            if guided:
                blank = self.unconditional[self.kind.longest - length :]
                padded = torch.cat([padded, blank.expand_as(padded)])
                mask = mask.repeat(2, 1)  # an unconditional row is as long as the caption beside it
            embeddings = self.caption(padded)
        return Condition(embeddings, mask, self._rotation(embeddings.shape[1]))

    def _rotation(self, length: int) -> Tensor:
        """Cosines and sines, float32 `[1, length + N, head_dim]`; all zero for condition tokens."""
        grid, head_dim = self.spec.grid, self.spec.head_dim
        cells = torch.arange(grid.tokens, device=self.device)
        turned = grid_rotation(grid.row(cells), grid.column(cells), head_dim, ROPE_THETA)
        return torch.cat([turned.new_zeros(length, head_dim), turned])[None]

    def _class(self, prompt: Any) -> int:
        count = cast(Classes, self.kind).count
        is_imagenet = count == len(class_names())
        if isinstance(prompt, str) and is_imagenet:
            return class_number(prompt)
        number = whole(prompt)
        if isinstance(prompt, str) and prompt.strip().isdecimal() and len(prompt) < 10:
            number = int(prompt)
        if number is None or not 0 <= number < count:
            named = " or a name of ImageNet" if is_imagenet else ""
            raise PromptError(
                f"{shown(prompt)} is no class: expected a whole number from 0 to {count - 1}{named}"
            )
        return number

    def _check_caption(self, prompt: Any) -> None:
        kind = cast(Captions, self.kind)
        if isinstance(prompt, str):
            if self.encoder is None:
                raise PromptError(
                    f"{self.spec.name} has no text encoder: give captions as tensors [tokens, {kind.width}] "
                    "of its states, or load the model with one"
                )
            self.encoder.ids(prompt)
        elif (
            not isinstance(prompt, Tensor)
            or prompt.ndim != 2
            or not prompt.is_floating_point()
            or not 1 <= len(prompt) <= kind.longest
            or prompt.shape[1] != kind.width
        ):
            described = f"of shape {tuple(prompt.shape)}" if isinstance(prompt, Tensor) else shown(prompt)
            raise PromptError(
                f"the caption {described} is neither a text nor a float tensor of 1 to {kind.longest} states "
                f"of width {kind.width}"
            )

    def _states(self, prompts: Sequence[Any]) -> list[Tensor]:
        """States of every caption, `[tokens, width]`, in the model's dtype."""
        for prompt in prompts:
            self._check_caption(prompt)
        # The samples of a prompt come together, and are encoded once.
        texts = list(dict.fromkeys(prompt for prompt in prompts if isinstance(prompt, str)))
        encoded = self.encoder(texts) if self.encoder is not None and texts else []
        of_text = dict(zip(texts, encoded, strict=True))
        states = [of_text[prompt] if isinstance(prompt, str) else prompt for prompt in prompts]
        return [x.to(self.device, self.dtype) for x in states]

    def embed(self, tokens: Tensor, position: Tensor) -> Tensor:
        """The code's vector; the place does not matter."""
        return cast(Tensor, self.codes(tokens))[:, None]

    def head(self, hidden: Tensor, position: Tensor) -> Tensor:
        """Final norm and one projection; every code may stand everywhere."""
        return cast(Tensor, self.output(self.transformer.norm(hidden)))[:, 0].float()

    def pixels(self, tokens: Tensor) -> Tensor:
        """Draw the codes; colours are rounded to the nearest, as by the authors' sampling for FID."""
        return self.vq.pixels(rearrange(tokens, "n (h w) -> n h w", h=self.spec.grid.rows), "nearest")

    @property
    def picture_part(self) -> nn.Module:
        """The picture decoder."""
        return self.vq

    def example_prompts(self, count: int, seed: int) -> list[Any]:
        """Classes or captions; without a text encoder, random states of as many tokens as captions have."""
        rng = numpy.random.default_rng(seed)
        if isinstance(self.kind, Classes):
            return cast("list[Any]", rng.integers(self.kind.count, size=count).tolist())
        if self.encoder is not None:
            return [EXAMPLES[i] for i in rng.integers(len(EXAMPLES), size=count)]
        lengths = rng.integers(1, min(24, self.kind.longest) + 1, size=count)
        return [torch.from_numpy(rng.normal(0, 0.2, (n, self.kind.width))).float() for n in lengths]

    def weight_slots(self) -> dict[str, WeightSlot]:
        """Where the tensors of a published checkpoint go, all but those of the picture decoder.

        It rotates neighbouring rows of queries and keys; here the rows of a head are put in another order,
        so that those that belong together lie half a head apart.
        """
        config = self.transformer.config
        rotated = 2 * config.heads * config.head_dim  # queries and keys, not values

        def reorder(weight: Tensor) -> Tensor:
            pairs = config.head_dim // 2
            halves = rearrange(weight[:rotated], "(n pairs two) w -> (n two pairs) w", pairs=pairs, two=2)
            return torch.cat([halves, weight[rotated:]])

        slots = {
            "tok_embeddings.weight": WeightSlot(self.codes.weight),
            "norm.weight": WeightSlot(self.transformer.norm.weight),
            "output.weight": WeightSlot(self.output.weight),
        }
        if isinstance(self.kind, Classes):
            slots["cls_embedding.embedding_table.weight"] = WeightSlot(self.classes.weight)
        else:
            first, last = cast(nn.Linear, self.caption[0]), cast(nn.Linear, self.caption[2])
            slots["cls_embedding.cap_proj.fc1.weight"] = WeightSlot(first.weight)
            slots["cls_embedding.cap_proj.fc2.weight"] = WeightSlot(last.weight)
            slots["cls_embedding.uncond_embedding"] = WeightSlot(self.unconditional)
        for layer, block in enumerate(cast("list[transformer.Block]", self.transformer.blocks)):
            gate, up = block.gate_up.weight.chunk(2)
            of_layer = {
                "attention_norm": WeightSlot(block.attention_norm.weight),
                "attention.wqkv": WeightSlot(block.qkv.weight, reorder),
                "attention.wo": WeightSlot(block.output.weight),
                "ffn_norm": WeightSlot(block.mlp_norm.weight),
                "feed_forward.w1": WeightSlot(gate),
                "feed_forward.w3": WeightSlot(up),
                "feed_forward.w2": WeightSlot(block.down.weight),
            }
            slots |= {f"layers.{layer}.{name}.weight": slot for name, slot in of_layer.items()}
        return slots


EXAMPLES = (
    "a red bus next to a lake",
    "a bowl of oranges on a wooden table",
    "a lighthouse in a storm, painted in watercolours",
    "an astronaut riding a horse in the desert",
    "a bee on a yellow flower",
)


def _registered(suffix: str, variant: LlamaGenVariant, about: str) -> type[LlamaGen]:
    """The class of one model, which is `LlamaGen` with its variant."""
    return type(
        f"LlamaGen{suffix}",
        (LlamaGen,),
        {"variant": variant, "__module__": __name__, "__doc__": f"{about}: see `LlamaGen`."},
    )


def _of_classes(size: str, pixels: int) -> type[LlamaGen]:
    about = f"LlamaGen-{size}, {pixels} x {pixels} pixels of a class of ImageNet"
    return _registered(f"{size}{pixels}", of_classes(size, pixels), about)


def _of_captions(stage: int, pixels: int) -> type[LlamaGen]:
    about = f"LlamaGen-XL after stage {stage}, {pixels} x {pixels} pixels from a caption"
    return _registered(f"T2I{pixels}", of_captions(stage, pixels), about)


LlamaGenB256, LlamaGenB384 = _of_classes("B", 256), _of_classes("B", 384)
LlamaGenL256, LlamaGenL384 = _of_classes("L", 256), _of_classes("L", 384)
LlamaGenXL384, LlamaGenXXL384, LlamaGen3B384 = (_of_classes(size, 384) for size in ("XL", "XXL", "3B"))
# The weights of these three were not published.
LlamaGenXL256, LlamaGenXXL256, LlamaGen3B256 = (_of_classes(size, 256) for size in ("XL", "XXL", "3B"))
LlamaGenT2I256, LlamaGenT2I512 = _of_captions(1, 256), _of_captions(2, 512)

VARIANTS: tuple[LlamaGenVariant, ...] = tuple(
    cast(LlamaGenVariant, model.variant) for model in LlamaGen.__subclasses__()
)
