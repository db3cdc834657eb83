"""Keys of a configuration that change arithmetic are computed or refused by name, in every family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arkv.errors import CheckpointError
from arkv.models.config import Section, llama_shape, rope_theta
from arkv.models.emu3_checkpoint import EMU3_GEN, EMU3_STAGE1
from arkv.models.emu3_checkpoint import read_variant as read_emu3
from arkv.models.emu35_checkpoint import EMU35_IMAGE
from arkv.models.emu35_checkpoint import read_variant as read_emu35
from arkv.models.janus import JanusPro
from arkv.models.janus_checkpoint import JANUS_PRO_1B, JANUS_PRO_7B, read_variant
from arkv.models.lumina2_checkpoint import LUMINA_2
from arkv.models.lumina2_checkpoint import read_variant as read_lumina2
from arkv.models.lumina_checkpoint import LUMINA_7B_768, code_name, size_name
from arkv.models.lumina_checkpoint import read_variant as read_lumina

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
}
PUBLISHED_1B: dict[str, Any] = {
    "model_type": "multi_modality",
    "architectures": ["MultiModalityCausalLM"],
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "vision_config": {"cls": "CLIPVisionTower", "params": {"image_size": 384}},
    "aligner_config": {"cls": "MlpProjector", "params": {"depth": 2, "projector_type": "mlp_gelu"}},
    "gen_vision_config": {
        "cls": "VQ-16",
        "model_type": "gen_vision",
        "params": {"image_token_size": 16384, "n_embed": 8},
    },
    "gen_aligner_config": {
        "cls": "MlpProjector",
        "model_type": "gen_aligner",
        "params": {"depth": 2, "input_dim": 8, "n_embed": 2048, "projector_type": "mlp_gelu"},
    },
    "gen_head_config": {
        "cls": "vision_head",
        "model_type": "gen_head",
        "params": {"image_token_embed": 2048, "image_token_size": 16384, "n_embed": 2048},
    },
    "language_config": LLAMA
    | {"max_position_embeddings": 16384, "_attn_implementation": "flash_attention_2"},
}


def write(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def janus(folder: Path, **changes: Any) -> Path:
    return write(folder, PUBLISHED_1B | {"language_config": PUBLISHED_1B["language_config"] | changes})


def lumina(folder: Path, **changes: Any) -> Path:
    ids = {code_name(code): 4 + code for code in range(8192)}
    ids |= {size_name(cells): 8804 + cells for cells in range(200)}
    ids |= {"<s>": 0, "<racm3:break>": 8197, "<reserved08706>": 8710, "<reserved08799>": 8803}
    return write(folder, {"model_type": "chameleon", "vocabulary_map": ids, "z_loss_weight": 1e-5} | changes)


EMU3: dict[str, Any] = {"vocab_size": 184622, "max_position_embeddings": 9216, "attention_dropout": 0.1}


def emu3(folder: Path, **changes: Any) -> Path:
    ids = {
        f"{name}_token_id": 151840 + i for i, name in enumerate(("eol", "bos", "img", "boi", "eoi", "eof"))
    }
    config = {"model_type": "Emu3", "image_area": 518400, "auto_map": {}, "pretraining_tp": 1}
    return write(folder, config | EMU3 | ids | changes)


def emu3_hf(folder: Path, **changes: Any) -> Path:
    text = EMU3 | {"model_type": "emu3_text_model"} | changes
    return write(folder, {"model_type": "emu3", "text_config": text, "vq_config": {}, "image_token_id": 7})


def emu35(folder: Path, **changes: Any) -> Path:
    config = {"model_type": "Emu3", "vocab_size": 282926, "head_dim": 128, "rms_norm_eps": 1e-6}
    return write(folder, config | {"image_area": 1048576, "torch_dtype": "bfloat16"} | changes)


def lumina2(folder: Path, **changes: Any) -> Path:
    config = {"model_type": "chameleon", "vocab_size": 171385, "vocabulary_map": {"a": 1}}
    return write(folder, config | {"model_parallel_size": 1, "swin_norm": False} | changes)


READERS: dict[str, Any] = {
    "emu3.5": (emu35, lambda folder: read_emu35(folder, EMU35_IMAGE)),
    "lumina2": (lumina2, lambda folder: read_lumina2(folder, LUMINA_2)),
    "emu3": (emu3, read_emu3),
    "emu3-transformers": (emu3_hf, lambda folder: read_emu3(folder, EMU3_GEN)),
    "janus": (janus, read_variant),
    "lumina": (lumina, lambda folder: read_lumina(folder, LUMINA_7B_768)),
}

IDENTITY: list[dict[str, Any]] = [
    {},
    {"rope_scaling": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    {"rope_parameters": {"rope_theta": 10000}, "rope_theta": 10000.0},
    {"rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "linear", "factor": 1.0}},
    {"partial_rotary_factor": 1.0},
    {"hidden_act": "silu"},
    {"hidden_act": "swish"},
    {"attention_bias": False, "mlp_bias": False},
    {"sliding_window": None},
    {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    {"attention_dropout": 0.1, "pretraining_tp": 2, "use_cache": False},
    {"head_dim": 128},
    {"head_dim": None, "num_key_value_heads": None},
    {"query_pre_attn_scalar": 128},
    {"embedding_multiplier": 1.0, "residual_multiplier": 1, "logits_scaling": 1.0},
    {"attention_multiplier": 128**-0.5},
    {"some_new_key": None},
    {"tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": 1},
]

OTHER: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "linear"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 4}}, "linear"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "llama3"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "yarn"),
    ({"rope_scaling": {"factor": 2.0}}, "factor"),
    ({"rope_scaling": {"rope_type": ["default"]}}, "scaled"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
    ({"rope_parameters": {"rope_theta": 1e6}, "rope_theta": 1e4}, "rope_theta"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_theta": "10000"}, "rope_theta"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 128}, "sliding_window"),
    ({"sliding_window": 128, "use_sliding_window": True}, "sliding_window"),
    ({"layer_types": ["sliding_attention"] * 24}, "layer_types"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar"),
    ({"attention_multiplier": 1.0}, "attention_multiplier"),
    ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
    ({"scale_embedding": True}, "scale_embedding"),
    ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"logits_scaling": 8.0}, "logits_scaling"),
    ({"use_qk_norm": True}, "use_qk_norm"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
    ({"some_new_key": 3}, "some_new_key"),
    ({"some_new_key": False}, "some_new_key"),
]


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("keys", IDENTITY, ids=str)
def test_keys_that_change_nothing_are_taken(family: str, keys: dict[str, Any], tmp_path: Path) -> None:
    build, read = READERS[family]
    if family.startswith("lumina"):
        keys = keys | ({"num_key_value_heads": 32} if "num_key_value_heads" in keys else {})
    assert read(build(tmp_path, **keys))


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize(("keys", "name"), OTHER, ids=lambda value: str(value)[:60])
def test_keys_that_change_arithmetic_are_refused_by_name(
    family: str, keys: dict[str, Any], name: str, tmp_path: Path
) -> None:
    build, read = READERS[family]
    with pytest.raises(CheckpointError, match=name) as caught:
        read(build(tmp_path, **keys))
    assert "\n" not in str(caught.value)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("family", READERS)
def test_another_base_of_the_frequencies_is_computed(family: str, tmp_path: Path) -> None:
    build, read = READERS[family]
    for keys in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        found = read(build(tmp_path, **keys))
        assert (found[0] if isinstance(found, tuple) else found).rope_theta == 5e5


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": 24.0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": [24]}, "num_hidden_layers"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 127}, "even"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "divide"),
        ({"num_key_value_heads": 5}, "multiple"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"rope_theta": float("inf")}, "rope_theta"),
    ],
    ids=str,
)
def test_numbers_out_of_bounds_are_refused_before_anything_is_built(
    changes: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=name) as caught:
        JanusPro.from_pretrained(janus(tmp_path, **changes), device="meta")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": ["janus"]},
        {"model_type": {"janus": 1}},
        {"model_type": None},
        PUBLISHED_1B | {"language_config": [1]},
        PUBLISHED_1B | {"language_config": None},
        PUBLISHED_1B | {"gen_vision_config": "VQ-16"},
        PUBLISHED_1B | {"gen_aligner_config": {"params": {"depth": 3}}},
        PUBLISHED_1B | {"gen_aligner_config": {"params": {"projector_type": "linear"}}},
        PUBLISHED_1B | {"gen_vision_config": {"cls": "VQ-8"}},
        PUBLISHED_1B | {"vision_understand_enc_config": {}},
        {
            "model_type": "janus",
            "text_config": LLAMA,
            "vision_config": {},
            "vq_config": {"channel_multiplier": 3},
        },
        {
            "model_type": "janus",
            "text_config": LLAMA,
            "vision_config": {},
            "vq_config": {"hidden_act": "relu"},
        },
        {
            "model_type": "janus",
            "text_config": LLAMA,
            "vision_config": {},
            "vq_config": {"base_channels": 33},
        },
        {"model_type": "janus", "text_config": LLAMA, "vision_config": {"patch_size": 0}, "vq_config": {}},
        {
            "model_type": "janus",
            "text_config": LLAMA,
            "vision_config": {"image_size": [384]},
            "vq_config": {},
        },
    ],
    ids=lambda config: str(config)[:70],
)
def test_a_hostile_or_other_configuration_is_one_line(config: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_variant(write(tmp_path, config))
    assert "\n" not in str(caught.value)


def test_published_configurations_are_taken_whole(tmp_path: Path) -> None:
    assert read_variant(write(tmp_path, PUBLISHED_1B)) == (JANUS_PRO_1B, "deepseek")
    transformers = pytest.importorskip("transformers")
    config = transformers.JanusConfig(text_config=LLAMA | {"num_hidden_layers": 30, "hidden_size": 4096})
    config.text_config.intermediate_size, config.text_config.num_attention_heads = 11008, 32
    config.text_config.num_key_value_heads = config.text_config.head_dim = None
    variant, layout = read_variant(write(tmp_path, json.loads(config.to_json_string(use_diff=False))))
    assert (variant, layout) == (JANUS_PRO_7B, "transformers")
    chameleon = json.loads(
        transformers.ChameleonConfig(vocabulary_map={"<image>": 8711}).to_json_string(use_diff=False)
    )
    del chameleon["vocabulary_map"]
    assert read_lumina(lumina(tmp_path, **chameleon), LUMINA_7B_768) == LUMINA_7B_768
    emu = json.loads(transformers.Emu3Config(vocabulary_map={}).to_json_string(use_diff=False))
    assert read_emu3(write(tmp_path, emu), EMU3_GEN) == (EMU3_GEN, "transformers")
    assert read_emu3(emu3(tmp_path, image_area=262144)) == (EMU3_STAGE1, "baai")
    llama = json.loads(transformers.LlamaConfig().to_json_string(use_diff=False))
    shape, words, theta = llama_shape(Section(llama, "x"), 7)
    assert (shape.layers, shape.width, shape.head_dim, words, theta) == (32, 4096, 128, 32000, 10000.0)
    assert rope_theta(Section({}, "x"), 3.0) == 3.0
