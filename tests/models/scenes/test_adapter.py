import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from arkv import ArkvError, Decoder, load_policy
from arkv.errors import CheckpointError, PromptError
from arkv.models.scenes.adapter import CONTEXT_WORDS, IMAGE_ID, WEIGHTS, Scenes, word_ids
from arkv.models.scenes.codebook import GRID, PATCH_VALUES, TOKENS, Codebook
from arkv.models.scenes.drawing import SIDE
from arkv.models.scenes.grammar import GROUPS, MAX_PROMPT_TOKENS, encode_prompt, is_held_out, parse_prompt
from arkv.models.scenes.judge import judge
from arkv.models.scenes.train import export
from arkv.models.transformer import TransformerConfig

CONFIG = TransformerConfig(layers=2, width=16, heads=2, kv_heads=1, head_dim=8, hidden=24)
CODES = 33
SHORT, LONG = "a red circle", "a red circle left of a blue square on white"


def make(seed: int = 0) -> Scenes:
    generator = torch.Generator().manual_seed(seed)
    model = Scenes(Codebook(torch.rand(CODES, PATCH_VALUES, generator=generator)), CONFIG, guidance=1.6)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.normal_(std=0.4, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Scenes:
    return make()


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(CODES, (2, TOKENS), generator=torch.Generator().manual_seed(1))


# Words in


@torch.inference_mode()
def test_a_word_tells_of_the_four_before_it_and_of_no_other(model: Scenes) -> None:
    """So that a shape knows its colour, and the second object what it is to lie beside."""
    words = encode_prompt(LONG)
    first = MAX_PROMPT_TOKENS - len(words)
    before = model.condition([LONG], guided=False).embeddings[0]
    for place, other in ((1, "cyan"), (6, "cyan"), (7, "circle")):
        changed = LONG.split()
        changed[place] = other
        after = model.condition([" ".join(changed)], guided=False).embeddings[0]
        moved = (before != after).any(-1).nonzero().flatten().tolist()
        told = range(first + place, first + place + CONTEXT_WORDS + 1)
        assert moved == [i for i in told if i <= MAX_PROMPT_TOKENS]
    # The same words one place on are another context.
    swapped = "a blue square left of a red circle on white"
    assert not torch.equal(before, model.condition([swapped], guided=False).embeddings[0])


@torch.inference_mode()
def test_what_stands_before_a_word_does_not_depend_on_padding(model: Scenes) -> None:
    alone = model.condition([SHORT], guided=False)
    beside = model.condition([LONG, SHORT], guided=True)
    assert torch.equal(alone.embeddings[0], beside.embeddings[1])
    assert torch.equal(beside.embeddings[2], beside.embeddings[3])


def test_words_are_padded_on_the_left_and_end_in_the_image_token() -> None:
    ids = word_ids(encode_prompt(SHORT))
    assert len(ids) == MAX_PROMPT_TOKENS + 1
    assert ids[-1] == IMAGE_ID
    assert ids[-4:-1] == encode_prompt(SHORT)
    assert set(ids[:-4]) == {0}
    assert word_ids(encode_prompt(LONG))[:-1] == encode_prompt(LONG)
    assert word_ids([])[-1] == IMAGE_ID
    assert not any(word_ids([])[:-1])


@torch.inference_mode()
def test_rows_are_conditional_first_and_the_unconditional_have_the_image_token_alone(model: Scenes) -> None:
    plain, both = (model.condition([SHORT, LONG], guided) for guided in (False, True))
    assert plain.mask.sum(1).tolist() == [4, 11]
    assert both.mask.sum(1).tolist() == [4, 11, 1, 1]
    assert both.mask[:, -1].all()
    assert both.embeddings.shape == (4, model.spec.max_condition, CONFIG.width)
    assert torch.equal(both.embeddings[:2], plain.embeddings)
    assert torch.equal(both.embeddings[2], both.embeddings[3])
    assert both.rotation.shape == (1, model.spec.max_condition + TOKENS, CONFIG.head_dim)


@torch.inference_mode()
def test_padding_has_no_influence() -> None:
    model = make()
    before = model(torch.tensor([word_ids(encode_prompt(SHORT))]), torch.zeros(1, TOKENS, dtype=torch.long))
    decoder = Decoder(model, load_policy("full"))
    made = decoder.generate([SHORT], guidance=1.6).tokens
    model.word_embedding.weight[0] = 30.0
    after = model(torch.tensor([word_ids(encode_prompt(SHORT))]), torch.zeros(1, TOKENS, dtype=torch.long))
    assert torch.equal(before, after)
    assert torch.equal(decoder.generate([SHORT], guidance=1.6).tokens, made)
    model.word_embedding.weight[encode_prompt(SHORT)[0]] = 30.0
    assert not torch.equal(
        model(torch.tensor([word_ids(encode_prompt(SHORT))]), torch.zeros(1, TOKENS, dtype=torch.long)),
        before,
    )


@pytest.mark.parametrize(
    ("prompt", "facts"),
    [
        ("a red cirkle", ["'cirkle'", "circle"]),
        ("a pink circle", ["'pink'"]),
        ("red circle", ["'red circle'", "expected a form"]),
        ("", ["expected a form"]),
        (7, ["prompt is 7", "text"]),
        (None, ["prompt is None", "text"]),
    ],
)
def test_a_prompt_outside_the_grammar_is_refused_in_one_line(
    model: Scenes, prompt: Any, facts: list[str]
) -> None:
    with pytest.raises(PromptError) as caught:
        Decoder(model, load_policy("full")).generate([SHORT, prompt])
    assert isinstance(caught.value, ArkvError)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


# Codes out


@pytest.mark.parametrize("guided", [False, True])
@torch.inference_mode()
def test_decoding_with_the_full_cache_is_the_training_pass(
    model: Scenes, tokens: torch.Tensor, guided: bool
) -> None:
    forced = Decoder(model, load_policy("full")).teacher_force([SHORT, LONG], tokens, 1.6 if guided else 1.0)
    prompts = [encode_prompt(SHORT), encode_prompt(LONG), *([[], []] if guided else [])]
    words = torch.tensor([word_ids(prompt) for prompt in prompts])
    expected = model.output(model(words, tokens.repeat(2, 1) if guided else tokens))
    assert forced.raw.shape == (len(prompts), TOKENS, CODES)
    torch.testing.assert_close(forced.raw, expected, atol=1e-4, rtol=1e-4)
    assert expected.std(1).mean() > 0.1, "nothing to compare"


def test_pictures_are_the_codebooks(model: Scenes, tokens: torch.Tensor) -> None:
    expected = Codebook(model.codes).decode(tokens)
    pictures = model.pixels(tokens)
    assert pictures.dtype == torch.uint8
    assert numpy.array_equal(pictures.numpy(), expected)


def test_generation_gives_pictures_line_by_line(model: Scenes) -> None:
    heights: list[int] = []

    def on_line(batch: range, line: int, images: list[Image.Image]) -> None:
        heights.extend(image.height for image in images)

    made = Decoder(model, load_policy("linear", ratio="1/6")).generate([SHORT], guidance=1, on_line=on_line)
    assert made.images[0].size == (SIDE, SIDE)
    assert heights == list(range(2, SIDE + 1, 2))
    assert made.stats.kv_bytes / made.stats.full_kv_bytes == pytest.approx((11 + 96 + 24) / (11 + 576))


def test_the_spec_is_that_of_the_network(model: Scenes) -> None:
    spec = model.spec
    assert (spec.layers, spec.heads, spec.kv_heads, spec.head_dim) == (2, 2, 1, 8)
    assert (spec.vocabulary, spec.guidance, spec.max_condition) == (CODES, 1.6, MAX_PROMPT_TOKENS + 1)
    assert (spec.grid.rows, spec.grid.columns, spec.grid.newline) == (GRID, GRID, False)
    assert len(model.blocks) == 2


def test_example_prompts_are_unseen_texts_of_all_groups(model: Scenes) -> None:
    texts = model.example_prompts(20, seed=3)
    assert texts == model.example_prompts(20, seed=3) != model.example_prompts(20, seed=4)
    assert [parse_prompt(text).group for text in texts] == [*GROUPS] * 4
    assert all(map(is_held_out, texts))


def test_the_verdict_is_the_judges(model: Scenes) -> None:
    picture = numpy.full((SIDE, SIDE, 3), 255, numpy.uint8)
    picture[10:22, 10:22] = (225, 20, 30)
    for text in ("a red square", "a red circle", "a blue square"):
        verdict = model.satisfies(text, torch.from_numpy(picture))
        assert verdict == judge(picture, text) == (text == "a red square")


# Checkpoints


@pytest.fixture
def saved(model: Scenes, tmp_path: Path) -> Path:
    export(model, tmp_path / "tiny.safetensors", {"pictures": 5})
    return tmp_path / "tiny.safetensors"


def test_what_the_trainer_writes_is_read_back(model: Scenes, saved: Path) -> None:
    assert {path.name for path in saved.parent.iterdir()} == {"tiny.safetensors", "tiny.json"}
    read = Scenes.from_pretrained(saved)
    assert read.spec == model.spec
    assert not read.training
    assert torch.equal(read.codes, model.codes)
    for name, weight in read.named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.get_parameter(name).bfloat16().float()), name
    before = Decoder(model, load_policy("full")).generate([SHORT], temperature=0).tokens
    assert torch.equal(Scenes.from_pretrained(str(saved)).pixels(before), model.pixels(before))


def test_only_the_weights_are_narrowed(model: Scenes, saved: Path) -> None:
    narrow = Scenes.from_pretrained(saved, dtype=torch.bfloat16)
    assert {weight.dtype for weight in narrow.parameters()} == {torch.bfloat16}
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.codes, model.codes)
    # bfloat16 has 256 numbers from 1 to 2: too few for the angles.
    condition = narrow.condition([SHORT], guided=False)
    assert condition.rotation.dtype == torch.float32
    assert torch.equal(condition.rotation, model.condition([SHORT], guided=False).rotation)
    made = Decoder(narrow, load_policy("full")).generate([SHORT])
    assert made.images[0].size == (SIDE, SIDE)
    assert made.stats.kv_bytes == 2 * (11 + 576) * 2 * 2 * 8 * 2


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Scenes.from_pretrained(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files_are_named(saved: Path) -> None:
    assert "absent.json" in refusal(saved.with_name("absent.safetensors"))
    saved.unlink()
    assert f"there is no checkpoint {saved}" in refusal(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    assert f"{saved} is damaged" in refusal(saved)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved: Path) -> None:
    weights = load_file(saved)
    weights["output.weight"] = torch.zeros(CODES + 1, 16)
    del weights["codes"]
    save_file(weights, saved)
    message = refusal(saved)
    assert f"output.weight has shape ({CODES + 1}, 16), the model wants ({CODES}, 16)" in message
    assert f"codes ({CODES}, 12) is missing" in message


def test_a_configuration_of_another_network_names_the_tensors(saved: Path) -> None:
    edit(saved, lambda facts: facts["config"].update(hidden=32))
    message = refusal(saved)
    assert "down.weight" in message
    assert "(16, 24)" in message
    assert "(16, 32)" in message


def edit(saved: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = saved.with_suffix(".json")
    facts = json.loads(path.read_text())
    change(facts)
    path.write_text(json.dumps(facts))


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.clear(),
        lambda facts: facts.pop("codes"),
        lambda facts: facts.update(codes="many"),
        lambda facts: facts.update(codes=-1),
        lambda facts: facts.update(guidance=None),
        lambda facts: facts.update(config=[]),
        lambda facts: facts["config"].pop("layers"),
        lambda facts: facts["config"].update(layers="6"),
        lambda facts: facts["config"].update(width=-16),
        lambda facts: facts["config"].update(depth=6),
    ],
)
def test_a_configuration_that_describes_no_network_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    edit(saved, change)
    assert re.search(r"tiny\.json does not describe a scenes model", refusal(saved))


def test_a_configuration_that_is_not_json_is_refused(saved: Path) -> None:
    saved.with_suffix(".json").write_text('{"config": ')
    assert "tiny.json is not JSON" in refusal(saved)


def test_a_profile_of_heads_is_for_the_weights_that_it_was_measured_on(tmp_path: Path) -> None:
    """Other weights have other heads: nobody takes the embedded ones' profile for theirs in silence."""
    assert Scenes.from_pretrained(device="meta").spec.head_profile is not None
    for suffix in (".safetensors", ".json"):
        (tmp_path / f"mine{suffix}").write_bytes(WEIGHTS.with_suffix(suffix).read_bytes())
    model = Scenes.from_pretrained(tmp_path / "mine.safetensors")
    assert model.spec.head_profile is None
    with pytest.raises(ArkvError, match="no profile comes with it: measure one with 'arkv profile"):
        Decoder(model, "ssd:ratio=1/6")
    Decoder(model, "front:ratio=1/6")
