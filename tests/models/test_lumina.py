import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lumina_files import (
    CODES,
    DATA,
    VQ,
    WIDE,
    TinyLumina,
    facts,
    tensors,
    tiny,
    tokens,
    write_lumina,
    write_tokenizer,
    write_vqgan,
)
from tiny import build
from torch import Tensor
from torch.nn import functional as F

from arkv import Decoder
from arkv.errors import ArkvError, CheckpointError, PromptError
from arkv.model import Condition
from arkv.models import transformer as transformer_file
from arkv.models.lumina import LuminaMGPT, LuminaMGPT512, LuminaMGPT768
from arkv.models.lumina_checkpoint import (
    LUMINA_7B_512,
    LUMINA_7B_768,
    LUMINA_7B_1024,
    LuminaVariant,
    code_name,
    size_name,
)
from arkv.models.transformer import Block, HeadNorm
from arkv.registry import load_class, load_model, load_policy, names
from arkv.weights.checkpoint import load_weights_


def golden_model() -> LuminaMGPT:
    model = LuminaMGPT(tiny(), WIDE).eval()
    slots = {f"weights.{name}": slot for name, slot in model.weight_slots().items()}
    load_weights_(slots, [DATA / "lumina.safetensors"], ["inputs.*", "expected.*"])
    return model


def golden_prompts() -> list[list[int]]:
    """The text of the reference's prompts: what stands between the first token and the separator."""
    ids, lengths = tensors()["inputs.prompt_ids"], tensors()["inputs.prompt_lengths"]
    return [row[-length:][1:-4].tolist() for row, length in zip(ids, lengths.tolist(), strict=True)]


def as_visual(ids: Tensor) -> Tensor:
    """Ids of the common vocabulary to visual tokens; the last, which ends the picture, is left out."""
    ids = ids[:, :-1]
    return torch.where(ids == tokens().line_end, CODES, ids - tokens().first_code)


def columns() -> list[int]:
    """Ids in the common vocabulary of the visual tokens."""
    return [*range(tokens().first_code, tokens().first_code + CODES), tokens().line_end]


def deviations(model: LuminaMGPT, prompts: list[list[int]] | None = None) -> dict[str, float]:
    """By row kind, how far the logits are from the reference's where a token is allowed."""
    forced = as_visual(tensors()["inputs.forced_tokens"])
    scale = facts()["settings"]["cfg_scale"]
    found = Decoder(model, build("full", 0)).teacher_force(prompts or golden_prompts(), forced, scale)
    allowed = tensors()["expected.allowed_mask"][:-1, columns()]
    rows = {"cond": found.raw[:2], "uncond": found.raw[2:], "guided": found.guided}
    result = {}
    for name, logits in rows.items():
        assert torch.equal(logits.isfinite(), allowed.expand_as(logits))
        expected = tensors()[f"expected.logits_{name}"][:-1, :, columns()].transpose(0, 1)
        result[f"expected.logits_{name}"] = (logits - expected)[:, allowed].abs().max().item()
    return result


def test_logits_are_those_of_the_reference() -> None:
    """Prompts of two lengths in one batch; the reference had each alone."""
    tolerance = facts()["tolerance"]["values"]
    for name, error in deviations(golden_model()).items():
        assert error <= tolerance[name], name


def test_greedy_tokens_are_those_of_the_reference() -> None:
    result = Decoder(golden_model(), build("full", 0)).generate(
        golden_prompts(), guidance=facts()["settings"]["cfg_scale"], temperature=0
    )
    assert torch.equal(result.tokens, as_visual(tensors()["expected.greedy_tokens"]))
    codes = result.tokens.view(2, 4, 7)[:, :, :-1]
    assert torch.equal(codes, tensors()["expected.greedy_codes"])
    assert result.images[0].size == (6 * VQ.scale, 4 * VQ.scale)


def no_shift(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, weight in model.transformer.named_parameters():
        if name.endswith("_norm.bias"):
            weight.data.zero_()


def no_norm(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HeadNorm, "forward", lambda self, x: x)


def rms_norm(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: HeadNorm, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=1e-5) * self.weight + self.bias

    monkeypatch.setattr(HeadNorm, "forward", forward)


def norm_last(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in cast("list[Block]", model.blocks):
        query_norm, key_norm, project = block.query_norm, block.key_norm, block.project
        assert query_norm is not None
        assert key_norm is not None
        block.query_norm = block.key_norm = None

        def late(
            hidden: Tensor,
            rotation: Tensor,
            project: Callable[..., Any] = project,
            norms: tuple[HeadNorm, HeadNorm] = (query_norm, key_norm),
        ) -> tuple[Tensor, Tensor, Tensor]:
            query, key, value = project(hidden, rotation)
            return norms[0](query), norms[1](key), value

        monkeypatch.setattr(block, "project", late)


def interleaved(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    def rotate(x: Tensor, rotation: Tensor) -> Tensor:
        cosine, sine = rotation[:, :, None].chunk(2, dim=-1)
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cosine - odd * sine, odd * cosine + even * sine], -1).flatten(-2)

    monkeypatch.setattr(transformer_file, "rotate", rotate)


def width_first(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    separator, start, height, width = model.form.header
    model.form = replace(model.form, header=(separator, start, width, height))


def padding_seen(model: LuminaMGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    condition = model.condition

    def unmasked(prompts: list[Any], guided: bool) -> Condition:
        made = condition(prompts, guided)
        return replace(made, mask=torch.ones_like(made.mask))

    monkeypatch.setattr(model, "condition", unmasked)


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        (no_shift, "cond"),
        (no_norm, "cond"),
        (rms_norm, "cond"),
        (norm_last, "cond"),
        (interleaved, "cond"),
        (width_first, "cond"),
        (padding_seen, "uncond"),
    ],
)
def test_wrong_models_are_told_apart(
    wrong: Callable[..., None], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = golden_model()
    wrong(model, monkeypatch)
    tolerance = facts()["tolerance"]["values"][f"expected.logits_{kind}"]
    assert deviations(model)[f"expected.logits_{kind}"] > 100 * tolerance


def test_a_prompt_gives_the_same_alone_and_in_a_batch() -> None:
    decoder, prompts = Decoder(golden_model(), build("full", 0)), golden_prompts()
    forced = as_visual(tensors()["inputs.forced_tokens"])
    together = decoder.teacher_force(prompts, forced, 3.0)
    for i, prompt in enumerate(prompts):
        alone = decoder.teacher_force([prompt], forced[[i]], 3.0)
        torch.testing.assert_close(alone.raw, together.raw[[i, 2 + i]], atol=1e-4, rtol=1e-4)
    drawn = decoder.generate(prompts, seeds=[5, 6])
    for i, prompt in enumerate(prompts):
        assert torch.equal(decoder.generate([prompt], seeds=[5 + i]).tokens, drawn.tokens[[i]])


def test_lines_end_where_the_size_says() -> None:
    result = Decoder(golden_model(), build("full", 0)).generate(golden_prompts() * 2, temperature=3.0)
    assert ((result.tokens == CODES) == (torch.arange(28) % 7 == 6)).all()


# SSD needs to be told of the heads.
@pytest.mark.parametrize("policy", [entry.name for entry in names("policy") if entry.name != "ssd"])
def test_every_policy_with_room_for_all_gives_the_tokens_of_the_full_cache(policy: str) -> None:
    model, prompts = golden_model(), golden_prompts()
    full = Decoder(model, build("full", 0)).generate(prompts).tokens
    assert torch.equal(Decoder(model, build(policy, model.spec.grid.tokens)).generate(prompts).tokens, full)


def test_what_is_called_while_decoding_is_one_graph() -> None:
    model = golden_model()
    hidden, rotation = torch.randn(2, 1, 64), torch.randn(1, 1, 16)
    position = torch.tensor(6)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (model.embed, (torch.tensor([3, CODES]), position)),
        (model.head, (hidden, position)),
        (model.blocks[0].project, (hidden, rotation)),
    ]
    for function, arguments in calls:
        traced = torch.compile(function, backend="eager", fullgraph=True, dynamic=False)
        torch.testing.assert_close(traced(*arguments), function(*arguments))


# Against transformers' own class, with norms that differ from head to head.


def hugging_face(tmp_path: Path) -> Any:
    """A re-drawn Chameleon, and its checkpoint in `tmp_path` as transformers saves it."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    settings = facts()["config"]["hf_config"]
    kept = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
    kept |= {"num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "vocabulary_map", "vq_config"}
    config = ChameleonConfig(**{name: value for name, value in settings.items() if name in kept})
    reference = ChameleonForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "_norm." in name or name.endswith("norm.weight"):
                weight.normal_(float(name.endswith("weight")), 0.3, generator=generator)
            else:
                weight.normal_(0, 0.25, generator=generator)
    reference.save_pretrained(tmp_path)
    return reference


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The golden weights as they are published, with picture decoder and tokenizer."""
    write_lumina(tmp_path)
    return tmp_path


@torch.no_grad()
def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    reference = hugging_face(tmp_path)
    write_vqgan(tmp_path / "vqgan.ckpt")
    write_tokenizer(tmp_path / "tokenizer.json")
    model = TinyLumina.from_pretrained(tmp_path, size=WIDE)
    prompts = golden_prompts()
    forced = as_visual(tensors()["inputs.forced_tokens"])
    found = Decoder(model, build("full", 0)).teacher_force(prompts, forced, 4.0)
    ids = tensors()["inputs.forced_tokens"][:, :-2]

    def logits(context: list[int], row: int) -> Tensor:
        whole = torch.cat([torch.tensor(context), ids[row]])[None]
        hidden = reference.model(whole).last_hidden_state[0, len(context) - 1 :]
        return reference.lm_head(hidden)[:, columns()]  # type: ignore[no-any-return]

    t = tokens()
    image = [t.image_start, t.first_size + 2, t.first_size + 3]
    for row, prompt in enumerate(prompts):
        conditional = logits([t.begin, *prompt, t.separator, *image], row)
        unconditional = logits(image, row)
        for rows, expected, near in (
            (found.raw[row], conditional, 1e-4),
            (found.raw[2 + row], unconditional, 1e-4),
            (found.guided[row], unconditional + 4.0 * (conditional - unconditional), 7e-4),
        ):
            allowed = rows.isfinite()
            assert expected.std() > 0.5
            torch.testing.assert_close(rows[allowed], expected[allowed], atol=near, rtol=0)


# Checkpoints.


def test_a_checkpoint_is_read_whole(folder: Path) -> None:
    model = TinyLumina.from_pretrained(folder, size=WIDE)
    assert max(deviations(model).values()) < 1e-3
    vqgan = torch.load(folder / "vqgan.ckpt")["state_dict"]
    assert torch.equal(model.vq.decoder.conv_out.weight, vqgan["decoder.conv_out.weight"])
    assert torch.equal(model.vq.codebook.weight, vqgan["quantize.embedding.weight"])
    narrow = TinyLumina.from_pretrained(folder, size=WIDE, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.vq.codebook.weight, model.vq.codebook.weight)


def test_a_text_is_put_into_the_sentence_of_training(folder: Path) -> None:
    model = TinyLumina.from_pretrained(folder, size=WIDE)
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    names_of = {i: name for name, i in words.items()}
    condition = model.condition(["red bus"], guided=True)
    length = int(condition.mask[0].sum())
    table = model.embedding.weight
    ids = [int((table == vector).all(-1).nonzero()[0]) for vector in condition.embeddings[0]]
    spelled = "".join(names_of[i] for i in ids)
    sentence = "Generate an image of 96x64 according to the following prompt:\nred bus"
    assert spelled == f"<s>{sentence}<reserved08706><racm3:break>{size_name(2)}{size_name(3)}"
    assert length == condition.mask.shape[1]
    assert condition.mask[1].tolist() == [False] * (length - 3) + [True] * 3
    assert torch.equal(condition.embeddings[1, -3:], condition.embeddings[0, -3:])
    assert torch.equal(
        condition.rotation[1, -1], condition.rotation[0, 2 + 28]
    )  # counts from its own first token


def write_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def damage(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What may be wrong with a checkpoint, and what the message has to say."""
    ids = facts()["config"]["hf_config"]["vocabulary_map"]
    yield "model_type is 'llama'", lambda: write_config(folder, model_type="llama")
    yield "swin_norm is True", lambda: write_config(folder, swin_norm=True)
    yield "hidden_size is 4096", lambda: write_config(folder, hidden_size=4096)
    yield "no <s>", lambda: write_config(folder, vocabulary_map={})
    fewer = {name: i for name, i in ids.items() if name != code_name(9)}
    yield "no IMGIMGJZ", lambda: write_config(folder, vocabulary_map=fewer)
    swapped = ids | {code_name(3): ids[code_name(4)], code_name(4): ids[code_name(3)]}
    yield "IMGIMGDZ the id 8: expected 7", lambda: write_config(folder, vocabulary_map=swapped)
    yield "no vqgan.ckpt", lambda: (folder / "vqgan.ckpt").unlink()
    yield "no tokenizer", lambda: (folder / "tokenizer.json").unlink()
    yield "not a tokenizer", lambda: (folder / "tokenizer.json").write_text("{}")
    yield "no weights", lambda: (folder / "model.safetensors").unlink()
    yield "damaged", lambda: (folder / "model.safetensors").write_bytes(b"short")


@pytest.mark.parametrize("case", range(11))
def test_what_is_wrong_with_a_checkpoint_is_said(case: int, folder: Path) -> None:
    said, spoil = list(damage(folder))[case]
    spoil()
    with pytest.raises(CheckpointError) as caught:
        TinyLumina.from_pretrained(folder, size=WIDE)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_picture_decoder_and_tokenizer_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "chameleon"
    (other / "tokenizer").mkdir(parents=True)
    (folder / "vqgan.ckpt").rename(other / "tokenizer" / "vqgan.ckpt")
    (folder / "tokenizer.json").rename(other / "tokenizer.json")
    for vqgan in (other, other / "tokenizer" / "vqgan.ckpt"):
        model = TinyLumina.from_pretrained(folder, size=WIDE, vqgan=vqgan, tokenizer=other)
        assert model.tokenizer is not None


def write_published(folder: Path, **changes: Any) -> Path:
    """The configuration of the published models, as much of it as matters."""
    folder.mkdir()
    ids = {name: 4 + code for code in range(8192) for name in [code_name(code)]}
    ids |= {size_name(cells): 8804 + cells for cells in range(200)}
    ids |= {"<s>": 0, "<racm3:break>": 8197, "<reserved08706>": 8710, "<reserved08799>": 8803}
    config = {"model_type": "chameleon", "vocabulary_map": ids} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_which_model_it_is_is_not_guessed_from_a_path(folder: Path, tmp_path: Path) -> None:
    assert LuminaMGPT512.recognises("Alpha-VLLM/Lumina-mGPT-7B-512")
    assert not LuminaMGPT512.recognises("Alpha-VLLM/Lumina-mGPT-7B-768")
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2"):
        LuminaMGPT.recognises(folder)  # tiny
    for name in ("Lumina-mGPT-7B-768", "Lumina-mGPT-7B-768-Omni", "mine"):
        published = write_published(tmp_path / name)
        for model_class in (LuminaMGPT, LuminaMGPT512, LuminaMGPT768):
            assert model_class.recognises(published)
        with pytest.raises(CheckpointError, match=r"may be any of lumina-mgpt-7b-1024, .*: name it, as in"):
            load_model(published)
        with pytest.raises(CheckpointError, match="nothing says which"):
            LuminaMGPT.from_pretrained(published, device="meta")
        assert load_model("lumina-mgpt-7b-768", source=published, device="meta").spec.grid.rows == 48
    by_size = LuminaMGPT.from_pretrained(tmp_path, device="meta", size=(1536, 384))
    assert by_size.spec.name == "lumina-mgpt-7b-768"


# Prompts.


def test_prompts_that_cannot_be_taken(folder: Path) -> None:
    model = TinyLumina.from_pretrained(folder, size=WIDE)
    for prompt, said in [
        ("red <reserved08799> bus", "not text"),
        ("IMGIMGBZ", "not text"),
        ("bus " * 600, "at most 512"),
        ([64], "token ids from 0 to 63"),
        ([4], "not text"),
        ([30.5], "neither a text"),
        (7, "neither a text"),
        ([30] * 600, "at most 512"),
    ]:
        with pytest.raises(PromptError, match=said):
            model.check_prompts([prompt])
        with pytest.raises(PromptError, match=said):
            model.condition([prompt], guided=True)
    with pytest.raises(PromptError, match="no tokenizer"):
        golden_model().check_prompts(["a text"])


def test_example_prompts_can_be_taken(folder: Path) -> None:
    for model in (golden_model(), TinyLumina.from_pretrained(folder, size=WIDE)):
        prompts = model.example_prompts(20, seed=3)
        model.check_prompts(prompts)
        assert prompts == model.example_prompts(20, seed=3)
        assert prompts != model.example_prompts(20, seed=4)


# Published sizes.


def crop_sizes(cells: int) -> set[tuple[int, int]]:
    """The published list: from the widest strip on, grow in height while it fits, else give up a column."""
    found, width, height = set(), cells, 1
    while width > 0:
        if max(width, height) / min(width, height) <= 4:
            found.add((width * 32, height * 32))
        if (height + 1) * width <= cells:
            height += 1
        else:
            width -= 1
    return found


@pytest.mark.parametrize(
    ("variant", "count", "visual"),
    [(LUMINA_7B_512, 49, 1056), (LUMINA_7B_768, 73, 2352), (LUMINA_7B_1024, 97, 4160)],
)
def test_published_models(variant: LuminaVariant, count: int, visual: int) -> None:
    assert set(variant.sizes) == crop_sizes((variant.target // 32) ** 2)
    assert len(variant.sizes) == len(set(variant.sizes)) == count
    with torch.device("meta"):
        model = LuminaMGPT(variant)
    assert model.spec.grid.tokens == visual
    slots = model.weight_slots()
    assert len(slots) == 419
    assert 2 * sum(torch.Size(slot.wanted).numel() for slot in slots.values()) == 14_026_317_824
    held = sum(w.numel() for w in model.parameters()) - sum(w.numel() for w in model.vq.parameters())
    norms = (
        32 * 4 * 31 * 128
    )  # rows of the query and key norms that the file has once, the model for each head
    assert held == 14_026_317_824 // 2 - (65536 - 8193) * 4096 + norms
    assert load_class("model", variant.name).variant == variant


def test_sizes_other_than_the_square() -> None:
    model = LuminaMGPT768.from_pretrained(device="meta", size=(1024, 576))
    assert (model.spec.grid.rows, model.spec.grid.columns) == (72 // 2, 64)
    assert model.form.unconditional == (8197, 8804 + 18, 8804 + 32)
    with pytest.raises(ArkvError, match=r"\(768, 768\)"):
        LuminaMGPT768.from_pretrained(device="meta", size=(770, 768))
    with pytest.raises(ArkvError, match="expected width and height"):
        LuminaMGPT768.from_pretrained(device="meta", size="768x768")  # type: ignore[arg-type]


def test_names_of_codes_and_sizes() -> None:
    assert [code_name(code) for code in (0, 1, 10, 8191)] == [
        "IMGIMGAZ",
        "IMGIMGBZ",
        "IMGIMGBAZ",
        "IMGIMGIBJBZ",
    ]
    assert size_name(16) == "<reserved08816>"


@pytest.mark.slow
def test_a_whole_picture_at_full_width() -> None:
    """One layer of the published shape, all heads, the whole vocabulary and raster, random weights."""
    one_layer = replace(LUMINA_7B_512.transformer, layers=1)
    model = LuminaMGPT(replace(LUMINA_7B_512, transformer=one_layer))
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    # A second row takes a CPU more than twice the time, and guidance is tested at small sizes.
    decoder = Decoder(model, load_policy("linear", ratio="1/6"))
    result = decoder.generate([[20_000] * 20], seeds=[1], guidance=1.0)
    assert result.images[0].size == (512, 512)
    assert ((result.tokens == 8192) == (torch.arange(1056) % 33 == 32)).all()
    assert result.stats.kv_bytes < result.stats.full_kv_bytes / 4
