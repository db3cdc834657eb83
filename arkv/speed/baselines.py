"""Transformers' own Janus, decoded as its `generate` does, for the benchmark to compare with.

The model is the class of transformers with arkv's weights in it, not copied; prompts, guidance and drawing
are arkv's. So what differs is the code of the model and its cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from arkv.errors import ArkvError
from arkv.estimate import check_memory
from arkv.model import Condition, Model
from arkv.models.janus import JanusPro  # noqa: TID251  the baseline is this family's
from arkv.registry import load_policy
from arkv.speed.engine import STATIC, StepByStep
from arkv.weights.packing import unpacked
from arkv.weights.quantized import layers

if TYPE_CHECKING:
    from transformers import JanusForConditionalGeneration
    from transformers.cache_utils import Cache


class TransformersEngine(StepByStep):
    """Transformers' Janus with a cache of transformers.

    Args:
        model: Janus-Pro; its weights are shared.
        kind: one of `arkv.speed.engine.BASELINES`. For the static one the language model is compiled with the
            settings of transformers' `generate`, for decoding only.

    Raises:
        ArkvError: the model is not Janus-Pro.
    """

    def __init__(self, model: Model, kind: str) -> None:
        if not isinstance(model, JanusPro):
            raise ArkvError(f"transformers has no {model.spec.name}: its baseline is for Janus-Pro only")
        super().__init__(model)
        self._spec, self._static = model.spec, kind == STATIC
        self._own, self._model = model, build(model)
        self._decode = self._model.model.language_model
        if self._static:
            from transformers import CompileConfig

            self._decode = torch.compile(self._decode, **CompileConfig().to_dict())
        self._cache: Cache | None = None

    def prefill(self, condition: Condition) -> Tensor:
        """Prefill an empty cache. A static one is kept, so that its graphs are."""
        from transformers import DynamicCache, StaticCache

        rows, self._length = condition.mask.shape
        if self._cache is None:
            # The same keys and values as our full cache; concatenation takes more while it lasts.
            check_memory(self._own, load_policy("full"), rows, False, self._length)
        longest = self._length + self._spec.grid.tokens
        config = self._model.config.get_text_config()
        if not self._static:
            self._cache = DynamicCache(config=config)
        elif self._cache is None:
            self._cache = StaticCache(config=config, max_cache_len=longest)
        else:
            self._cache.reset()  # type: ignore[no-untyped-call]
        # Visual tokens are attended to wherever the causal mask lets them be.
        self._mask = torch.ones(rows, longest, dtype=torch.bool, device=condition.mask.device)
        self._mask[:, : self._length] = condition.mask
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)
        language_model = self._model.model.language_model
        return self._step(language_model, condition.embeddings, 0, self._length)

    def advance(self, tokens: Tensor, position: int) -> Tensor:
        """Decode one token further."""
        place = self._length + position
        embeddings = self._model.prepare_embeddings_for_image_generation(tokens[:, None])
        return self._step(self._decode, embeddings, place, place + 1)

    def skip(self, position: int) -> None:
        """Append zeros in place of the tokens between."""
        missing = self._length + position - int(self._begun.get_seq_length())
        spec, like = self._spec, self._model.model.generation_embeddings.weight
        zeros = like.new_zeros(len(self._mask), spec.kv_heads, missing, spec.head_dim)
        for layer in range(spec.layers):
            self._begun.update(zeros, zeros, layer)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the cache's keys and values; a dynamic cache's grow."""
        return sum(
            cast(Any, layer).keys.nbytes + cast(Any, layer).values.nbytes for layer in self._begun.layers
        )

    @property
    def slot_bytes(self) -> float:
        """Bytes of a key and a value in the dtype of the weights."""
        return 2 * self._spec.head_dim * self._model.dtype.itemsize

    def resident(self, position: int) -> float:
        """Every visual token so far."""
        return position + 1

    def release(self) -> None:
        """Drop the cache."""
        self._cache = None

    def _step(self, language_model: Any, embeddings: Tensor, start: int, end: int) -> Tensor:
        output = language_model(
            inputs_embeds=embeddings,
            attention_mask=self._mask if self._static else self._mask[:, :end],
            position_ids=self._positions[:, start:end],
            past_key_values=self._begun,
            use_cache=True,
        )
        # A captured graph overwrites its output at the next step.
        hidden = output.last_hidden_state[:, -1].clone()
        return cast(Tensor, self._model.model.generation_head(hidden)).float()

    @property
    def _begun(self) -> Cache:
        assert self._cache is not None, "begin comes first"
        return self._cache


def build(model: JanusPro) -> JanusForConditionalGeneration:
    """A Janus of transformers of the same shape, with the same weights where pictures are decoded.

    What a picture's tokens do not pass through, such as the vision tower, stays on the meta device.

    Args:
        model: the weights are its own, not copies; of packed ones, plain copies.

    Raises:
        ArkvError: its weights are of few bits, which that Janus does not multiply.
    """
    if next(layers(model), None) is not None:
        raise ArkvError(
            "transformers' own loop takes plain weights, and these are of few bits: leave out weights"
        )
    from transformers import JanusConfig, JanusForConditionalGeneration

    spec, config = model.spec, model.transformer.config
    pictures = {
        "embed_dim": model.codes.embedding_dim,
        "num_embeddings": spec.vocabulary,
        "projection_dim": spec.width,
        "image_token_embed_dim": spec.width,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    }
    text = {
        "model_type": "llama",
        "vocab_size": model.words.num_embeddings,
        "hidden_size": spec.width,
        "intermediate_size": spec.hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": 16_384,
    }
    vision = {"num_hidden_layers": 1, "image_size": 16 * spec.grid.rows}
    with torch.device("meta"):
        built = JanusForConditionalGeneration(
            JanusConfig(text_config=text, vision_config=vision, vq_config=pictures)
        )
    with unpacked(model):
        weights = {name: slot.target.detach() for name, slot in model.weight_slots("transformers").items()}
    used = ("model.language_model.", "model.generation_")
    for name in [name for name, _ in built.named_parameters() if name.startswith(used)]:
        owner, _, leaf = name.rpartition(".")
        shared = nn.Parameter(weights[name], requires_grad=False)
        built.get_submodule(owner).register_parameter(leaf, shared)
    # Its table of frequencies is no weight, and was made on the meta device.
    language_model = built.model.language_model
    rotary = type(language_model.rotary_emb)(language_model.config)
    language_model.rotary_emb = rotary.to(model.device)
    return built.eval()  # type: ignore[no-untyped-call]
