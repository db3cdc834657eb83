from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from arkv.models.rope import grid_rotation, sequence_rotation
from arkv.models.transformer import Block, HeadNorm, RMSNorm, Transformer, TransformerConfig
from arkv.weights.checkpoint import load_weights_

CONFIG = TransformerConfig(layers=3, width=16, heads=4, kv_heads=2, head_dim=8, hidden=24)


def make(config: TransformerConfig = CONFIG) -> Transformer:
    transformer = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.4, generator=generator)
    return transformer.eval()


def inputs(tokens: int = 9, rows: int = 2) -> tuple[Tensor, Tensor]:
    hidden = torch.randn(rows, tokens, CONFIG.width, generator=torch.Generator().manual_seed(1))
    return hidden, grid_rotation(torch.arange(tokens) // 3, torch.arange(tokens) % 3, 8, 100.0)[None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_the_norm_rounds_before_it_scales_as_published_models_do(dtype: torch.dtype) -> None:
    norm = RMSNorm(16, 1e-6).to(dtype)
    norm.weight.copy_(torch.rand(16))
    x = (300 * torch.randn(2, 5, 16)).to(dtype)  # the squares are more than float16 holds
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).to(dtype)
    assert torch.equal(norm(x), normed * norm.weight)


@torch.inference_mode()
def test_a_block_is_attention_and_swiglu_as_torch_has_them() -> None:
    block, (hidden, rotation) = make().blocks[0], inputs()
    query, key, value = block.project(hidden, rotation)
    assert query.shape == (2, 9, 4, 8)
    assert key.shape == value.shape == (2, 9, 2, 8)
    attended = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (query, key, value)), is_causal=True, enable_gqa=True
    ).transpose(1, 2)
    merged = block.merge(hidden, attended)

    middle = hidden + F.linear(attended.flatten(-2), block.output.weight)
    normed = F.rms_norm(middle, (16,), block.mlp_norm.weight, 1e-6)
    gate, up = F.linear(normed, block.gate_up.weight[:24]), F.linear(normed, block.gate_up.weight[24:])
    torch.testing.assert_close(merged, middle + F.linear(F.silu(gate) * up, block.down.weight))

    alone = Transformer(TransformerConfig(1, 16, 4, 2, 8, 24)).eval()
    alone.blocks[0].load_state_dict(block.state_dict())
    torch.testing.assert_close(alone(hidden, rotation), alone.norm(merged), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_values_are_not_rotated() -> None:
    block, (hidden, rotation) = make().blocks[0], inputs()
    turned, still = block.project(hidden, rotation), block.project(hidden, rotation.roll(1, 1))
    assert torch.equal(turned[2], still[2])
    assert not torch.allclose(turned[0], still[0])
    assert not torch.allclose(turned[1], still[1])


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 9, 13])
def test_the_future_has_no_influence(tokens: int) -> None:
    transformer, (hidden, rotation) = make(), inputs(14)
    whole = transformer(hidden, rotation)
    part = transformer(hidden[:, :tokens], rotation[:, :tokens])
    torch.testing.assert_close(part, whole[:, :tokens], atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_masked_tokens_have_no_influence_on_the_others() -> None:
    transformer, (hidden, rotation) = make(), inputs()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    mask[1, 4] = False
    before = transformer(hidden, rotation, mask)
    changed = torch.where(mask[..., None], hidden, 50.0)
    after = transformer(changed, rotation, mask)
    torch.testing.assert_close(after[mask], before[mask], atol=1e-5, rtol=1e-5)
    assert after.isfinite().all()
    assert not torch.allclose(transformer(changed, rotation)[mask], before[mask], atol=1e-2)
    # A row without its padding is the row without its padding.
    short = transformer(hidden[:1, 3:], rotation[:, 3:])
    torch.testing.assert_close(before[:1, 3:], short, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_query_heads_of_a_group_share_a_key_head() -> None:
    grouped, (hidden, rotation) = make(), inputs()
    spread = Transformer(TransformerConfig(3, 16, 4, 4, 8, 24)).eval()
    state = grouped.state_dict()
    for layer in range(3):
        name = f"blocks.{layer}.qkv.weight"
        query, key, value = state[name].split([32, 16, 16])
        key, value = (x.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1) for x in (key, value))
        state[name] = torch.cat([query, key, value])
    spread.load_state_dict(state)
    torch.testing.assert_close(grouped(hidden, rotation), spread(hidden, rotation), atol=1e-5, rtol=1e-5)


def test_every_weight_learns() -> None:
    transformer, (hidden, rotation) = make().train(), inputs()
    transformer(hidden, rotation).square().sum().backward()
    for name, weight in transformer.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_the_weights_are_few_and_known() -> None:
    block = Block(CONFIG)
    assert {name: tuple(weight.shape) for name, weight in block.named_parameters()} == {
        "attention_norm.weight": (16,),
        "qkv.weight": (64, 16),
        "output.weight": (16, 32),
        "mlp_norm.weight": (16,),
        "gate_up.weight": (48, 16),
        "down.weight": (16, 24),
    }


@torch.inference_mode()
def test_queries_and_keys_are_normalised_head_by_head_before_they_are_rotated() -> None:
    block, (hidden, rotation) = make(replace(CONFIG, qk_norm="layer")).blocks[0], inputs()
    plain = Block(CONFIG).eval()
    plain.load_state_dict(block.state_dict(), strict=False)
    still = torch.cat([torch.ones(1, 9, 4), torch.zeros(1, 9, 4)], -1)
    bare = plain.project(hidden, still)
    normed = block.project(hidden, still)
    for norm, x, found in zip((block.query_norm, block.key_norm), bare, normed, strict=False):
        assert isinstance(norm, HeadNorm)
        for head in range(len(norm.weight)):
            expected = F.layer_norm(x[:, :, head], (8,), norm.weight[head], norm.bias[head], 1e-5)
            torch.testing.assert_close(found[:, :, head], expected)
    turned = block.project(hidden, rotation)
    for one, other in zip(turned, normed, strict=True):
        torch.testing.assert_close(one.norm(dim=-1), other.norm(dim=-1))
    assert torch.equal(turned[2], bare[2])


def test_norms_of_queries_and_keys_are_weights_only_where_asked_for() -> None:
    names = {name for name, _ in Block(replace(CONFIG, qk_norm="layer")).named_parameters()}
    extra = names - {name for name, _ in Block(CONFIG).named_parameters()}
    assert extra == {f"{norm}.{kind}" for norm in ("query_norm", "key_norm") for kind in ("weight", "bias")}


@torch.inference_mode()
def test_llama_in_transformers_is_this_transformer(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, head_dim=8, vocab_size=5, rms_norm_eps=1e-6)
    llama = LlamaModel(config).eval()
    generator = torch.Generator().manual_seed(4)
    for weight in llama.parameters():
        weight.normal_(1.0 if weight.ndim == 1 else 0.0, 0.4, generator=generator)
    torch.save(
        {f"model.{name}": weight for name, weight in llama.state_dict().items()}, tmp_path / "llama.bin"
    )
    transformer = Transformer(CONFIG).eval()
    load_weights_(transformer.weight_slots("model."), [tmp_path / "llama.bin"], ["model.embed_tokens.weight"])
    hidden, mask = inputs()[0], torch.ones(2, 9, dtype=torch.bool)
    mask[0, :3] = False
    found = transformer(hidden, sequence_rotation(torch.arange(9), 8, 10_000.0)[None], mask)
    expected = llama(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found[mask], expected[mask], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_norms_that_heads_share_in_a_checkpoint_are_spread(rows: int, tmp_path: Path) -> None:
    transformer = Transformer(TransformerConfig(1, 16, 4, 4, 8, 24, qk_norm="layer"))
    slots = transformer.weight_slots("", rows)
    state = {name: torch.randn(slot.wanted) for name, slot in slots.items()}
    assert state["layers.0.self_attn.q_norm.weight"].shape == (rows, 8)
    torch.save(state, tmp_path / "weights.bin")
    load_weights_(slots, [tmp_path / "weights.bin"])
    norm = transformer.blocks[0].key_norm
    for head in range(4):
        shared = head * rows // 4
        assert torch.equal(norm.weight[head], state["layers.0.self_attn.k_norm.weight"][shared])
        assert torch.equal(norm.bias[head], state["layers.0.self_attn.k_norm.bias"][shared])
