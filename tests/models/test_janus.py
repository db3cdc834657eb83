from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from janus_files import VARIANT, WIDER, make_tokenizer, published_config, write_janus
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tiny import POLICIES, build
from torch import Tensor
from torch.nn import functional as F

from arkv import Decoder, load_policy
from arkv.errors import CheckpointError, PromptError
from arkv.models import janus_checkpoint as janus
from arkv.models.janus import JanusPro, JanusPro1B
from arkv.models.janus_checkpoint import JANUS_PRO_1B, JANUS_PRO_7B, UNUSED, Tokens
from arkv.weights.checkpoint import draw_weights_, load_weights_

DATA = Path(__file__).parents[1] / "data"
CASES: dict[str, janus.Layout] = {"janus": "deepseek", "janus_hf": "transformers"}


class Golden:
    """Inputs and outputs of a reference implementation, and the model with its weights."""

    def __init__(self, case: str) -> None:
        self.facts = json.loads((DATA / f"{case}.json").read_text())
        self.tensors = load_file(DATA / f"{case}.safetensors")
        self.layout = CASES[case]
        self.model = JanusPro(VARIANT).eval()
        ids = self.facts["config"]["special_ids"]
        self.model.tokens = Tokens(ids["bos"], ids["pad"], ids["boi"])
        self.weights = {n[8:]: t for n, t in self.tensors.items() if n.startswith("weights.")}
        self.prompts = [
            row[-length:].tolist()
            for row, length in zip(self["inputs.prompt_ids"], self["inputs.prompt_lengths"], strict=True)
        ]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def tolerance(self, name: str) -> float:
        return float(self.facts["tolerance"]["values"][name])

    def logits(self, prompts: list[list[int]] | None = None, rows: slice = slice(None)) -> dict[str, Tensor]:
        """Of every step under the forced tokens, `[steps, rows, codes]`."""
        decoder = Decoder(self.model, load_policy("full"))
        prompts = self.prompts[rows] if prompts is None else prompts
        forced = decoder.teacher_force(
            prompts, self["inputs.forced_tokens"][rows], self.facts["settings"]["cfg_scale"]
        )
        cond, uncond = forced.raw.transpose(0, 1).chunk(2, dim=1)
        return {"cond": cond, "uncond": uncond, "guided": forced.guided.transpose(0, 1)}


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    case = Golden(request.param)
    save_file(case.weights, tmp_path / "model.safetensors")
    load_weights_(case.model.weight_slots(case.layout), [tmp_path / "model.safetensors"], UNUSED[case.layout])
    return case


def deviation(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item()


def test_logits_are_those_of_the_reference(golden: Golden) -> None:
    for name, got in golden.logits().items():
        name = f"expected.logits_{name}"
        assert deviation(got, golden[name]) <= golden.tolerance(name), name


def test_a_prompt_alone_gives_what_it_gives_in_a_padded_batch(golden: Golden) -> None:
    lengths = golden["inputs.prompt_lengths"].tolist()
    assert len(set(lengths)) > 1
    for row in range(len(lengths)):
        alone = golden.logits(rows=slice(row, row + 1))
        for name, got in alone.items():
            name = f"expected.logits_{name}"
            assert deviation(got, golden[name][:, row : row + 1]) <= golden.tolerance(name)


def test_greedy_tokens_and_their_pixels_are_those_of_the_reference(golden: Golden) -> None:
    result = Decoder(golden.model, load_policy("full")).generate(
        golden.prompts, guidance=golden.facts["settings"]["cfg_scale"], temperature=0
    )
    assert torch.equal(result.tokens, golden["expected.greedy_tokens"])
    expected = ((golden["expected.pixels_greedy"] + 1) / 2 * 255).clip(0, 255).to(torch.uint8)
    got = golden.model.pixels(result.tokens)
    assert (got.int() - expected.permute(0, 2, 3, 1).int()).abs().max() <= 1  # rounding at the edge


@pytest.mark.parametrize("tokens", ["greedy", "forced"])
def test_pixels_are_those_of_the_reference(golden: Golden, tokens: str) -> None:
    codes = golden["expected.greedy_tokens" if tokens == "greedy" else "inputs.forced_tokens"]
    name = f"expected.pixels_{tokens}"
    with torch.no_grad():
        assert deviation(golden.model.vq(codes.unflatten(1, (4, 4))), golden[name]) <= golden.tolerance(name)


def _hide_inner_pads(golden: Golden) -> None:
    condition = golden.model.condition

    def hidden(prompts: Any, guided: bool) -> Any:
        made = condition(prompts, guided)
        mask = made.mask.clone()
        mask[len(prompts) :, 1:-1] = False
        return replace(made, mask=mask)

    golden.model.condition = hidden  # type: ignore[method-assign]


def _count_pads(golden: Golden) -> None:
    condition = golden.model.condition

    def counted(prompts: Any, guided: bool) -> Any:
        made = condition(prompts, guided)
        longest = made.mask.all(1).nonzero()[0]
        return replace(made, mask=torch.ones_like(made.mask), rotation=made.rotation[longest])

    golden.model.condition = counted  # type: ignore[method-assign]


def _interleave(golden: Golden) -> None:
    for block in golden.model.transformer.blocks:
        query, key, value = block.qkv.weight.data.chunk(3)  # type: ignore[union-attr, operator]
        order = torch.arange(64).view(4, 8, 2).transpose(1, 2).flatten()
        block.qkv.weight.data.copy_(torch.cat([query[order], key[order], value]))  # type: ignore[union-attr]


def _feed_codebook(golden: Golden) -> None:
    golden.model.codes.weight.data.copy_(F.normalize(golden.model.vq.codebook.weight, dim=-1))


def _tanh(golden: Golden) -> None:
    for part in (golden.model.aligner, golden.model.output):
        part[1] = torch.nn.GELU(approximate="tanh")


def _no_begin(golden: Golden) -> None:
    golden.prompts = [[golden.model.tokens.padding, *prompt[1:]] for prompt in golden.prompts]


WRONG: dict[str, tuple[Callable[[Golden], None], str]] = {
    "pads inside the unconditional prompt hidden": (_hide_inner_pads, "uncond"),
    "begin replaced by padding": (_no_begin, "uncond"),
    "left padding attended and counted": (_count_pads, "cond"),
    "interleaved pairs": (_interleave, "cond"),
    "codebook fed back": (_feed_codebook, "cond"),
    "tanh-approximated GELU": (_tanh, "cond"),
}


@pytest.mark.parametrize("variant", WRONG)
def test_what_is_wrong_is_seen(golden: Golden, variant: str) -> None:
    spoil, name = WRONG[variant]
    spoil(golden)
    expected = f"expected.logits_{name}"
    assert deviation(golden.logits()[name], golden[expected]) > 20 * golden.tolerance(expected)


def test_a_shorter_unconditional_prompt_is_seen(golden: Golden) -> None:
    short = [[prompt[0], prompt[-1]] for prompt in golden.prompts]
    name = "expected.logits_uncond"
    assert deviation(golden.logits(short)["uncond"], golden[name]) > 20 * golden.tolerance(name)


def test_another_formula_of_guidance_is_seen(golden: Golden) -> None:
    logits, scale = golden.logits(), golden.facts["settings"]["cfg_scale"]
    wrong = logits["cond"] + scale * (logits["cond"] - logits["uncond"])
    name = "expected.logits_guided"
    assert deviation(wrong, golden[name]) > 20 * golden.tolerance(name)


@pytest.mark.parametrize("wrong", ["plain codebook", "column by column"])
def test_wrong_pixels_are_seen(golden: Golden, wrong: str) -> None:
    codes = golden["inputs.forced_tokens"].unflatten(1, (4, 4))
    if wrong == "plain codebook":
        golden.model.vq.config = replace(VARIANT.vq, normalised=False)
    else:
        codes = codes.transpose(1, 2)
    name = "expected.pixels_forced"
    with torch.no_grad():
        assert deviation(golden.model.vq(codes), golden[name]) > 20 * golden.tolerance(name)


def test_real_sizes_have_the_published_numbers_of_parameters() -> None:
    for variant, llama, generation, total in (
        (JANUS_PRO_1B, 1.443e9, 42.1e6, 2.077e9),
        (JANUS_PRO_7B, 6.491e9, 100.9e6, 7.408e9),
    ):
        with torch.device("meta"):
            model = JanusPro(variant)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        assert counts["words"] + counts["transformer"] == pytest.approx(llama, rel=5e-4)
        assert counts["codes"] + counts["aligner"] + counts["output"] == pytest.approx(generation, rel=2e-3)
        assert counts["vq"] == pytest.approx(42.6e6, rel=2e-3)
        assert sum(counts.values()) < total
    assert JanusPro1B.from_pretrained(device="meta").spec.grid.tokens == 576


@pytest.fixture
def tiny_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original layout says nothing of the picture decoder, which is VQ-16."""
    monkeypatch.setattr(janus.vq, "VQ16", WIDER.vq)


@pytest.mark.usefixtures("tiny_decoder")
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
def test_both_layouts_load_from_one_file_or_shards(tmp_path: Path, layout: janus.Layout, shards: int) -> None:
    written = write_janus(tmp_path, layout, shards)
    model = JanusPro.from_pretrained(tmp_path)
    assert not model.training
    for (name, got), expected in zip(model.named_parameters(), written.parameters(), strict=True):
        assert torch.equal(got, expected), name
    narrow = JanusPro.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert {p.dtype for p in narrow.vq.parameters()} == {torch.float32}
    empty = JanusPro.from_pretrained(tmp_path, device="meta")
    assert empty.device.type == "meta"
    assert JanusPro.recognises(tmp_path)
    assert not JanusPro1B.recognises(tmp_path)


@pytest.fixture
def loaded(tmp_path: Path) -> JanusPro:
    write_janus(tmp_path, "transformers")
    return JanusPro.from_pretrained(tmp_path)


def test_the_prompt_has_the_published_form(loaded: JanusPro) -> None:
    from tokenizers import Tokenizer

    assert isinstance(loaded.tokenizer, Tokenizer)
    (ids,) = [loaded._ids("  a red  cat\n")]
    assert ids[0] == loaded.tokenizer.token_to_id(janus.BEGIN)
    assert ids[-1] == loaded.tokenizer.token_to_id(janus.IMAGE)
    text = loaded.tokenizer.decode(ids[1:-1], skip_special_tokens=False)
    assert text == "<|User|>: a red  cat\n\n<|Assistant|>:"


def test_texts_and_their_ids_give_the_same_picture(loaded: JanusPro) -> None:
    decoder = Decoder(loaded, load_policy("full"))
    texts = ["a cat", "a longer prompt"]
    by_text = decoder.generate(texts)
    by_ids = decoder.generate([loaded._ids(text) for text in texts])
    assert torch.equal(by_text.tokens, by_ids.tokens)
    assert by_text.images[0].size == (8, 8)


def test_prompts_of_several_lengths_in_a_batch_are_as_alone(loaded: JanusPro) -> None:
    decoder = Decoder(loaded, load_policy("linear", budget=12, anchors=2))
    texts = ["a cat", "a much longer prompt than that"]
    tokens = torch.randint(48, (2, 16), generator=torch.Generator().manual_seed(0))
    together = decoder.teacher_force(texts, tokens, 5.0).guided
    for row in range(2):
        alone = decoder.teacher_force(texts[row : row + 1], tokens[row : row + 1], 5.0).guided
        assert deviation(together[row : row + 1], alone) < 1e-4 * alone.std().clamp(min=1)


def test_example_prompts_are_taken(loaded: JanusPro) -> None:
    assert loaded.example_prompts(3, 0) == loaded.example_prompts(3, 0)
    loaded.check_prompts(loaded.example_prompts(20, 1))
    untold = JanusPro(WIDER)
    untold.check_prompts(untold.example_prompts(20, 1))
    assert untold.condition(untold.example_prompts(2, 1), guided=True).mask.any(1).all()


@pytest.mark.parametrize("prompt", [[], [1], [0, 72, 2], [0, -1, 2], [0, 1.5, 2], [0, True, 2], 7, None])
def test_a_prompt_that_is_none_is_refused(prompt: Any) -> None:
    with pytest.raises(PromptError, match="neither a text nor a list of token ids from 0 to 71"):
        JanusPro(VARIANT).check_prompts([prompt])


def test_a_prompt_that_is_too_long_is_refused(loaded: JanusPro) -> None:
    with pytest.raises(PromptError, match=r"has 5\d\d tokens: expected at most 512"):
        loaded.check_prompts(["word " * 105])


def test_a_text_without_tokenizer_is_refused() -> None:
    with pytest.raises(PromptError, match="tiny has no tokenizer"):
        JanusPro(VARIANT).check_prompts(["a cat"])


def refusal(folder: Path, model_class: type[JanusPro] = JanusPro) -> str:
    with pytest.raises(CheckpointError) as caught:
        model_class.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_missing_or_wrong_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    assert "there is no file or folder" in refusal(folder)
    folder.mkdir()
    assert "config.json" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    assert "is not Janus-Pro: its configuration has the model_type 'llama'" in refusal(folder)
    (folder / "config.json").write_text('{"model_type": "janus"}')
    assert "config.json has no text_config" in refusal(folder)
    write_janus(folder, "transformers", 3)
    assert "has 2 layers of width 64: it is not janus-pro-1b" in refusal(folder, JanusPro1B)
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "lacks model-00002-of-00003.safetensors" in refusal(folder)
    write_janus(folder, "transformers")
    make_tokenizer(folder / "tokenizer.json", without=janus.PADDING)
    assert f"no token {janus.PADDING}" in refusal(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "is damaged or not a tokenizer" in refusal(folder)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refusal(folder)


def test_defaults_are_supplied_as_the_published_configuration_leaves_them_out(tmp_path: Path) -> None:
    llama = {"max_position_embeddings": 16384, "num_hidden_layers": 30, "vocab_size": 102400}
    config = {"model_type": "multi_modality", "language_config": {"model_type": "llama", **llama}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert janus.read_variant(tmp_path) == (JANUS_PRO_7B, "deepseek")
    config["language_config"]["rope_scaling"] = {"type": "linear", "factor": 2}  # type: ignore[index]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="rotary"):
        janus.read_variant(tmp_path)


@pytest.fixture(scope="module")
def beside_transformers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, JanusPro]:
    """transformers' own class with weights drawn anew, and what is loaded from the folder that it writes."""
    transformers = pytest.importorskip("transformers")
    config = transformers.JanusConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "mlp_ratio": 2,
            "projection_dim": 32,
            "depth": 2,
            "num_image_tokens": 16,
        },
        vq_config={
            "embed_dim": 8,
            "num_embeddings": 24,
            "latent_channels": 32,
            "base_channels": 32,
            "channel_multiplier": [1, 1],
            "num_res_blocks": 1,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
    )
    reference = transformers.JanusForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            norm = "norm" in name and name.endswith("weight")
            parameter.normal_(float(norm), 0.35 if parameter.ndim > 1 else 0.1, generator=generator)
    folder = tmp_path_factory.mktemp("janus")
    reference.save_pretrained(folder)
    make_tokenizer(folder / "tokenizer.json")
    return reference, JanusPro.from_pretrained(folder)


TEXTS = ["a cat", "two dogs and a much longer prompt"]


def inputs(model: JanusPro, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and mask, as a tokenizer of transformers makes them."""
    rows = [model._ids(text) for text in texts]
    length = max(map(len, rows))
    pad = model.tokens.padding
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])


def test_transformers_agrees_under_forced_tokens(beside_transformers: tuple[Any, JanusPro]) -> None:
    reference, model = beside_transformers
    codes = torch.randint(24, (2, 16), generator=torch.Generator().manual_seed(5))
    ids, mask = inputs(model, TEXTS)
    blank = torch.where((ids == model.tokens.begin) | (ids == model.tokens.image), ids, model.tokens.padding)
    ids, mask = torch.cat([ids, blank]), mask.repeat(2, 1)
    with torch.no_grad():
        words = reference.get_input_embeddings()(ids)
        pictures = reference.prepare_embeddings_for_image_generation(codes[:, :-1]).repeat(2, 1, 1)
        mask = torch.cat([mask, torch.ones(4, 15, dtype=torch.long)], 1)
        hidden = reference.model.language_model(
            inputs_embeds=torch.cat([words, pictures], 1),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state[:, ids.shape[1] - 1 :]
        expected = reference.model.generation_head(hidden)
    forced = Decoder(model, load_policy("full")).teacher_force(TEXTS, codes, 5.0)
    assert deviation(forced.raw, expected) < 1e-4
    cond, uncond = expected.chunk(2)
    assert deviation(forced.guided, uncond + 5 * (cond - uncond)) < 9e-4


@pytest.mark.skipif(
    Version(version("transformers")) < Version("5.17"),
    reason="before transformers#45044, as in 5.0, its loop feeds the prompt again, not the token drawn",
)
def test_transformers_generates_the_same_pictures(beside_transformers: tuple[Any, JanusPro]) -> None:
    reference, model = beside_transformers
    ids, mask = inputs(model, TEXTS)
    reference.generation_config.generation_kwargs = {"boi_token_id": model.tokens.image}
    reference.generation_config.pad_token_id = model.tokens.padding
    reference.generation_config.bos_token_id = model.tokens.begin
    from transformers import StaticCache

    # Made here: in 5.17 its generate leaves out an argument of what would make one (`prefill_chunk_size`).
    longest = ids.shape[1] + model.spec.grid.tokens
    cache = StaticCache(config=reference.config.get_text_config(), max_cache_len=longest)
    expected = reference.generate(
        ids,
        attention_mask=mask,
        generation_mode="image",
        do_sample=False,
        guidance_scale=5,
        past_key_values=cache,
    )
    for policy in POLICIES:
        kept = build(policy, model.spec.grid.tokens)
        got = Decoder(model, kept).generate(TEXTS, guidance=5.0, temperature=0)
        assert torch.equal(got.tokens, expected), policy
    with torch.no_grad():
        pixels = reference.decode_image_tokens(expected)
    pictures = model.pixels(expected)
    assert deviation(pictures.float(), ((pixels + 1) / 2 * 255).clip(0, 255)) <= 1.01


@pytest.mark.slow
def test_one_layer_of_the_real_width_draws_a_whole_picture() -> None:
    narrow = replace(JANUS_PRO_1B, transformer=replace(JANUS_PRO_1B.transformer, layers=1), vocabulary=1000)
    model = JanusPro(narrow).eval()
    draw_weights_(model, 0)
    result = Decoder(model, load_policy("linear", ratio="1/6")).generate(model.example_prompts(1, 0))
    assert result.images[0].size == (384, 384)
    assert result.tokens.shape == (1, 576)
    assert result.tokens.unique().numel() > 100


WEIGH = """
import sys, torch
from arkv.machine.instruments import PeakMemory
from arkv.models.janus import JanusPro

JanusPro.from_pretrained(sys.argv[1], device="meta")  # what loading imports
peak = PeakMemory(torch.device("cpu"))
model = JanusPro.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
size = sum(weights.nbytes for weights in model.parameters())
print(f"{size / 1e9:.2f} GB of weights, {peak.rise() / 1e9:.2f} GB at most, {peak.rise() / size:.3f} of them")
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
def test_seven_billion_parameters_load_in_little_more_memory_than_they_take(
    tmp_path: Path, layout: janus.Layout
) -> None:
    write_janus(tmp_path / "small", layout)
    large = write_large_checkpoint(tmp_path / "large", layout)
    try:
        command = [sys.executable, "-c", WEIGH, tmp_path / "small", large]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        for shard in large.glob("*-of-*"):
            shard.unlink()
    print(f"janus-pro-7b, {layout}: {told}")  # the figure in docs/models
    assert float(told.split()[-3]) < 1.15


def write_large_checkpoint(folder: Path, layout: janus.Layout) -> Path:
    """Janus-Pro-7B as it is published, in bfloat16, in shards of five gigabytes."""
    folder.mkdir()
    with torch.device("meta"):
        slots = JanusPro(JANUS_PRO_7B).weight_slots(layout)
    deepseek = layout == "deepseek"
    stem, save = ("pytorch_model", torch.save) if deepseek else ("model", save_file)
    suffix = "bin" if deepseek else "safetensors"
    where: dict[str, str] = {}
    part: dict[str, Tensor] = {}

    def write() -> None:
        name = f"{stem}-{len(set(where.values())) + 1:05}-of-00003.{suffix}"
        where.update(dict.fromkeys(part, name))
        save(part, folder / name)
        part.clear()

    for name, slot in slots.items():
        part[name] = torch.full(slot.wanted, 0.5, dtype=torch.bfloat16)
        if sum(tensor.nbytes for tensor in part.values()) > 5e9:
            write()
    write()
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(published_config(JANUS_PRO_7B, layout)))
    make_tokenizer(folder / "tokenizer.json")
    return folder
