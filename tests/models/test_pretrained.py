"""What a folder may have in it that would go wrong in silence: weights, tokenizers, models by their paths."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from janus_files import WIDER, make_tokenizer, published_config, write_janus
from llamagen_files import TinyCaptions, TinyClasses, write_llamagen, write_t5
from lumina_files import WIDE, TinyLumina, write_lumina
from safetensors.torch import load_file, save_file
from torch import nn

from arkv import Decoder, load_model, load_policy, registry
from arkv.errors import ArkvError, CheckpointError, MemoryLimitError, NumericalError, PromptError
from arkv.models.captions import CaptionEncoder, clean_caption
from arkv.models.janus import JanusPro, JanusPro1B
from arkv.models.janus_checkpoint import ROLES
from arkv.models.llamagen import LlamaGen, LlamaGenB256
from arkv.models.pretrained import Part, load, read_tokenizer
from arkv.picture_decoder import load_picture_decoder
from arkv.weights.checkpoint import WeightSlot


def refusal(call: Any, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def encoder_of(folder: Path) -> CaptionEncoder:
    return CaptionEncoder.from_pretrained(folder, 8, dtype=torch.float32, device=torch.device("cpu"))


def change(folder: Path, edit: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(edit(tensors), folder / "model.safetensors")


LAYER = "encoder.block.1."
EDITS: dict[str, tuple[Any, str]] = {
    "prefixed names": (
        lambda t: {f"model.{name}": x for name, x in t.items()},
        "another model or has another",
    ),
    "one missing": (lambda t: {n: x for n, x in t.items() if "final_layer_norm" not in n}, "is missing"),
    "fewer layers": (lambda t: {n: x for n, x in t.items() if not n.startswith(LAYER)}, "is missing"),
    "more layers": (
        lambda t: t | {n.replace("block.1.", "block.2."): x.clone() for n, x in t.items() if LAYER in n},
        "is unexpected",
    ),
    "another shape": (lambda t: t | {"shared.weight": torch.ones(31, 24)}, "has shape (31, 24)"),
    "quantised": (lambda t: t | {"shared.weight": t["shared.weight"].to(torch.int8)}, "is quantised"),
    "two embeddings": (
        lambda t: t | {"encoder.embed_tokens.weight": t["shared.weight"] + 1},
        "two tensors, shared.weight and encoder.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize("kind", EDITS)
def test_every_weight_of_a_text_encoder_is_accounted_for(kind: str, tmp_path: Path) -> None:
    write_t5(tmp_path)
    edit, said = EDITS[kind]
    change(tmp_path, edit)
    assert said in refusal(lambda: encoder_of(tmp_path))


def test_an_embedding_by_either_name_is_the_same(tmp_path: Path) -> None:
    reference = write_t5(tmp_path)
    twin = "encoder.embed_tokens.weight"
    change(tmp_path, lambda t: t | {twin: t["shared.weight"].clone()})
    both = encoder_of(tmp_path)
    change(tmp_path, lambda t: {n: x for n, x in t.items() if n != "shared.weight"})
    one = encoder_of(tmp_path)
    for encoder in (both, one):
        inner: Any = encoder.encoder
        assert torch.equal(inner.encoder.embed_tokens.weight, reference.shared.weight)
        assert inner.encoder.embed_tokens is inner.shared


def test_a_text_encoder_of_absurd_size_is_refused_before_it_is_built(tmp_path: Path) -> None:
    write_t5(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key, value in {"num_layers": 10**9, "d_model": 0, "d_ff": "x", "layer_norm_epsilon": "1e-6"}.items():
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        assert key in refusal(lambda: encoder_of(tmp_path))


def test_every_weight_of_a_picture_decoder_is_accounted_for(tmp_path: Path) -> None:
    write_llamagen(tmp_path, TinyClasses.variant)
    path = tmp_path / TinyClasses.variant.vq_file
    tensors = torch.load(path, weights_only=True)["model"]
    for edited, said in (
        ({n: x for n, x in tensors.items() if not n.startswith("decoder.conv_out")}, "is missing"),
        (tensors | {"decoder.conv_blocks.7.res.0.norm1.weight": torch.ones(3)}, "is unexpected"),
        ({f"vq.{n}": x for n, x in tensors.items()}, "another model or has another"),
    ):
        torch.save({"model": edited}, path)
        assert said in refusal(lambda: TinyClasses.from_pretrained(tmp_path))


def test_a_weight_that_no_file_was_read_into_is_a_mistake_of_the_family(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(AssertionError, match="reads no file into its weight bias"):
        load(
            lambda: nn.Linear(2, 2),
            torch.float32,
            "cpu",
            lambda m: [Part({"w": WeightSlot(m.weight)}, [tmp_path / "x.safetensors"])],
        )


STATES: dict[str, Any] = {
    "padding": {"padding": {"strategy": {"Fixed": 40}, "direction": "Left", "pad_to_multiple_of": None}},
    "truncation": {"truncation": {"max_length": 4, "strategy": "LongestFirst", "stride": 0}},
}


@pytest.fixture
def janus(tmp_path: Path) -> Path:
    write_janus(tmp_path, "transformers")
    return tmp_path


@pytest.mark.parametrize("state", [*STATES, "dropout", "post-processor"])
def test_what_a_tokenizer_was_last_used_for_has_no_say(state: str, janus: Path) -> None:
    from tokenizers import Tokenizer, processors

    path = janus / "tokenizer.json"
    wanted = JanusPro.from_pretrained(janus)._ids("a red bus next to a lake")
    tokenizer = Tokenizer.from_file(str(path))
    if state == "padding":
        tokenizer.enable_padding(direction="left", length=80, pad_id=3)
    elif state == "truncation":
        tokenizer.enable_truncation(4)
    elif state == "dropout":
        tokenizer.model.dropout = 0.9
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <begin_of_image>",
            special_tokens=[("<begin_of_image>", tokenizer.token_to_id("<begin_of_image>"))],
        )
    tokenizer.save(str(path))
    assert JanusPro.from_pretrained(janus)._ids("a red bus next to a lake") == wanted
    assert len(wanted) > 20
    assert read_tokenizer(path).padding is None
    assert getattr(read_tokenizer(path).model, "dropout", None) is None


@pytest.mark.parametrize("state", ["no post-processor", "padding", "truncation", "another end"])
def test_a_caption_ends_as_it_was_trained_whatever_the_file_says(state: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    write_t5(tmp_path)
    wanted = encoder_of(tmp_path).ids("a red bus by the lake")
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    if state == "no post-processor":
        path.write_text(json.dumps(content | {"post_processor": None}))
    tokenizer = Tokenizer.from_file(str(path))
    if state == "padding":
        tokenizer.enable_padding(length=30)
    elif state == "truncation":
        tokenizer.enable_truncation(2)
    elif state == "another end":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<pad> $A </s> </s>", special_tokens=[("</s>", 1), ("<pad>", 0)]
        )
    tokenizer.save(str(path))
    assert encoder_of(tmp_path).ids("a red bus by the lake") == wanted
    assert wanted[-1] == 1
    assert wanted.count(1) == 1


def test_pixels_that_are_no_numbers_are_told(janus: Path) -> None:
    model = JanusPro.from_pretrained(janus)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    assert model.pixels(tokens).shape == (1, 8, 8, 3)
    for bad in (float("nan"), float("inf")):
        model.vq.decoder.conv_out.bias.data[1] = bad
        with pytest.raises(NumericalError, match="picture decoder produced NaN"):
            model.pixels(tokens)


def shape_of_1b(folder: Path, vocabulary: int = 102_400, without: str = "") -> Path:
    from dataclasses import replace

    from arkv.models.janus_checkpoint import JANUS_PRO_1B

    folder.mkdir()
    variant = replace(JANUS_PRO_1B, vocabulary=vocabulary)
    (folder / "config.json").write_text(json.dumps(published_config(variant, "deepseek")))
    make_tokenizer(folder / "tokenizer.json", without=without)
    return folder


def test_a_model_of_the_same_shape_is_not_taken_for_another(tmp_path: Path) -> None:
    """Janus 1.3B has the shape of Janus-Pro-1B and another template."""
    assert type(load_model(shape_of_1b(tmp_path / "pro"), device="meta")) is JanusPro1B
    for number, role in enumerate(ROLES):
        other = shape_of_1b(tmp_path / f"Janus-Pro-1B-{number}", without=role)
        assert "may be Janus 1.3B" in refusal(lambda other=other: load_model(other, device="meta"))
        assert load_model("janus-pro-1b", source=other, device="meta").spec.name == "janus-pro-1b"
    for name in ("deepseek-ai/Janus-1.3B", "deepseek-ai/JanusFlow-1.3B"):
        assert "is not Janus-Pro" in refusal(lambda name=name: load_model(name))
        assert "is not Janus-Pro" in refusal(lambda name=name: load_model("janus-pro-1b", source=name))


def test_a_finetuned_model_with_another_vocabulary_loads_by_name_and_by_folder(tmp_path: Path) -> None:
    folder = shape_of_1b(tmp_path / "finetuned", vocabulary=102_464)
    for model in (
        load_model(folder, device="meta"),
        load_model("janus-pro-1b", source=folder, device="meta"),
        JanusPro1B.from_pretrained(folder, device="meta"),
    ):
        assert type(model) is JanusPro1B
        assert model.words.num_embeddings == 102_464
        assert model.spec.name == "janus-pro-1b"


def test_weights_larger_than_what_is_free_are_refused_before_they_are_made(
    janus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "arkv.machine.memory.available_memory", lambda device: None if device.type == "meta" else 10_000
    )
    told = refusal(lambda: JanusPro.from_pretrained(janus), MemoryLimitError)
    assert re.search(r"the weights take .* GB and 0.0 GB is free on cpu: take a narrower dtype", told)
    refusal(lambda: load_model("janus-pro-7b", random_weights=True), MemoryLimitError)
    assert JanusPro.from_pretrained(janus, device="meta").device.type == "meta"


def test_a_folder_that_is_a_file_or_chameleon_itself_is_told(janus: Path, tmp_path: Path) -> None:
    told = refusal(lambda: JanusPro.from_pretrained(janus / "model.safetensors"))
    assert "is a file: give the folder with config.json" in told
    chameleon = tmp_path / "chameleon"
    (chameleon / "tokenizer").mkdir(parents=True)
    (chameleon / "tokenizer" / "vqgan.ckpt").touch()
    assert "is Meta's Chameleon" in refusal(lambda: load_model(chameleon))


LONE = "a red \udc80 bus"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model of every family that reads texts."""
    from arkv.models.scenes.adapter import Scenes

    folder = tmp_path_factory.mktemp("families")
    write_janus(folder / "janus", "transformers")
    (folder / "llamagen").mkdir()
    write_llamagen(folder / "llamagen", TinyCaptions.variant)
    (folder / "t5").mkdir()
    write_t5(folder / "t5")
    lumina = folder / "lumina"
    lumina.mkdir()
    write_lumina(lumina)
    return {
        "janus": JanusPro.from_pretrained(folder / "janus"),
        "llamagen": TinyCaptions.from_pretrained(folder / "llamagen", text_encoder=folder / "t5"),
        "lumina": TinyLumina.from_pretrained(lumina, size=WIDE),
        "scenes": Scenes.from_pretrained(),
    }


@pytest.mark.parametrize("family", ["janus", "llamagen", "lumina", "scenes"])
@pytest.mark.parametrize("prompt", [LONE, "\ud800", "a" * 300_000, "a\0b", 7.5, None, b"red", {}, object()])
def test_a_bad_prompt_is_a_refused_prompt_in_every_family(
    family: str, prompt: Any, families: dict[str, Any]
) -> None:
    model = families[family]
    if family == "llamagen" and prompt in ("a" * 300_000, "a\0b"):
        model.check_prompts([prompt])  # captions that are too long are cut, as in training
        return
    if (prompt == "a\0b" and family != "scenes") or (family == "lumina" and prompt == "a" * 300_000):
        model.check_prompts([prompt])
        return
    told = refusal(lambda: model.check_prompts([prompt]), PromptError)
    assert told.isprintable()
    assert len(told) < 400
    refusal(lambda: model.condition([prompt], guided=True), PromptError)


SPECIAL = {
    "janus": ["<begin_of_image>", "<｜begin▁of▁sentence｜>", "<|User|>", "<｜▁pad▁｜>"],  # noqa: RUF001
    "llamagen": ["</s>", "<pad>", "<unk>"],
    "lumina": ["<s>", "<reserved08706>", "<racm3:break>", "IMGIMGBZ", "<unk>"],
}


@pytest.mark.parametrize(("family", "name"), [(f, name) for f, names in SPECIAL.items() for name in names])
def test_no_part_of_a_text_is_read_as_a_special_token(
    family: str, name: str, families: dict[str, Any]
) -> None:
    for prompt in (name, f"a red {name} bus"):
        told = refusal(lambda prompt=prompt: families[family].check_prompts([prompt]), PromptError)
        assert "not text" in told


def test_an_id_beyond_the_embedding_is_a_refused_prompt(families: dict[str, Any], tmp_path: Path) -> None:
    from dataclasses import replace

    tokenizer = families["janus"].tokenizer
    narrow = JanusPro(replace(WIDER, vocabulary=261), tokenizer)  # fewer than the letters and special tokens
    narrow.check_prompts(["a red bus"])
    tokenizer.add_tokens(["zebra"])
    told = refusal(lambda: narrow.check_prompts(["a zebra"]), PromptError)
    assert "its tokenizer is another model's" in told
    with pytest.raises(CheckpointError, match="belong to two models"):
        JanusPro(replace(WIDER, vocabulary=258), tokenizer)


def test_numbers_of_numpy_and_torch_are_numbers(families: dict[str, Any]) -> None:
    import numpy

    with torch.device("meta"):
        classes = LlamaGen(LlamaGenB256.variant)  # type: ignore[arg-type]
    numbers = [
        207,
        207.0,
        numpy.int64(207),
        numpy.float32(207),
        torch.tensor(207),
        torch.tensor(207.0),
        "207",
    ]
    assert {classes._class(number) for number in numbers} == {207}
    for wrong in (
        207.5,
        float("nan"),
        float("inf"),
        numpy.float64(-1),
        torch.tensor([1, 2]),
        "9" * 5000,
        LONE,
    ):
        refusal(lambda wrong=wrong: classes.check_prompts([wrong]), PromptError)
    assert "WordNet's number" in refusal(lambda: classes.check_prompts(["n02099601"]), PromptError)
    model = families["janus"]
    ids = model._ids("a cat")
    for same in (tuple(ids), numpy.array(ids), torch.tensor(ids), [numpy.int32(i) for i in ids]):
        assert model._ids(same) == ids


def test_cleaning_a_caption_takes_time_in_proportion_to_its_length() -> None:
    import time

    begun = time.process_time()
    for text in (
        "<a" * 200_000,
        "&#" + "9" * 200_000,
        "&#x" + "f" * 200_000 + ";",
        "www." * 100_000,
        "<" * 400_000,
    ):
        clean_caption(text)
    assert time.process_time() - begun < 20, "squared, it would be hours"


def test_what_leads_to_a_model_is_not_taken_for_one(families: dict[str, Any]) -> None:
    model, policy = families["janus"], load_policy("full")
    wrong: list[tuple[Any, str]] = [
        ("janus-pro-1b", "load it first"),
        (Path("models/x"), "load it first"),
        (nn.DataParallel(model), "the model that is wrapped in it"),
        (JanusPro, "an instance"),
        (nn.Linear(2, 2), "give an arkv.Model itself"),
        (None, "give an arkv.Model itself"),
    ]
    for given, said in wrong:
        assert said in refusal(lambda given=given: Decoder(given, policy), ArkvError)


def folders_of_picture_decoders(tmp_path: Path) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("arkv.models.janus.read_variant", lambda *_: (WIDER, "deepseek"))
        yield JanusPro, write_janus(tmp_path / "a", "deepseek", shards=2), {"source": tmp_path / "a"}
    yield JanusPro, write_janus(tmp_path / "b", "transformers"), {"source": tmp_path / "b"}
    yield TinyClasses, write_llamagen(tmp_path / "c", TinyClasses.variant), {"source": tmp_path / "c"}
    told = {"source": tmp_path / "d", "text_encoder": "nobody/none", "revision": None}
    yield TinyCaptions, write_llamagen(tmp_path / "d", TinyCaptions.variant), told
    (tmp_path / "e").mkdir()
    write_lumina(tmp_path / "e")
    told = {"source": tmp_path / "e"}
    yield TinyLumina, TinyLumina.from_pretrained(**told), told | {"tokenizer": "nobody/none"}


def test_a_picture_decoder_alone_draws_as_with_the_whole_model_and_takes_no_more_memory(
    tmp_path: Path,
) -> None:
    for kind, model, told in folders_of_picture_decoders(tmp_path):
        alone = kind.load_picture_decoder(device=torch.device("cpu"), **told)
        tokens = torch.randint(16, (2, model.spec.grid.tokens), generator=torch.Generator().manual_seed(0))
        assert torch.equal(alone.pixels(tokens), model.pixels(tokens)), kind
        with_weights = {name for name, each in alone._model.named_parameters() if not each.is_meta}
        assert with_weights == {n for n, _ in model.named_parameters() if n.startswith("vq.")}, kind


def test_a_picture_decoder_alone_has_the_random_weights_that_the_whole_model_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "load_class", lambda *_: TinyClasses)
    monkeypatch.setattr(registry, "_points", lambda _: {"tiny": None})
    whole = load_model("tiny", random_weights=True)
    alone = load_picture_decoder("tiny", random_weights=True)
    tokens = torch.arange(whole.spec.grid.tokens)[None]
    assert torch.equal(alone.pixels(tokens), whole.pixels(tokens))


def test_a_model_without_a_picture_decoder_of_its_own_is_loaded_whole() -> None:
    tokens = torch.zeros(1, 576, dtype=torch.long)
    whole = load_model("scenes")
    assert torch.equal(load_picture_decoder("scenes").pixels(tokens), whole.pixels(tokens))
