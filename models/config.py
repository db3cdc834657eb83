"""Configurations read by a list of what is known: every key is used, checked, or known to change nothing.

A key that is passed over in silence can change every number of a model: another rotation, a window, a scale.
So a configuration with a key that nobody here knows is refused by the key's name, unless the key is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from arkv.errors import CheckpointError
from arkv.models.transformer import MOST_LAYERS, MOST_WIDTH, TransformerConfig
from arkv.weights.foreign import check_config

MOST_TOKENS = 2**24
"""Bound of a vocabulary, beyond all that there are."""

HARMLESS = (
    # What the file is and how it was written.
    *("_*", "architectures", "auto_map", "name_or_path", "transformers_version", "unsloth*", "cls"),
    *("torch_dtype", "dtype", "torchscript", "use_bfloat16", "tf_legacy_loss", "tokenizer_class"),
    # How it is run and trained.
    *("attn_implementation", "experts_implementation", "use_flash_attention*", "use_cache", "return_dict"),
    *(
        "*_loss_weight",
        "output_*",
        "gradient_checkpointing",
        "initializer_*",
        "*dropout*",
        "chunk_size_feed_forward",
    ),
    *("is_decoder", "is_encoder_decoder", "pretraining_tp", "max_position_embeddings", "max_sequence_length"),
    *("model_parallel_size", "problem_type", "task_specific_params", "finetuning_task", "prefix"),
    *("id2label", "label2id", "num_labels", "tie_encoder_decoder", "add_cross_attention"),
    "cross_attention_hidden_size",
    # Which tokens mean what, and how transformers samples.
    *("*_token_id", "*_token_index", "*_tokens", "*_token_ids", "bad_words_ids", "max_length", "min_length"),
    *("do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature"),
    *("top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "*no_repeat_ngram_size"),
    *("num_return_sequences", "remove_invalid_values", "exponential_decay_length_penalty", "ignore_index"),
    "return_dict_in_generate",
)
"""Patterns of the keys that change no number which is computed here."""

IDENTITY: Mapping[str, tuple[Any, ...]] = {
    "pruned_heads": ({}, []),
    "sliding_window": (),
    "use_sliding_window": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logits_soft_cap": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "embedding_scale": (1,),
    "scale_embedding": (False,),
    "residual_multiplier": (1,),
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "clip_qkv": (),
    "attention_bias": (False,),
    "attention_out_bias": (False,),
    "qkv_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "use_qk_norm": (False,),
    "qk_norm": (False,),
    "qk_layernorm": (False,),
    "use_parallel_residual": (False,),
}
"""Keys of transformers' Llama and of its relatives, with the values under which they change nothing."""


class Section:
    """One object of a configuration, and which of its keys have been looked at.

    Args:
        content: what the file has there.
        where: file and key, for messages.

    Raises:
        CheckpointError: it is no object, or of weights that are quantised.
    """

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise CheckpointError(f"{where} is {_shown(content)}: expected an object with keys")
        check_config(where, content)
        self.where = where
        self._content = content
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._content.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default where it is absent or null."""
        self._seen.add(key)
        value = self._content.get(key)
        return default if value is None else value

    def section(self, key: str) -> Section:
        """The object under a key.

        Raises:
            CheckpointError: there is none.
        """
        if key not in self:
            raise CheckpointError(f"{self.where} has no {key}: it is not this model's, or was cut short")
        return Section(self.get(key), f"{self.where}, {key}")

    def whole(self, key: str, default: int, most: int) -> int:
        """A whole number from 1 to `most`."""
        value = self.get(key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self._wrong(key, value, f"a whole number from 1 to {most}")
        return value

    def number(self, key: str, default: float, most: float) -> float:
        """A number above 0, at most `most`."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
            raise self._wrong(key, value, f"a number above 0, {most:g} at most")
        return float(value)

    def expect(self, key: str, *wanted: Any) -> None:
        """Refuse a key that is there, not null, and has none of these values.

        Args:
            key: whose value is looked at.
            wanted: what this family computes; nothing for a key that has to be absent or null.
        """
        value = self.get(key)
        if value is not None and not any(_same(value, one) for one in wanted):
            raise self._wrong(key, value, " or ".join(map(_shown, wanted)) if wanted else "null")

    def ignore(self, *patterns: str) -> None:
        """Note that keys change nothing here."""
        for key in self._content:
            if any(fnmatchcase(key, pattern) for pattern in patterns):
                self._seen.add(key)

    def close(self) -> None:
        """Refuse what has not been looked at and might change a number.

        Raises:
            CheckpointError: names the key.
        """
        self.ignore(*HARMLESS)
        for key, value in self._content.items():
            if key in self._seen or value is None:
                continue
            if key not in IDENTITY:
                raise CheckpointError(
                    f"{self.where} has the key {key!r} ({_shown(value)}), of which nobody here knows what it "
                    "changes: remove it if it changes nothing"
                )
            self.expect(key, *IDENTITY[key])

    def _wrong(self, key: str, value: object, wanted: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where} says {key} is {_shown(value)}: this model can have {wanted} there"
        )


LLAMA = TransformerConfig(
    layers=32, width=4096, heads=32, kv_heads=32, head_dim=128, hidden=11008, norm_eps=1e-6
)
"""The defaults of transformers' `LlamaConfig`."""


def llama_shape(
    described: Section,
    vocabulary: int,
    kind: str = "llama",
    usual: TransformerConfig = LLAMA,
    theta: float = 10_000.0,
) -> tuple[TransformerConfig, int, float]:
    """A Llama, or a relative of the same arithmetic, as its class of configurations describes it.

    What is left out has the defaults of that class. Query and key heads are as many as each other, and heads
    together as wide as the residual stream, where the usual shape has it so.

    Args:
        described: the section, which is closed.
        vocabulary: tokens, where it does not say.
        kind: the `model_type` that it may say.
        usual: the defaults; whether queries and keys are normalised is as there.
        theta: the default of the base of the frequencies.

    Returns:
        The shape, the tokens of the vocabulary, and the base of the rotary frequencies.

    Raises:
        CheckpointError: something is out of bounds, or is a Llama's that is not computed here.
    """
    described.expect("model_type", kind)
    described.expect("hidden_act", "silu", "swish")
    described.ignore("tie_word_embeddings")  # for the family to look at, if it uses that head
    heads = described.whole("num_attention_heads", usual.heads, MOST_WIDTH)
    width = described.whole("hidden_size", usual.width, MOST_WIDTH)
    is_split = usual.width == usual.heads * usual.head_dim
    if "head_dim" not in described and is_split and width % heads:
        raise CheckpointError(
            f"{described.where} says hidden_size is {width}, which {heads} heads do not divide"
        )
    layers = described.whole("num_hidden_layers", usual.layers, MOST_LAYERS)
    usual_kv_heads = heads if usual.kv_heads == usual.heads else usual.kv_heads
    kv_heads = described.whole("num_key_value_heads", usual_kv_heads, MOST_WIDTH)
    head_dim = described.whole("head_dim", width // heads if is_split else usual.head_dim, MOST_WIDTH)
    eps = described.number("rms_norm_eps", usual.norm_eps, 1.0)
    hidden = described.whole("intermediate_size", usual.hidden, MOST_WIDTH)
    words = described.whole("vocab_size", vocabulary, MOST_TOKENS)
    theta = rope_theta(described, theta)
    check_attention(described, layers, head_dim)
    described.close()
    if heads % kv_heads or head_dim % 2:
        raise CheckpointError(
            f"{described.where} has {heads} heads of {head_dim} numbers and {kv_heads} key heads: heads "
            "have to be a multiple of key heads, and their numbers even"
        )
    shape = TransformerConfig(layers, width, heads, kv_heads, head_dim, hidden, eps, usual.qk_norm)
    return shape, words, theta


def rope_theta(described: Section, default: float) -> float:
    """The base of the rotary frequencies, which are not scaled in any way.

    Under the old keys (`rope_theta`, `rope_scaling`) and the new one (`rope_parameters`).

    Raises:
        CheckpointError: they are scaled, cover a part of a head, or have two bases.
    """
    bases = [described.number("rope_theta", default, 1e12)] if "rope_theta" in described else []
    for key in ("rope_parameters", "rope_scaling"):
        if key not in described:
            continue
        rope = described.section(key)
        kinds = [kind for key in ("rope_type", "type") if (kind := rope.get(key)) is not None]
        factor = rope.get("factor", 1.0)
        if any(kind != "default" and not (kind == "linear" and _same(factor, 1)) for kind in kinds):
            raise CheckpointError(
                f"{rope.where} says that rotary frequencies are scaled ({_shown(kinds[0])}, factor "
                f"{_shown(factor)}): only the default ones are computed here"
            )
        rope.ignore("original_max_position_embeddings")
        if not kinds:
            rope.expect("factor", 1)
        if "rope_theta" in rope:
            bases.append(rope.number("rope_theta", default, 1e12))
        rope.close()
    if len(set(bases)) > 1:
        told = " and ".join(f"{base:g}" for base in bases)
        raise CheckpointError(f"{described.where} says rope_theta is {told}: give one of them")
    return bases[0] if bases else default


def check_attention(described: Section, layers: int, head_dim: int) -> None:
    """Refuse layers that do not look at all tokens, or scale what they see by something of their own.

    Raises:
        CheckpointError: a layer is of another type, or products are not divided by the root of the head's
            width.
    """
    types = described.get("layer_types")
    if types is not None and types != ["full_attention"] * layers:
        raise CheckpointError(
            f"{described.where} says layer_types is {_shown(types)}: every one of the {layers} layers "
            "has full attention here"
        )
    if _same(described.get("use_sliding_window"), False):
        described.ignore("sliding_window", "max_window_layers")
    described.expect("query_pre_attn_scalar", head_dim)
    scale = described.get("attention_multiplier")
    is_root = isinstance(scale, float) and math.isclose(scale, head_dim**-0.5, rel_tol=1e-6)
    if scale is not None and not is_root:
        described.expect("attention_multiplier", head_dim**-0.5)


def _same(value: object, wanted: object) -> bool:
    """Whether a value of JSON is another; true is not 1."""
    return isinstance(value, bool) == isinstance(wanted, bool) and value == wanted


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
