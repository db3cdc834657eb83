from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from llamagen_files import CASES, TinyCaptions, TinyClasses, write_llamagen, write_t5
from safetensors.torch import load_file, save_file
from tiny import POLICIES, build, tight
from torch import Tensor, nn
from torch.nn import functional as F

from arkv import Decoder, load_policy
from arkv.decoding.sampling import Sampling, filtered, guide
from arkv.errors import CheckpointError, PromptError
from arkv.models import llamagen
from arkv.models.captions import CaptionEncoder, clean_caption
from arkv.models.imagenet import class_names, class_number
from arkv.models.llamagen import VARIANTS, LlamaGen
from arkv.models.llamagen_checkpoint import CLASSES_REPOSITORY, UNUSED
from arkv.models.transformer import TransformerConfig
from arkv.weights.checkpoint import draw_weights_, load_weights_

DATA = Path(__file__).parents[1] / "data"


class Golden:
    """Inputs and outputs of the official code, and the model with its weights."""

    def __init__(self, case: str) -> None:
        self.facts = json.loads((DATA / f"{case}.json").read_text())
        self.tensors = load_file(DATA / f"{case}.safetensors")
        self.weights = {n[8:]: t for n, t in self.tensors.items() if n.startswith("weights.")}
        self.model = LlamaGen(CASES[case]).eval()
        self.prompts: list[Any]
        if case == "llamagen_c2i":
            self.prompts = self["inputs.class_ids"].tolist()
        else:
            self.prompts = [
                states[: mask.sum()]
                for states, mask in zip(
                    self["inputs.caption_emb_right"], self["inputs.caption_mask_right"], strict=True
                )
            ]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def tolerance(self, name: str) -> float:
        return float(self.facts["tolerance"]["values"][name])

    @property
    def scale(self) -> float:
        return float(self.facts["settings"]["cfg_scale"])

    @property
    def guided_tokens(self) -> int:
        return int(self.facts["settings"]["cfg_interval"]) + 2

    def logits(self) -> dict[str, Tensor]:
        """Of every step under the forced tokens, `[steps, rows, codes]`."""
        decoder = Decoder(self.model, load_policy("full"))
        forced = decoder.teacher_force(self.prompts, self["inputs.forced_tokens"], self.scale)
        cond, uncond = forced.raw.transpose(0, 1).chunk(2, dim=1)
        return {"cond": cond, "uncond": uncond, "guided": forced.guided.transpose(0, 1)}

    def deviation(self, got: Tensor, name: str) -> float:
        """The greatest one, in tolerances."""
        return (got - self[name]).abs().max().item() / self.tolerance(name)


def load_(model: LlamaGen, weights: dict[str, Tensor], folder: Path) -> None:
    save_file(weights, folder / "weights.safetensors")
    load_weights_(model.weight_slots(), [folder / "weights.safetensors"], UNUSED)


@pytest.fixture(params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> Golden:
    case = Golden(request.param)
    load_(case.model, case.weights, tmp_path)
    return case


@pytest.fixture
def t2i(tmp_path: Path) -> Golden:
    case = Golden("llamagen_t2i")
    load_(case.model, case.weights, tmp_path)
    return case


def test_logits_are_those_of_the_reference(golden: Golden) -> None:
    for name, got in golden.logits().items():
        assert golden.deviation(got, f"expected.logits_{name}") <= 1, name


def test_guidance_ends_where_the_interval_does(golden: Golden) -> None:
    logits, scale = golden.logits(), torch.tensor(golden.scale)
    sampling = Sampling(golden.scale, guided_tokens=golden.guided_tokens)
    got = torch.stack(
        [
            guide(torch.cat([cond, uncond]), scale) if sampling.guides(step) else cond
            for step, (cond, uncond) in enumerate(zip(logits["cond"], logits["uncond"], strict=True))
        ]
    )
    assert golden.deviation(got, "expected.logits_guided_interval") <= 1
    early = got.clone()
    early[golden.guided_tokens - 1] = logits["cond"][golden.guided_tokens - 1]
    assert golden.deviation(early, "expected.logits_guided_interval") > 20


def test_probabilities_are_those_of_the_reference(golden: Golden) -> None:
    settings, logits = golden.facts["settings"], golden.logits()["guided"]
    sampling = Sampling(golden.scale, settings["temperature"], settings["top_k"], settings["top_p"])
    temperature = torch.tensor(sampling.temperature)
    weights = torch.stack([filtered(step, sampling, temperature).softmax(-1) for step in logits])
    assert golden.deviation(weights / weights.sum(-1, keepdim=True), "expected.probs") <= 1
    least = weights.masked_fill(weights == 0, torch.inf).argmin(-1, keepdim=True)
    weights = weights.scatter(-1, least, 0)  # without the token that crosses the threshold
    assert golden.deviation(weights / weights.sum(-1, keepdim=True).clamp(min=1e-9), "expected.probs") > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_that_keeps_all_gives_the_tokens_of_the_reference(golden: Golden, policy: str) -> None:
    decoder = Decoder(golden.model, build(policy, golden.model.spec.grid.tokens))
    settings: dict[str, Any] = {"guidance": golden.scale, "temperature": 0}
    got = decoder.generate(golden.prompts, **settings)
    assert torch.equal(got.tokens, golden["expected.greedy_tokens"])
    got = decoder.generate(golden.prompts, guided_tokens=golden.guided_tokens, **settings)
    assert torch.equal(got.tokens, golden["expected.greedy_tokens_interval"])


@pytest.mark.parametrize("policy", POLICIES)
def test_keys_that_are_zero_upset_no_policy(t2i: Golden, policy: str) -> None:
    forced = Decoder(t2i.model, tight(policy, t2i.model)).teacher_force(
        t2i.prompts, t2i["inputs.forced_tokens"], t2i.scale
    )
    assert forced.raw.isfinite().all()


def test_keys_of_the_condition_are_zero_and_their_values_are_not(golden: Golden) -> None:
    decoder = Decoder(golden.model, load_policy("full"))
    decoder.teacher_force(golden.prompts, golden["inputs.forced_tokens"], golden.scale)
    store = decoder.store
    assert store is not None
    for layer in range(store.layers):
        condition = slice(0, store.condition)
        assert not store.by_head(store.keys[layer].transpose(1, 2))[..., condition].any()
        assert store.by_head(store.values[layer].transpose(1, 2))[..., condition].any()
        assert store.keys[layer].any()


def test_captions_alone_are_as_in_a_padded_batch(t2i: Golden) -> None:
    lengths = [len(prompt) for prompt in t2i.prompts]
    assert len(set(lengths)) > 1
    decoder = Decoder(t2i.model, load_policy("full"))
    for row, prompt in enumerate(t2i.prompts):
        alone = decoder.teacher_force([prompt], t2i["inputs.forced_tokens"][[row]], t2i.scale)
        expected = t2i["expected.logits_guided"][:, row]
        assert (alone.guided[0] - expected).abs().max() <= t2i.tolerance("expected.logits_guided")


def _condition(change: Callable[..., Any]) -> Callable[[Golden], None]:
    def spoil(golden: Golden) -> None:
        condition = golden.model.condition
        golden.model.condition = lambda prompts, guided: change(  # type: ignore[method-assign]
            golden, condition(prompts, guided)
        )

    return spoil


def _rotation(golden: Golden, cells: Callable[[Tensor], Tensor]) -> None:
    """Give the visual tokens another rotation, made from `[N, head_dim]` as it is."""
    rotate = golden.model._rotation

    def changed(length: int) -> Tensor:
        rotation = rotate(length).clone()
        rotation[0, length:] = cells(rotation[0, length:])
        return rotation

    golden.model._rotation = changed  # type: ignore[method-assign]


def _swap_axes(golden: Golden) -> None:
    def swap(cells: Tensor) -> Tensor:
        return cells.unflatten(1, (2, 2, -1)).flip(2).flatten(1)

    _rotation(golden, swap)


def _one_axis(golden: Golden) -> None:
    from arkv.models.rope import sequence_rotation

    _rotation(golden, lambda cells: sequence_rotation(torch.arange(len(cells)), 16, 1e4))


def _identity_prefix(golden: Golden, condition: Any) -> Any:
    rotation = condition.rotation.clone()
    rotation[:, : condition.mask.shape[1], :8] = 1
    return replace(condition, rotation=rotation)


def _half_split(golden: Golden) -> None:
    """Load queries and keys without putting their rows in another order."""
    for layer, block in enumerate(golden.model.transformer.blocks):
        block.qkv.weight.data.copy_(  # type: ignore[union-attr, operator]
            golden.weights[f"layers.{layer}.attention.wqkv.weight"]
        )


def _exchange_gates(golden: Golden) -> None:
    for block in golden.model.transformer.blocks:
        weight = block.gate_up.weight.data  # type: ignore[union-attr]
        weight.copy_(weight.roll(len(weight) // 2, 0))  # type: ignore[operator, arg-type]


def _class_0(golden: Golden) -> None:
    golden.model.classes.weight.data[-1] = golden.model.classes.weight.data[0]


def _hide_condition(golden: Golden, condition: Any) -> Any:
    return replace(condition, mask=torch.zeros_like(condition.mask))


def _attend_padding(golden: Golden, condition: Any) -> Any:
    return replace(condition, mask=torch.ones_like(condition.mask))


def _full_unconditional(golden: Golden, condition: Any) -> Any:
    mask = condition.mask.clone()
    mask[len(mask) // 2 :] = True
    return replace(condition, mask=mask)


def _right_padding(golden: Golden, condition: Any) -> Any:
    kept = condition.mask[: len(condition.mask) // 2].sum(1).repeat(2)
    embeddings = torch.stack([x.roll(int(n), 0) for x, n in zip(condition.embeddings, kept, strict=True)])
    return replace(condition, embeddings=embeddings, mask=condition.mask.flip(1))


def _zero_unconditional(golden: Golden) -> None:
    golden.model.unconditional.data.zero_()


def _erf(golden: Golden) -> None:
    golden.model.caption[1] = nn.GELU()


WRONG: dict[str, tuple[Callable[[Golden], None], str, str]] = {
    "identity instead of zero": (_condition(_identity_prefix), "cond", ""),
    "row and column swapped": (_swap_axes, "cond", ""),
    "half-split layout": (_half_split, "cond", ""),
    "one axis": (_one_axis, "cond", ""),
    "shifted by one": (lambda g: _rotation(g, lambda cells: cells.roll(1, 0)), "cond", ""),
    "w1 and w3 exchanged": (_exchange_gates, "cond", ""),
    "condition hidden": (_condition(_hide_condition), "cond", ""),
    "class 0 for no class": (_class_0, "uncond", "llamagen_c2i"),
    "padding attended": (_condition(_attend_padding), "cond", "llamagen_t2i"),
    "right padding": (_condition(_right_padding), "cond", "llamagen_t2i"),
    "full mask of unconditional rows": (_condition(_full_unconditional), "uncond", "llamagen_t2i"),
    "zeros for no caption": (_zero_unconditional, "uncond", "llamagen_t2i"),
    "exact GELU": (_erf, "cond", "llamagen_t2i"),
}


@pytest.mark.parametrize(
    ("case", "wrong"), [(case, wrong) for case in CASES for wrong in WRONG if WRONG[wrong][2] in ("", case)]
)
def test_what_is_wrong_is_seen(case: str, wrong: str, tmp_path: Path) -> None:
    spoil, name, _ = WRONG[wrong]
    golden = Golden(case)
    load_(golden.model, golden.weights, tmp_path)
    spoil(golden)
    assert golden.deviation(golden.logits()[name], f"expected.logits_{name}") > 20


def test_another_formula_of_guidance_is_seen(golden: Golden) -> None:
    logits = golden.logits()
    wrong = logits["cond"] + golden.scale * (logits["cond"] - logits["uncond"])
    assert golden.deviation(wrong, "expected.logits_guided") > 20


def test_real_sizes_have_the_published_numbers_of_parameters() -> None:
    published = {"b": 110.9, "l": 342.9, "xl": 774.7, "xxl": 1411.0, "3b": 3096.7, "t2i": 777.7}
    assert len(VARIANTS) == 12
    for variant in VARIANTS:
        with torch.device("meta"):
            model = LlamaGen(variant)
        counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
        assert counts.pop("vq") == pytest.approx(42.6e6, rel=2e-3)
        # The authors keep what stands for no caption outside of their parameters.
        assert sum(counts.values()) / 1e6 == pytest.approx(published[variant.name.split("-")[1]], abs=0.06)
        assert model.spec.grid.tokens == (int(variant.name.split("-")[-1]) // 16) ** 2


def test_a_head_of_a_hundred_dimensions_decodes() -> None:
    config = TransformerConfig(1, 200, 2, 2, 100, 64, norm_eps=1e-5)
    model = LlamaGen(replace(CASES["llamagen_c2i"], transformer=config)).eval()
    assert Decoder(model, load_policy("linear:budget=9,anchors=2")).generate([3]).tokens.shape == (1, 16)


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [("model", ".pt"), ("module", ".pt"), ("state_dict", ".pt"), (None, ".pt"), (None, ".safetensors")],
)
def test_every_wrapping_loads(tmp_path: Path, wrap: str | None, suffix: str) -> None:
    written = write_llamagen(tmp_path, TinyClasses.variant, wrap, suffix)
    for source in (tmp_path, (tmp_path / TinyClasses.variant.file).with_suffix(suffix)):
        assert TinyClasses.recognises(source)
        model = TinyClasses.from_pretrained(source, dtype=torch.float32)
        for (name, got), expected in zip(model.named_parameters(), written.parameters(), strict=True):
            assert torch.equal(got, expected), name
    assert not model.training


def test_the_decoder_may_lie_elsewhere_and_be_safetensors(tmp_path: Path) -> None:
    written = write_llamagen(tmp_path / "a", TinyClasses.variant)
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "vq_ds16_c2i.pt").unlink()
    slots = written.vq.weight_slots("llamagen")
    save_file({n: s.target.detach().clone() for n, s in slots.items()}, tmp_path / "b" / "model.safetensors")
    model = TinyClasses.from_pretrained(tmp_path / "a", decoder=tmp_path / "b", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert torch.equal(model.vq.codebook.weight, written.vq.codebook.weight)
    with pytest.raises(CheckpointError, match=r"no picture decoder vq_ds16_c2i\.pt beside"):
        TinyClasses.from_pretrained(tmp_path / "a")


def test_what_is_missing_or_wrong_is_one_line(tmp_path: Path) -> None:
    def refusal(model_class: type[LlamaGen], source: Path | None, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            model_class.from_pretrained(source, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no checkpoint is named: give a file such as c2i_B_256.pt" in refusal(LlamaGen, None)
    assert "there is no file or folder" in refusal(LlamaGen, tmp_path / "x")
    assert "may have several models" in refusal(LlamaGen, CLASSES_REPOSITORY)  # type: ignore[arg-type]
    assert "expected a file named as published, such as c2i_B_256.pt" in refusal(LlamaGen, tmp_path)
    assert "expected c2i_T_64.pt" in refusal(TinyClasses, tmp_path)
    write_llamagen(tmp_path, TinyClasses.variant)
    wrong = refusal(llamagen.LlamaGenB256, tmp_path / "c2i_T_64.pt")
    assert "layers.*.attention.wqkv.weight (3 of them) has shape (192, 64), the model wants (2304" in wrong
    other = refusal(TinyCaptions, tmp_path / "c2i_T_64.pt")
    assert "cls_embedding.uncond_embedding (8, 24) is missing" in other
    assert "cls_embedding.embedding_table.weight (11, 64) is unexpected" in other
    for name in ("c2i_B_256.pt", "c2i_L_256.pt"):
        (tmp_path / name).touch()
    assert "has c2i_B_256.pt and c2i_L_256.pt: give the path" in refusal(LlamaGen, tmp_path)
    assert "damaged" in refusal(LlamaGen, tmp_path / "c2i_B_256.pt")


def test_on_the_meta_device_nothing_is_read() -> None:
    for model_class in LlamaGen.__subclasses__():
        if model_class.variant in VARIANTS:
            assert model_class.from_pretrained(device="meta").device.type == "meta"


def test_classes_come_by_number_or_name() -> None:
    names = class_names()
    assert len(names) == len({name.casefold() for name in names}) == 1000
    known = {0: "tench", 88: "macaw", 207: "golden retriever", 250: "Siberian husky", 360: "otter"}
    known |= {387: "lesser panda", 417: "balloon", 980: "volcano", 999: "toilet tissue"}
    for number, name in known.items():
        assert names[number] == name
        assert class_number(name) == class_number(name.upper().replace(" ", "_")) == number
    assert class_number("207") == 207
    with pytest.raises(PromptError, match="unknown class of ImageNet 'golden retriver'; did you mean golden"):
        class_number("golden retriver")
    with torch.device("meta"):
        model = LlamaGen(VARIANTS[0])
    model.check_prompts([3, "tench", "12", torch.tensor(3), 999])
    for prompt in (-1, 1000, 1.5, True, None, "1000", [3]):
        with pytest.raises(PromptError, match="class"):
            model.check_prompts([prompt])


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("  A  Red\n Bus ", "a red bus"),
        ("fish &amp; chips", "fish & chips"),
        ("\u201cTom\u2019s\u201d café \u2014 open", '"tom\'s" café - open'),
        ("see https://example.org/x?y now", "see now"),
        ("a <b>bold</b> word, 3 < 4", "a bold word, 3 < 4"),
        ("a <person> walks", "a person walks"),
        ("", ""),
    ],
)
def test_captions_are_cleaned(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned
    assert clean_caption(cleaned) == cleaned


def test_captions_go_through_the_text_encoder(tmp_path: Path) -> None:
    write_llamagen(tmp_path, TinyCaptions.variant)
    (tmp_path / "t5").mkdir()
    reference = write_t5(tmp_path / "t5")
    model = TinyCaptions.from_pretrained(tmp_path, text_encoder=tmp_path / "t5")
    assert isinstance(model.encoder, CaptionEncoder)
    texts = ["A red bus", "an old clock by the lake and a blue bird and a bus", "the lake"]
    states = model.encoder(texts)
    assert [len(x) for x in states] == [4, 8, 3], "words and the end token, eight at most"
    with torch.no_grad():
        ids = torch.tensor([model.encoder.tokenizer.encode(texts[0].lower()).ids])
        assert ids[0, -1] == 1
        padded = F.pad(ids, (0, 4))
        expected = reference.encoder(input_ids=padded, attention_mask=(padded > 0).long()).last_hidden_state
    assert torch.allclose(states[0], expected[0, :4], atol=1e-5)
    decoder = Decoder(model, load_policy("full"))
    by_text = decoder.generate(texts, guidance=2.0)
    assert torch.equal(by_text.tokens, decoder.generate(states, guidance=2.0).tokens)
    assert by_text.images[0].size == (8, 8)
    encoded: list[list[str]] = []
    model.encoder.register_forward_pre_hook(lambda _, arguments: encoded.append(list(arguments[0])))
    samples = [texts[1], texts[0], texts[1], states[2]]
    again = decoder.generate(samples, seeds=[1, 0, 1, 2], guidance=2.0)
    assert torch.equal(again.tokens, by_text.tokens[[1, 0, 1, 2]])
    assert encoded == [[texts[1], texts[0]]], "a text is encoded once"
    model.check_prompts(model.example_prompts(5, 0))

    (tmp_path / "narrow").mkdir()
    write_t5(tmp_path / "narrow", width=12)
    with pytest.raises(CheckpointError, match="have width 12, the model wants 24"):
        TinyCaptions.from_pretrained(tmp_path, text_encoder=tmp_path / "narrow")
    (tmp_path / "narrow" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"narrow has no tokenizer\.json"):
        TinyCaptions.from_pretrained(tmp_path, text_encoder=tmp_path / "narrow")
    (tmp_path / "narrow" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="is not a T5"):
        TinyCaptions.from_pretrained(tmp_path, text_encoder=tmp_path / "narrow")


def test_captions_that_are_none_are_refused() -> None:
    model = LlamaGen(TinyCaptions.variant)
    with pytest.raises(PromptError, match="tiny has no text encoder"):
        model.check_prompts(["a bus"])
    wrong = [torch.ones(9, 24), torch.ones(0, 24), torch.ones(3, 23), torch.ones(24), torch.ones(3, 24).int()]
    for prompt in (*wrong, 3, None):
        with pytest.raises(PromptError, match="neither a text nor a float tensor of 1 to 8 states"):
            model.check_prompts([prompt])
    model.check_prompts(model.example_prompts(5, 0))


def test_example_prompts_are_the_same_for_one_seed() -> None:
    model = LlamaGen(TinyClasses.variant)
    assert model.example_prompts(7, 3) == model.example_prompts(7, 3)
    model.check_prompts(model.example_prompts(50, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llamagen-b-384", "llamagen-3b-256", "llamagen-t2i-xl-256"])
def test_one_layer_of_the_real_width_draws_a_whole_picture(name: str) -> None:
    real = next(variant for variant in VARIANTS if variant.name == name)
    model = LlamaGen(replace(real, transformer=replace(real.transformer, layers=1))).eval()
    draw_weights_(model, 0)
    result = Decoder(model, load_policy("linear", ratio="1/6")).generate(model.example_prompts(1, 0))
    assert result.images[0].size == (16 * real.side, 16 * real.side)
    assert result.tokens.shape == (1, real.side**2)
    assert result.tokens.unique().numel() > 50
