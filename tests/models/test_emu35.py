import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from emu35_files import GOLDEN, PIXELS, VQ, OfRanks, tiny, write_emu35
from golden_rows import (
    DATA,
    POLICIES,
    form,
    no_norm,
    norm_last,
    other_base,
    other_epsilon,
    padding_seen,
    tiled,
    transposed,
)
from safetensors.torch import load_file

from arkv import Decoder, load_model
from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.models.emu3 import Emu3Gen
from arkv.models.emu35 import Emu35, Emu35Base, Emu35Image
from arkv.models.emu35_checkpoint import EMU35_IMAGE, SIZES, UNCONDITIONAL_IDS
from arkv.registry import load_policy
from arkv.weights.checkpoint import load_weights_


def golden_model() -> Emu35:
    model = Emu35(tiny()).eval()
    for golden, slots in ((GOLDEN, model.weight_slots()), (PIXELS, model.vq.weight_slots("taming"))):
        named = {f"weights.{name}": slot for name, slot in slots.items()}
        load_weights_(named, [DATA / f"{golden.case}.safetensors"], ["inputs.*", "expected.*"])
    return model


@pytest.fixture(autouse=True, scope="module")
def whole_texts() -> None:
    """A list of ids is the whole text, so what the template puts around the prompt belongs to it."""
    tensors, prompts = GOLDEN.tensors, GOLDEN.prompts
    head, tail = tensors["inputs.head_ids"].tolist()[1:], tensors["inputs.tail_ids"].tolist()[:-1]
    texts = [[*head, *prompt, *tail] for prompt in prompts]
    length = max(map(len, texts))
    tensors["inputs.text_ids"] = torch.tensor([[0] * (length - len(t)) + t for t in texts])
    tensors["inputs.text_mask"] = torch.tensor([[0] * (length - len(t)) + [1] * len(t) for t in texts])


def test_logits_are_those_of_the_reference() -> None:
    model = golden_model()
    assert [model.form.row(text) for text in GOLDEN.prompts] == GOLDEN.rows
    assert list(model.form.unconditional) == GOLDEN.tensors["inputs.uncond_ids"].tolist()
    GOLDEN.check_logits(model)


def test_greedy_tokens_and_pixels_are_those_of_the_reference() -> None:
    model = golden_model()
    found = model.pixels(GOLDEN.check_greedy(model))
    pixels = PIXELS.tensors["expected.pixels_greedy"]
    expected = ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert found.shape == (2, 12, 8, 3)
    assert (found.int() - expected.int()).abs().max() <= 1  # where a colour is next to a whole number
    assert (found != expected).float().mean() < 0.01


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "no norm": (no_norm, "cond"),
    "norm after the rotation": (norm_last, "cond"),
    "another epsilon of queries": (lambda model: other_epsilon(model, "query_norm"), "cond"),
    "another base": (other_base, "cond"),
    "heads tiled": (tiled, "cond"),
    "padding seen": (padding_seen, "cond"),
    "width first": (form(header=transposed), "cond"),
    "no beginning of the answer": (form(header=lambda h: h[1:]), "cond"),
    "no header": (form(unconditional=lambda row: row[:-5]), "uncond"),
    "header only": (form(unconditional=lambda row: row[-5:]), "uncond"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_models_are_told_apart(wrong: str) -> None:
    model = golden_model()
    spoil, kind = WRONG[wrong]
    spoil(model)
    GOLDEN.check_wrong(model, kind)


def test_a_prompt_gives_the_same_alone_and_in_a_batch() -> None:
    GOLDEN.check_batches(golden_model())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_with_room_for_all_gives_the_tokens_of_the_full_cache(policy: str) -> None:
    GOLDEN.check_policy(golden_model(), policy)


# Checkpoints.


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_emu35(tmp_path)
    return tmp_path


def test_a_checkpoint_and_its_picture_decoder_are_read_whole(folder: Path) -> None:
    model = OfRanks.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.embedding.weight, weights["model.embed_tokens.weight"])
    codes = torch.zeros(1, 9, dtype=torch.long)
    assert torch.equal(OfRanks.load_picture_decoder(folder).pixels(codes), model.pixels(codes))
    norm: Any = model.transformer.blocks[1]
    assert torch.equal(norm.key_norm.weight, weights["model.layers.1.self_attn.k_norm.weight"])
    for name in ("wide", "tall"):
        found = model.vq(PIXELS.tensors[f"inputs.codes_{name}"])
        torch.testing.assert_close(found, PIXELS.tensors[f"expected.pixels_{name}"], atol=3e-4, rtol=0)


def test_rows_are_the_sentences_of_the_training(folder: Path) -> None:
    model = OfRanks.from_pretrained(folder)

    def spelled(row: Any) -> str:
        assert model.tokenizer is not None
        return cast(str, model.tokenizer.decode(list(row), skip_special_tokens=False))

    frame = "<|extra_203|>{}<|extra_100|><|image start|>3*2<|image token|>"
    sentence = "You are a helpful assistant for t2i task. USER: a red bus ASSISTANT: "
    assert spelled(model.form.row(model._text("a red bus"))) == frame.format(sentence)
    text = "You are a helpful assistant. USER:  ASSISTANT: "
    assert spelled(model.form.unconditional) == frame.format(text)
    for prompt, said in [
        ("a <|extra_100|>", "not text"),
        ("bus " * 600, "at most 512"),
        ([model.form.line_end], "not text"),
        (7, "neither a text"),
    ]:
        with pytest.raises(PromptError, match=said):
            model.check_prompts([prompt])
    model.check_prompts([*model.example_prompts(3, 0), [1, 2]])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(folder: Path, old: str, new: str) -> None:
    path = folder / "Emu3.5-VisionTokenizer" / "config.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "model_type is 'llama'": lambda f: edit(f, model_type="llama"),
    "tie_word_embeddings is True": lambda f: edit(f, tie_word_embeddings=True),
    "vocabulary of 100 tokens": lambda f: edit(f, vocab_size=100),
    "is missing": lambda f: edit(f, num_hidden_layers=3),
    "has shape (24,), the model wants (32,)": lambda f: edit(f, head_dim=32),
    "n_embed is 0": lambda f: spoil(f, "n_embed: 48", "n_embed: 0"),
    "draws 24 codes": lambda f: spoil(f, "n_embed: 48", "n_embed: 24"),
    "attn_resolutions is [4]": lambda f: spoil(f, "resolution: 16", "resolution: 32"),
    "l2_normalize is True": lambda f: spoil(f, "n_embed: 48", "n_embed: 48\nl2_normalize: true"),
    "is not YAML": lambda f: spoil(f, "n_embed: 48", "n_embed: [48"),
    "no picture decoder": lambda f: (f / "Emu3.5-VisionTokenizer" / "model.ckpt").unlink(),
    "has no tokenizer": lambda f: (f / "emu3.tiktoken").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_what_is_wrong_with_a_checkpoint_is_said(said: str, folder: Path) -> None:
    DAMAGE[said](folder)
    with pytest.raises(CheckpointError) as caught:
        OfRanks.from_pretrained(folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_which_model_it_is_is_asked(tmp_path: Path) -> None:
    config = {"model_type": "Emu3", "vocab_size": 282926, "head_dim": 128, "rms_norm_eps": 1e-6}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"may be any of emu3\.5, emu3\.5-image"):
        load_model(tmp_path, device="meta")
    with pytest.raises(CheckpointError, match="nothing says which"):
        Emu35.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="is not Emu3: .* vocabulary of 282926"):
        Emu3Gen.from_pretrained(tmp_path)
    image = load_model("emu3.5-image", source=tmp_path, device="meta")
    assert (image.spec.guidance, image.spec.top_k) == (5.0, 5120)
    assert load_model("emu3.5", source=tmp_path, device="meta").spec.guidance == 2.0
    assert Emu35Base.recognises("BAAI/Emu3.5")
    assert not Emu35Image.recognises("BAAI/Emu3.5")


def test_published_model() -> None:
    model = Emu35Image.from_pretrained(device="meta")
    assert model.spec.grid.tokens == 4160
    slots = model.weight_slots()
    assert len(slots) == 3 + 64 * 11
    total = sum(torch.Size(slot.wanted).numel() for slot in slots.values())
    embeddings = 2 * 282926 * 5120
    assert round(total / 1e9, 3) == 34.103
    assert round((total - embeddings) / 1e9, 3) == 31.206
    assert round(sum(w.numel() for w in model.vq.parameters()) / 1e6, 1) == 270.7
    # 23 tokens at 64 * 64.
    assert len(model.form.unconditional) == 1 + len(UNCONDITIONAL_IDS) + 1 + 1 + 5 + 1 == 23
    for width, height in SIZES:
        other = Emu35Image.from_pretrained(device="meta", size=(width, height))
        assert (other.spec.grid.columns, other.spec.grid.rows) == (width // 16, height // 16)
    with pytest.raises(ArkvError, match=r"\(1024, 1024\)"):
        Emu35Image.from_pretrained(device="meta", size=(1000, 1024))


@pytest.mark.slow
def test_a_whole_picture_at_full_width() -> None:
    """One layer of the published shape, all heads, the whole vocabulary and raster, random weights."""
    shape = replace(EMU35_IMAGE.transformer, layers=1)
    decoder = replace(VQ, codes=131072, multipliers=(1, 1, 1, 1, 1))
    model = Emu35(replace(EMU35_IMAGE, transformer=shape, vq=decoder))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    model.vq.float()
    # A second row takes a CPU more than twice the time, and guidance is tested at small sizes.
    result = Decoder(model, load_policy("linear", ratio="1/8")).generate(
        [[20_000] * 20], seeds=[1], guidance=1.0
    )
    assert result.images[0].size == (1024, 1024)
    assert ((result.tokens == 131072) == (torch.arange(4160) % 65 == 64)).all()
    assert result.stats.kv_bytes < result.stats.full_kv_bytes / 6
