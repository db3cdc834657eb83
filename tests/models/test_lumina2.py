import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_rows import DATA, POLICIES, form, no_norm, norm_last, other_base, padding_seen
from lumina2_files import GOLDEN, PIXELS, VQ, WIDE, TinyLumina2, tiny, write_lumina2, write_tokenizer
from lumina_files import write_lumina
from safetensors.torch import load_file, save_file

from arkv import Decoder, load_model
from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.models.lumina2 import LuminaMGPT2
from arkv.models.lumina2_checkpoint import LUMINA_2, OMNI
from arkv.registry import load_policy
from arkv.weights.checkpoint import load_weights_


def golden_model() -> LuminaMGPT2:
    model = LuminaMGPT2(tiny(), WIDE).eval()
    for golden, slots in ((GOLDEN, model.weight_slots()), (PIXELS, model.vq.weight_slots("taming"))):
        named = {f"weights.{name}": slot for name, slot in slots.items()}
        load_weights_(named, [DATA / f"{golden.case}.safetensors"], ["inputs.*", "expected.*"])
    return model


def test_logits_are_those_of_the_reference() -> None:
    GOLDEN.check_logits(golden_model())


def test_greedy_tokens_and_pixels_are_those_of_the_reference() -> None:
    model = golden_model()
    found = model.pixels(GOLDEN.check_greedy(model))
    pixels = PIXELS.tensors["expected.pixels_greedy"]
    expected = ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert found.shape == (2, 16, 32, 3)
    assert (found.int() - expected.int()).abs().max() <= 1  # where a colour is next to a half
    assert (found != expected).float().mean() < 0.01


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "no norm": (no_norm, "cond"),
    "norm after the rotation": (norm_last, "cond"),
    "another base": (other_base, "cond"),
    "padding seen": (padding_seen, "uncond"),
    "width first": (form(header=lambda h: (h[0], h[1], h[3], h[2])), "cond"),
    "no separator": (form(header=lambda h: h[1:]), "cond"),
    "separator kept": (form(unconditional=lambda row: (GOLDEN.ids["sep"], *row)), "uncond"),
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
    write_lumina2(tmp_path)
    return tmp_path


def test_a_checkpoint_is_read_whole(folder: Path) -> None:
    model = TinyLumina2.from_pretrained(folder, size=WIDE)
    GOLDEN.check_logits(model)
    for name in ("wide", "tall"):
        found = model.vq(PIXELS.tensors[f"inputs.codes_{name}"])
        torch.testing.assert_close(found, PIXELS.tensors[f"expected.pixels_{name}"], atol=3e-4, rtol=0)
    codes = torch.zeros(1, 36, dtype=torch.long)
    pictures = TinyLumina2.load_picture_decoder(folder, size=WIDE)
    assert torch.equal(pictures.pixels(codes), model.pixels(codes))
    spread = load_file(folder / "model.safetensors")  # as transformers saves it, a row a head
    norms = {name: x for name, x in spread.items() if ".q_norm." in name or ".k_norm." in name}
    spread |= {name: x.expand(4, -1).contiguous() for name, x in norms.items()}
    save_file(spread, folder / "model.safetensors")
    GOLDEN.check_logits(TinyLumina2.from_pretrained(folder, size=WIDE))


def test_a_text_is_put_into_the_sentence_of_training(folder: Path) -> None:
    model = TinyLumina2.from_pretrained(folder, size=WIDE)
    names_of = {i: name for name, i in model.tokenizer.get_vocab().items()}  # type: ignore[union-attr]
    row = "".join(names_of[i] for i in model.form.row(model._text("red bus")))
    sentence = "Generate an image of 64x32 according to the following prompt:\nred bus"
    picture = "<racm3:break><reserved08801><reserved08802>"
    assert row == f"<|end|>{sentence}<reserved08706>{picture}"
    assert "".join(names_of[i] for i in model.form.unconditional) == picture
    for prompt, said in [
        ("red <reserved08801>", "not text"),
        ("bus " * 600, "at most 512"),
        ([GOLDEN.ids["code_0"]], "not text"),
        (7, "neither a text"),
    ]:
        with pytest.raises(PromptError, match=said):
            model.check_prompts([prompt])
    model.check_prompts([*model.example_prompts(3, 0), [1, 2]])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "model_type is 'llama'": lambda f: edit(f, model_type="llama"),
    "swin_norm is True": lambda f: edit(f, swin_norm=True),
    "num_hidden_layers is 3": lambda f: edit(f, num_hidden_layers=3),
    "vocabulary of 100 tokens": lambda f: edit(f, vocab_size=100),
    "no token <|fin|>": lambda f: (f / "tokenizer_config.json").write_text('{"eos_token": "<|fin|>"}'),
    "gives <reserved08799> the number 46": lambda f: write_tokenizer(f, eol=46),
    "there is no movqgan_270M.ckpt": lambda f: (f / "movqgan_270M.ckpt").rename(f / "other.ckpt"),
    "has no tokenizer.json": lambda f: (f / "tokenizer.json").unlink(),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_what_is_wrong_with_a_checkpoint_is_said(said: str, folder: Path) -> None:
    DAMAGE[said](folder)
    with pytest.raises(CheckpointError) as caught:
        TinyLumina2.from_pretrained(folder, size=WIDE, decoder=folder)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_versions_are_told_apart(folder: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    config = {"model_type": "chameleon", "vocab_size": 171385, "vocabulary_map": {"a": 1}}
    (published / "config.json").write_text(json.dumps(config))
    assert type(load_model(published, device="meta")) is LuminaMGPT2
    with pytest.raises(CheckpointError, match=r"of Lumina-mGPT 2\.0"):
        load_model("lumina-mgpt-7b-768", source=published, device="cpu")
    first = tmp_path / "first"
    first.mkdir()
    write_lumina(first)
    assert not LuminaMGPT2.recognises(first)
    with pytest.raises(CheckpointError, match="more than pictures from text"):
        load_model(OMNI)
    (published / "config.json").write_text(json.dumps(config | {"vocab_size": 65536}))
    with pytest.raises(CheckpointError, match=r"of Lumina-mGPT 1"):
        load_model("lumina-mgpt-2", source=published, device="meta")


def test_published_model() -> None:
    model = LuminaMGPT2.from_pretrained(device="meta")
    assert (model.spec.grid.rows, model.spec.grid.line, model.spec.grid.tokens) == (96, 97, 9312)
    slots = model.weight_slots()
    assert len(slots) == 419
    assert sum(torch.Size(slot.wanted).numel() for slot in slots.values()) == 7_880_273_920
    assert sum(w.numel() for w in model.vq.parameters()) == 161_183_767
    assert len(LUMINA_2.sizes) == 73
    wide = LuminaMGPT2.from_pretrained(device="meta", size=(1024, 576))
    assert (wide.spec.grid.rows, wide.spec.grid.columns) == (72, 128)
    with pytest.raises(ArkvError, match=r"\(768, 768\)"):
        LuminaMGPT2.from_pretrained(device="meta", size=(770, 768))


@pytest.mark.slow
def test_a_whole_picture_at_full_width() -> None:
    """One layer of the published shape, all heads, the whole vocabulary and raster, random weights."""
    shape = replace(LUMINA_2.transformer, layers=1)
    model = LuminaMGPT2(replace(LUMINA_2, transformer=shape, vq=replace(VQ, codes=16384)))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    model.vq.float()
    # A second row takes a CPU more than twice the time, and guidance is tested at small sizes.
    decoder = Decoder(model, load_policy("linear", ratio="1/8"))
    result = decoder.generate([[20_000] * 20], seeds=[1], guidance=1.0)
    assert result.images[0].size == (384, 384)  # 4 pixels a code
    assert ((result.tokens == 16384) == (torch.arange(9312) % 97 == 96)).all()
    assert result.stats.kv_bytes < result.stats.full_kv_bytes / 6
