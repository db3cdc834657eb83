"""Checkpoints that other libraries have quantised are refused by the library's name."""

import json
from pathlib import Path

import pytest
import torch
from janus_files import write_janus
from safetensors.torch import load_file, save_file

from arkv.errors import CheckpointError
from arkv.models.janus import JanusPro

LAYER = "model.language_model.layers.0.self_attn.q_proj"
WRITTEN = {
    "GPTQ": ["qweight", "qzeros", "scales", "g_idx"],
    "AWQ or GPTQ": ["qweight", "qzeros", "scales"],
    r"bitsandbytes, in four bits \(NF4 or FP4\)": [
        *("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
    ],
    "bitsandbytes, in eight bits": ["weight", "SCB", "weight_format"],
    "torchao": ["_weight_qdata", "_weight_scale", "_weight_zero_point"],
    "compressed-tensors": ["weight_packed", "weight_scale", "weight_shape"],
    "a library for float8": ["weight", "weight_scale_inv"],
}


@pytest.mark.parametrize("maker", WRITTEN)
def test_tensors_that_are_codes_are_told_by_their_names(tmp_path: Path, maker: str) -> None:
    write_janus(tmp_path, "transformers")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{LAYER}.weight"]
    tensors |= {f"{LAYER}.{name}": torch.zeros(2, dtype=torch.uint8) for name in WRITTEN[maker]}
    save_file(tensors, file)
    with pytest.raises(
        CheckpointError, match=f"{file} is quantised by {maker}, whose codes are not read: give"
    ):
        JanusPro.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("method", "maker"),
    [
        ("awq", "AWQ"),
        ("gptq", "GPTQ"),
        ("bitsandbytes", "bitsandbytes"),
        ("torchao", "torchao"),
        (7, "the method 7"),
    ],
)
def test_a_configuration_says_it_before_a_weight_is_looked_at(
    tmp_path: Path, method: object, maker: str
) -> None:
    write_janus(tmp_path, "transformers")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"that the checkpoint is quantised by {maker}, whose"):
        JanusPro.from_pretrained(tmp_path)
