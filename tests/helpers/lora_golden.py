"""Makes `tests/data/lora_peft`: adapters as peft saves them, and what peft adds to the weights for them.

python tests/helpers/lora_golden.py     needs peft; was run with 0.21.2
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from janus_files import write_janus
from safetensors.torch import load_file, save_file

FOLDER = Path(__file__).parents[1] / "data" / "lora_peft"
ADAPTERS = {
    "plain": {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r"model\.language_model\.layers\.\d\.(self_attn\.[qk]_proj|mlp\.up_proj)",
        "rank_pattern": {"k_proj": 3, r"layers\.1\.mlp\.up_proj": 1},
        "alpha_pattern": {r"^model\.language_model\.layers\.0\.self_attn\.q_proj": 7, "up_proj": 5},
    },
}


def main() -> None:
    """Write a folder for each of the adapters."""
    from peft import LoraConfig, get_peft_model
    from transformers import JanusConfig, JanusForConditionalGeneration

    with tempfile.TemporaryDirectory() as base:
        write_janus(Path(base), "transformers")
        weights = load_file(Path(base) / "model.safetensors")
        for name, config in ADAPTERS.items():
            torch.manual_seed(0)
            model = JanusForConditionalGeneration(JanusConfig.from_pretrained(base))
            own = model.state_dict()  # of which the picture encoder differs, which no adapter is for
            there = {name: tensor for name, tensor in weights.items() if name in own}
            fitting = {name: tensor for name, tensor in there.items() if tensor.shape == own[name].shape}
            model.load_state_dict(fitting, strict=False)
            before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            adapted = get_peft_model(model, LoraConfig(**config, init_lora_weights=False))
            adapted.save_pretrained(FOLDER / name)
            (FOLDER / name / "README.md").unlink(missing_ok=True)
            after = adapted.merge_and_unload().state_dict()
            added = {name: after[name] - before[name] for name in before if name in weights}
            added = {name: delta.contiguous() for name, delta in added.items() if delta.any()}
            save_file(added, FOLDER / name / "added.safetensors")


if __name__ == "__main__":
    main()
