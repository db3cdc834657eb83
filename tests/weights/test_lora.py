"""LoRA adapters: what is added to which weight, and what is told of those that do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from janus_files import write_janus
from lora_golden import ADAPTERS, FOLDER
from safetensors.torch import load_file, save_file
from torch import Tensor

from arkv.errors import CheckpointError
from arkv.models.janus import JanusPro
from arkv.weights.lora import PREFIX, read_adapter
from arkv.weights.quantized import quantize_

LAYER = "model.language_model.layers.{}."
TARGETS = [LAYER.format(0) + "self_attn.q_proj", LAYER.format(1) + "self_attn.v_proj"]
TARGETS += [LAYER.format(1) + "mlp.up_proj", "model.generation_head.vision_head"]
CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somewhere",
    "bias": "none",
    "r": 3,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj", "up_proj", "vision_head"],
    "modules_to_save": None,
    "use_dora": False,
    "loftq_config": {},
    "init_lora_weights": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    write_janus(folder, "transformers")
    return folder


@pytest.fixture(scope="module")
def plain(base: Path) -> dict[str, Tensor]:
    """Weights of the checkpoint, by the names that they have there."""
    slots = JanusPro.from_pretrained(base).weight_slots("transformers")
    return {name: slot.target.detach().clone() for name, slot in slots.items()}


@pytest.fixture
def adapter(tmp_path: Path, plain: dict[str, Tensor]) -> Callable[..., Path]:
    def write(tensors: dict[str, Tensor | None] | None = None, rank: int = 3, **config: Any) -> Path:
        torch.manual_seed(3)
        made: dict[str, Tensor | None] = {}
        for module in TARGETS:
            rows, columns = plain[f"{module}.weight"].shape
            made[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(rank, columns)
            made[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, rank)
        made |= tensors or {}
        save_file({n: t for n, t in made.items() if t is not None}, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": rank} | config))
        return tmp_path

    return write


def product(folder: Path, module: str) -> Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return tensors[f"{PREFIX}{module}.lora_B.weight"] @ tensors[f"{PREFIX}{module}.lora_A.weight"]


def merged(base: Path, folder: Path) -> dict[str, Tensor]:
    slots = JanusPro.from_pretrained(base, lora=folder).weight_slots("transformers")
    return {name: slot.target for name, slot in slots.items()}


@pytest.mark.parametrize(
    ("config", "scales"),
    [
        ({}, [8 / 3] * 4),
        ({"use_rslora": True}, [8 / 3**0.5] * 4),
        ({"alpha_pattern": {"q_proj": 1.5, r"layers\.1\.mlp\..*": 6}}, [0.5, 8 / 3, 2, 8 / 3]),
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_the_product_of_the_matrices_is_added_to_its_weight_and_to_no_other(
    base: Path,
    plain: dict[str, Tensor],
    adapter: Callable[..., Path],
    config: dict[str, Any],
    scales: list[float],
) -> None:
    folder = adapter(**config)
    found = merged(base, folder)
    for module, scale in zip(TARGETS, scales, strict=True):
        expected = plain[f"{module}.weight"] + scale * product(folder, module)
        torch.testing.assert_close(found[f"{module}.weight"], expected, atol=1e-5, rtol=1e-5)
    for name in plain.keys() - {f"{module}.weight" for module in TARGETS}:
        assert torch.equal(found[name], plain[name]), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_is_merged_is_what_peft_merges(base: Path, plain: dict[str, Tensor], kind: str) -> None:
    """Of what it is for, the encoder of pictures is not loaded: that changes nothing that is drawn."""
    added = load_file(FOLDER / kind / "added.safetensors")
    assert added.keys() <= plain.keys(), "all else was left out when the file was made"
    for name, weight in merged(base, FOLDER / kind).items():
        expected = plain[name] + added[name] if name in added else plain[name]
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)


def test_a_module_may_have_a_rank_of_its_own(
    base: Path, plain: dict[str, Tensor], adapter: Callable[..., Path]
) -> None:
    module = TARGETS[1]
    rows, columns = plain[f"{module}.weight"].shape
    own = {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(5, columns),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(rows, 5),
    }
    folder = adapter(own, rank_pattern={"v_proj": 5})
    expected = plain[f"{module}.weight"] + 8 / 5 * product(folder, module)
    torch.testing.assert_close(merged(base, folder)[f"{module}.weight"], expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_is_merged_before_weights_are_rounded(base: Path, adapter: Callable[..., Path]) -> None:
    folder = adapter()
    expected = JanusPro.from_pretrained(base, lora=folder)
    quantize_(expected, "int4")
    found = JanusPro.from_pretrained(base, lora=folder, weights="int4").state_dict()
    assert found.keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name


A, B = (f"{PREFIX}{TARGETS[0]}.lora_{letter}.weight" for letter in "AB")
REFUSED: list[tuple[dict[str, Any], dict[str, Tensor | None], str]] = [
    ({"peft_type": "IA3"}, {}, r"is no LoRA: its configuration has the peft_type 'IA3'"),
    ({"use_dora": True}, {}, r"has use_dora True in its configuration, which cannot be merged"),
    ({"bias": "all"}, {}, r"has bias 'all' in its configuration, which cannot be merged"),
    ({"modules_to_save": ["lm_head"]}, {}, r"has modules_to_save \['lm_head'\]"),
    (
        {"of_tomorrow": 3},
        {},
        r"has of_tomorrow 3 in its configuration, which cannot be merged: merge it with",
    ),
    ({"init_lora_weights": "pissa_niter_4"}, {}, r"was begun by 'pissa_niter_4', which changes the base"),
    ({"lora_alpha": 0}, {}, r"lora_alpha of .* is 0: expected a number above 0"),
    ({"rank_pattern": {"(": 2}}, {}, r"rank_pattern has a pattern that is none"),
    ({"r": 4}, {}, r"matrices of shape \(3, 64\) and \(\d+, 3\) for .*.weight, and rank 4"),
    ({}, {A: None}, r"is not complete: .*q_proj lacks one of its matrices"),
    ({}, {A.replace("lora_A", "lora_magnitude_vector"): torch.ones(2)}, r"only matrices lora_A and lora_B"),
    ({}, {B: torch.ones(8, 3)}, r"for a .*q_proj.weight of shape \(8, 64\), the model's is \(\d+, 64\)"),
    (
        {},
        {A.replace("model.language_model", "language_model.model"): torch.ones(3, 64)}
        | {B.replace("model.language_model", "language_model.model"): torch.ones(64, 3)},
        r"is for language_model.model.layers.0.self_attn.q_proj.weight, which the checkpoint has not; it has",
    ),
]


@pytest.mark.parametrize(("config", "tensors", "told"), REFUSED, ids=[told[:30] for _, _, told in REFUSED])
def test_what_cannot_be_merged_is_refused_in_one_line(
    base: Path,
    adapter: Callable[..., Path],
    config: dict[str, Any],
    tensors: dict[str, Tensor | None],
    told: str,
) -> None:
    folder = adapter(tensors)
    described = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(described | config))
    with pytest.raises(CheckpointError, match=told) as caught:
        JanusPro.from_pretrained(base, lora=folder)
    assert "\n" not in str(caught.value)


def test_an_adapter_that_changes_no_picture_is_refused(
    base: Path, plain: dict[str, Tensor], tmp_path: Path
) -> None:
    module = f"{PREFIX}model.vision_model.encoder.layers.0.self_attn.q_proj"
    matrices = {f"{module}.lora_A.weight": torch.ones(3, 8), f"{module}.lora_B.weight": torch.ones(8, 3)}
    save_file(matrices, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=r"is for model.vision_model.* only, which no picture is drawn"):
        JanusPro.from_pretrained(base, lora=tmp_path)


def test_what_is_no_adapter_is_refused(tmp_path: Path, adapter: Callable[..., Path]) -> None:
    with pytest.raises(CheckpointError, match="there is no file or folder"):
        read_adapter(tmp_path / "absent")
    folder = adapter()
    with pytest.raises(CheckpointError, match="is a file: give the folder with adapter_config.json"):
        read_adapter(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors: save the adapter with"):
        read_adapter(folder)
