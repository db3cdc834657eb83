import itertools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from emu3_files import (
    CODES,
    GOLDEN,
    PIXELS,
    VQ,
    WIDE,
    TinyEmu3,
    config_of,
    tiny,
    write_decoder,
    write_emu3,
    write_words,
)
from golden_rows import DATA, POLICIES, form, other_base, other_epsilon, padding_seen, tiled, transposed
from safetensors.torch import load_file, save_file

from arkv import Decoder, load_model
from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.models.emu3 import Emu3, Emu3Gen, Emu3Stage1
from arkv.models.emu3_checkpoint import (
    EMU3_GEN,
    NEGATIVE_IDS,
    NEGATIVE_PROMPT,
    SUFFIX,
    VARIANTS,
    Emu3Variant,
)
from arkv.registry import load_class, load_policy
from arkv.weights.checkpoint import load_weights_

ROWS, LINE = 2, 4


def golden_model() -> Emu3:
    model = Emu3(tiny(), WIDE).eval()
    for golden, slots in ((GOLDEN, model.weight_slots()), (PIXELS, model.vq.weight_slots("emu3"))):
        named = {f"weights.{name}": slot for name, slot in slots.items()}
        unused = ["inputs.*", "expected.*", "*num_batches_tracked"]
        load_weights_(named, [DATA / f"{golden.case}.safetensors"], unused)
    return model


def test_logits_are_those_of_the_reference() -> None:
    """Prompts of two lengths and a negative prompt of a third in one batch; the reference had each alone."""
    GOLDEN.check_logits(golden_model())


def test_greedy_tokens_and_pixels_are_those_of_the_reference() -> None:
    model = golden_model()
    found = model.pixels(GOLDEN.check_greedy(model))
    pixels = PIXELS.tensors["expected.pixels_greedy"]
    expected = ((pixels * 0.5 + 0.5) * 255).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    assert (found.int() - expected.int()).abs().max() <= 1  # where a colour is next to a whole number
    assert (found != expected).float().mean() < 0.01


WRONG: dict[str, tuple[Callable[[Any], None], str]] = {
    "another base": (other_base, "cond"),
    "heads tiled": (tiled, "cond"),
    "another epsilon": (other_epsilon, "cond"),
    "padding seen": (padding_seen, "cond"),
    "width first": (form(header=transposed), "cond"),
    "no image token": (form(header=lambda h: h[:-1]), "cond"),
    "negative prompt empty": (form(unconditional=lambda row: (row[0], *row[-5:])), "uncond"),
    "negative prompt cut": (form(unconditional=lambda row: (*row[:-6], *row[-5:])), "uncond"),
    "no begin": (form(unconditional=lambda row: row[1:]), "uncond"),
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


# Against transformers' own class, which is given the golden weights.


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The model in transformers, and its checkpoint as transformers saves it."""
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    ids = {f"text{i}": i for i in range(40)} | {"<|im_start|>": 41, "<|im_end|>": 42, "<image>": 43}
    ids |= {"<|endoftext|>": 40, "<|image token|>": 49, "<|image start|>": 50, "<|image end|>": 51}
    ids |= {f"<|extra_{200 + i}|>": 44 + i for i in range(5)}
    ids |= {f"<|visual token {code:06d}|>": 52 + code for code in range(CODES)}
    said = GOLDEN.facts["config"]["hf_config"]
    text = {name: value for name, value in said.items() if name.split("_")[-1] in ("size", "layers", "heads")}
    text |= {"rms_norm_eps": 1e-5, "pad_token_id": 40, "bos_token_id": 47, "eos_token_id": 48}
    vq = {"codebook_size": CODES, "base_channels": 32, "channel_multiplier": [1, 1, 2], "num_res_blocks": 1}
    vq |= {"attn_resolutions": [2], "hidden_size": 64}
    reference = Emu3ForConditionalGeneration(
        Emu3Config(text_config=text, vq_config=vq, vocabulary_map=ids)
    ).eval()
    state = reference.state_dict()
    words = GOLDEN.weights
    names_here = {n: n.replace("model.", "model.text_model.", 1) for n in words}
    state |= {names_here[name]: tensor for name, tensor in words.items()}
    # The names of the picture decoder are checked by what comes out: a wrong one would stay as it was drawn.
    slots = Emu3(tiny(), WIDE).vq
    theirs, ours = (slots.weight_slots(layout) for layout in ("emu3-transformers", "emu3"))  # type: ignore[arg-type]
    for (new, slot), old in zip(theirs.items(), ours, strict=True):
        state[f"model.vqmodel.{new}"] = PIXELS.tensors[f"weights.{old}"].reshape(slot.wanted)
    reference.load_state_dict(state)
    folder = tmp_path_factory.mktemp("emu3-hf")
    reference.save_pretrained(folder)
    write_words(folder / "tokenizer.json", ids)
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    )
    return reference, folder


@torch.no_grad()
def test_transformers_gives_the_same_logits_and_pixels(hugging_face: tuple[Any, Path]) -> None:
    reference, folder = hugging_face
    model = TinyEmu3.from_pretrained(folder, size=WIDE, negative_prompt=list(tiny().negative))
    GOLDEN.check_logits(model)
    forced = GOLDEN.tensors["inputs.forced_tokens"]
    for row, context in enumerate(GOLDEN.rows):
        assert context == model.form.row(GOLDEN.prompts[row])
        whole = torch.tensor([[*context, *forced[row, :-1].tolist()]])
        logits = reference(whole).logits[0, len(context) - 1 :]
        torch.testing.assert_close(logits, GOLDEN.tensors["expected.logits_cond"][row], atol=1e-4, rtol=0)
    for name in ("wide", "tall"):
        codes = PIXELS.tensors[f"inputs.codes_{name}"]
        torch.testing.assert_close(
            reference.model.vqmodel.decode(codes),
            PIXELS.tensors[f"expected.pixels_{name}"],
            atol=3e-4,
            rtol=0,
        )
        torch.testing.assert_close(model.vq(codes), reference.model.vqmodel.decode(codes), atol=3e-4, rtol=0)


def test_names_of_old_and_new_versions_of_transformers_load(
    hugging_face: tuple[Any, Path], tmp_path: Path
) -> None:
    """Which of them `save_pretrained` writes differs from version to version, too."""
    reference, folder = hugging_face
    own = {name: tensor.contiguous() for name, tensor in reference.state_dict().items()}
    assert {"lm_head.weight", "model.vqmodel.decoder.conv_in.bias"} <= own.keys()
    older = {}
    for name, tensor in own.items():
        name = re.sub(r"^model\.text_model\.", "text_model.model.", name)
        older[re.sub(r"^model\.vqmodel\.", "vqmodel.", re.sub(r"^lm_head", "text_model.lm_head", name))] = (
            tensor
        )
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    codes = PIXELS.tensors["inputs.codes_wide"]
    for tensors in (own, older):
        save_file(tensors, tmp_path / "model.safetensors")
        model = TinyEmu3.from_pretrained(tmp_path, size=WIDE, negative_prompt=list(tiny().negative))
        GOLDEN.check_logits(model)
        torch.testing.assert_close(model.vq(codes), PIXELS.tensors["expected.pixels_wide"], atol=3e-4, rtol=0)
    with pytest.raises(CheckpointError, match="leave out decoder"):
        TinyEmu3.from_pretrained(folder, decoder=tmp_path)


# Checkpoints as BAAI publishes them.


class OfRanks(Emu3):
    """The tiny model with the vocabulary of the tiny file of ranks."""

    variant = tiny(vocabulary=256 + 7 + 208 + 3 + CODES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_emu3(tmp_path)
    return tmp_path


def spelled(model: Emu3, row: list[int]) -> str:
    assert model.tokenizer is not None
    return cast(str, model.tokenizer.decode(row, skip_special_tokens=False))


def test_a_checkpoint_and_its_picture_decoder_are_read_whole(folder: Path) -> None:
    model = OfRanks.from_pretrained(folder, size=WIDE, dtype=torch.bfloat16)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.embedding.weight, weights["model.embed_tokens.weight"].bfloat16())
    kept = [*range(model.form.first_code, model.form.first_code + CODES), model.form.line_end]
    assert torch.equal(model.output.weight, weights["lm_head.weight"][kept].bfloat16())
    codes = PIXELS.tensors["inputs.forced_codes"]
    torch.testing.assert_close(model.vq(codes), PIXELS.tensors["expected.pixels_forced"], atol=3e-4, rtol=0)


def test_the_picture_decoder_loads_alone_and_blocks_in_eight_bits(
    folder: Path, hugging_face: tuple[Any, Path]
) -> None:
    codes = torch.randint(CODES, (1, ROWS * LINE), generator=torch.Generator().manual_seed(0))
    for family, place in ((OfRanks, folder), (TinyEmu3, hugging_face[1])):
        whole = family.from_pretrained(place, size=WIDE, weights="int8")
        assert sum(w.nbytes for w in whole.transformer.parameters()) < 0.6 * sum(
            w.nbytes for w in family.from_pretrained(place, size=WIDE).transformer.parameters()
        )
        pictures = family.load_picture_decoder(place, size=WIDE)
        assert torch.equal(pictures.pixels(codes), whole.pixels(codes))


def test_rows_are_prompt_quality_and_size_and_a_negative_prompt_in_the_same_frame(folder: Path) -> None:
    model = OfRanks.from_pretrained(folder, size=WIDE)
    frame = "<|extra_203|>{}<|image start|>2*3<|image token|>"
    row = model.form.row(model._text("a red bus"))
    assert spelled(model, row) == frame.format("a red bus" + SUFFIX)
    assert spelled(model, list(model.form.unconditional)) == frame.format(NEGATIVE_PROMPT)
    condition = model.condition(["a red bus", "bus"], guided=True)
    lengths = condition.mask.sum(1).tolist()
    assert lengths[2] == lengths[3] == len(model.form.unconditional) == condition.mask.shape[1] > lengths[0]
    assert torch.equal(condition.rotation[2, 0], condition.rotation[0, -lengths[0] - ROWS * LINE])
    other = OfRanks.from_pretrained(folder, size=WIDE, negative_prompt="", suffix="!")
    assert spelled(other, list(other.form.unconditional)) == frame.format("")
    assert spelled(other, other.form.row(other._text("bus"))) == frame.format("bus!")
    for bad in ("<|image token|>", [model.form.line_end], "bus " * 600, 7):
        with pytest.raises(PromptError, match=r"prompt .* (not text|is none)"):
            OfRanks.from_pretrained(folder, size=WIDE, negative_prompt=bad)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="no tokenizer"):
        Emu3(tiny(), WIDE, negative_prompt="a text")


def test_prompts_that_cannot_be_taken(folder: Path) -> None:
    model = OfRanks.from_pretrained(folder, size=WIDE)
    model.check_prompts([*model.example_prompts(3, 0), "", [1, 2]])
    for prompt, said in [
        ("a <|image start|>2*3<|image token|>", "not text"),
        ("<|visual token 000003|>", "not text"),
        ("bus " * 600, "at most 512"),
        ([model.form.first_code], "not text"),
        ([10**6], "token ids from 0"),
        (7, "neither a text"),
    ]:
        with pytest.raises(PromptError, match=said):
            model.check_prompts([prompt])


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "model_type 'llama'": lambda f: edit(f, model_type="llama"),
    "vocabulary of 282926": lambda f: edit(f, vocab_size=282926),
    "tie_word_embeddings is True": lambda f: edit(f, tie_word_embeddings=True),
    "layers of width 64": lambda f: edit(f, num_hidden_layers=3),
    "pictures of 518400 pixels": lambda f: edit(f, image_area=518400),
    "sliding_window is 7": lambda f: edit(f, sliding_window=7),
    "has no emu3_vision_tokens.txt": lambda f: (f / "emu3_vision_tokens.txt").unlink(),
    "has no tokenizer": lambda f: (f / "emu3.tiktoken").unlink(),
    "no file of ranks: line 1": lambda f: (f / "emu3.tiktoken").write_text("?? 0\n"),
    "ranks are not the numbers": lambda f: (f / "emu3.tiktoken").write_text("IQ== 0\n"),
    "no token <|image start|>": lambda f: (f / "emu3_vision_tokens.txt").write_text("<|image token|>\n"),
    "more picture codes than the 48": lambda f: (f / "emu3_vision_tokens.txt").write_text(
        (f / "emu3_vision_tokens.txt").read_text() + "<|visual token 000048|>\n"
    ),
    "draws 24 codes": lambda f: edit(f / "Emu3-VisionTokenizer", codebook_size=24),
    "attn_resolutions is [1]": lambda f: edit(f / "Emu3-VisionTokenizer", attn_resolutions=[1]),
    "model_type is 'vqgan'": lambda f: edit(f / "Emu3-VisionTokenizer", model_type="vqgan"),
    "no weights": lambda f: (f / "model.safetensors").unlink(),
    "damaged": lambda f: (f / "model.safetensors").write_bytes(b"short"),
    "q_norm.weight": lambda f: save_file(
        load_file(f / "model.safetensors") | {"model.layers.0.self_attn.q_norm.weight": torch.ones(16)},
        f / "model.safetensors",
    ),
}


@pytest.mark.parametrize("said", DAMAGE)
def test_what_is_wrong_with_a_checkpoint_is_said(said: str, folder: Path) -> None:
    DAMAGE[said](folder)
    with pytest.raises(CheckpointError) as caught:
        OfRanks.from_pretrained(folder, size=WIDE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_picture_decoder_may_lie_elsewhere_and_says_its_colours(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    write_decoder(other, mean=0.25)
    dark = OfRanks.from_pretrained(folder, size=WIDE, decoder=other / "model.safetensors")
    usual = OfRanks.from_pretrained(folder, size=WIDE)
    tokens_ = torch.randint(CODES, (1, ROWS * LINE), generator=torch.Generator().manual_seed(0))
    lost = usual.pixels(tokens_).int() - dark.pixels(tokens_).int()
    inside = (dark.pixels(tokens_) > 0) & (usual.pixels(tokens_) < 255)
    assert inside.any()
    assert lost[inside].sub(64).abs().max() <= 1
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [1, 2]}))
    with pytest.raises(CheckpointError, match="expected three numbers"):
        OfRanks.from_pretrained(folder, size=WIDE, decoder=other)


def published(folder: Path, **changes: Any) -> Path:
    """The configuration of a published model, as much of it as matters."""
    folder.mkdir(exist_ok=True)
    config = config_of(184622, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 9216}
    (folder / "config.json").write_text(json.dumps(config | {"image_area": 518400} | changes))
    return folder


def test_which_model_it_is_is_in_its_configuration(tmp_path: Path) -> None:
    assert type(load_model(published(tmp_path / "x"), device="meta")) is Emu3Gen
    stage = published(tmp_path / "Emu3-Gen", image_area=262144)
    assert type(load_model(stage, device="meta")) is Emu3Stage1
    assert Emu3.from_pretrained(stage, device="meta").spec.name == "emu3-stage1"
    with pytest.raises(CheckpointError, match="it is not emu3-gen"):
        load_model("emu3-gen", source=stage, device="meta")
    chat = published(tmp_path / "chat", image_area=262144, max_position_embeddings=131072)
    with pytest.raises(CheckpointError, match="may be Emu3-Chat"):
        load_model(chat, device="meta")
    silent = published(tmp_path / "silent", image_area=None)
    with pytest.raises(CheckpointError, match=r"may be any of emu3-gen, emu3-stage1"):
        load_model(silent, device="meta")
    assert load_model("emu3-gen", source=silent, device="meta").spec.grid.tokens == 8190
    assert Emu3Gen.recognises("BAAI/Emu3-Gen-hf")
    assert not Emu3Gen.recognises("BAAI/Emu3-Stage1")


@pytest.mark.parametrize(
    ("variant", "tokens_", "count"), [(VARIANTS[0], 8190, 271), (VARIANTS[1], 4160, 193)]
)
def test_published_models(variant: Emu3Variant, tokens_: int, count: int) -> None:
    with torch.device("meta"):
        model = Emu3(variant)
    assert model.spec.grid.tokens == tokens_
    assert model.spec.max_condition == 512 + 1 + 7
    slots = model.weight_slots()
    assert len(slots) == 3 + 32 * 9
    assert sum(torch.Size(slot.wanted).numel() for slot in slots.values()) == 8_492_011_520
    assert sum(w.numel() for w in model.vq.parameters()) == 161_250_255
    assert len(model.vq.weight_slots("emu3")) == len(set(model.vq.weight_slots("emu3-transformers")))
    assert len(model.form.unconditional) == 1 + 44 + 7
    assert len(NEGATIVE_IDS) == 44
    assert len(variant.sizes) == count
    assert load_class("model", variant.name).variant == variant


def test_sizes_are_those_of_the_authors_rule() -> None:
    for variant in VARIANTS:
        for wide, high in itertools.product(range(1, 31), repeat=2):
            if max(wide, high) <= 3.9 * min(wide, high):
                unit = (variant.area / (wide * high)) ** 0.5
                size = (round(wide * unit / 8) * 8, round(high * unit / 8) * 8)
                assert size in variant.sizes
        for width, height in variant.sizes[::9]:  # each comes of some ratio
            ratios = [width / height * 1.0004**step for step in range(-60, 61)]
            sides = {
                (8 * round((variant.area * r) ** 0.5 / 8), 8 * round((variant.area / r) ** 0.5 / 8))
                for r in ratios
            }
            assert (width, height) in sides
    wide_model = Emu3Gen.from_pretrained(device="meta", size=(960, 544))
    assert (wide_model.spec.grid.rows, wide_model.spec.grid.columns) == (68, 120)
    # 21 23 9 16 17 15: "68*120" in the published vocabulary.
    assert wide_model.form.header == (151852, 21, 23, 9, 16, 17, 15, 151851)
    with pytest.raises(ArkvError, match=r"\(720, 720\)"):
        Emu3Gen.from_pretrained(device="meta", size=(724, 720))


@pytest.mark.slow
def test_a_whole_picture_at_full_width() -> None:
    """One layer of the published shape, all heads, the whole vocabulary and raster, random weights."""
    shape = replace(EMU3_GEN.transformer, layers=1)
    # The size of a picture is a number of pixels: a decoder of as many for a code as the published one has.
    decoder = replace(VQ, codes=32768, multipliers=(1, 1, 1, 1))
    model = Emu3(replace(EMU3_GEN, transformer=shape, vq=decoder))
    model = model.to("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
    model.vq.float()
    # A second row takes a CPU more than twice the time, and guidance is tested at small sizes.
    result = Decoder(model, load_policy("linear", ratio="1/8")).generate(
        [[20_000] * 20], seeds=[1], guidance=1.0
    )
    assert result.images[0].size == (720, 720)
    assert ((result.tokens == 32768) == (torch.arange(8190) % 91 == 90)).all()
    assert result.stats.kv_bytes < result.stats.full_kv_bytes / 6
