"""The flags that say which model to load: where they go, and what is told of those that do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from saying import arkv_says

from arkv import registry
from arkv.models.llamagen import LlamaGenB256
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import PATCH_VALUES, Codebook
from arkv.models.transformer import TransformerConfig

Asked = list[tuple[str, dict[str, object]]]
PROMPT = ("--prompt", "three red circles")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """What is asked of `load_model`, in order; it gives a tiny model with the prompts of `scenes`."""
    config = TransformerConfig(layers=1, width=16, heads=1, kv_heads=1, head_dim=16, hidden=16)
    model = Scenes(Codebook(torch.rand(8, PATCH_VALUES)), config).eval()
    found: Asked = []

    def load(name: str, **options: object) -> Scenes:
        found.append((name, options))
        return model

    monkeypatch.setattr(registry, "load_model", load)
    return found


FLAGS = [
    *("--source", "my/finetuned", "--revision", "v2", "--size", "1024x576", "--decoder", "vq.pt"),
    *("--vqgan", "vqgan.ckpt", "--text-encoder", "t5", "--tokenizer", "words"),
    *("--negative-prompt", "", "--suffix", ", painted", "--random-weights"),
    *("--weights", "int4", "--lora", "my/adapter"),
]
OPTIONS = {
    "source": "my/finetuned",
    "revision": "v2",
    "size": (1024, 576),
    "decoder": "vq.pt",
    "vqgan": "vqgan.ckpt",
    "text_encoder": "t5",
    "tokenizer": "words",
    "negative_prompt": "",
    "suffix": ", painted",
    "random_weights": True,
    "weights": "int4",
    "lora": "my/adapter",
}


def test_every_flag_reaches_the_model_under_its_name(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "picture.png"
    arkv_says(capsys, "generate", "--quiet", *PROMPT, "--out", out, *FLAGS)
    assert asked == [("scenes", {**OPTIONS, "dtype": None, "device": "cpu"})]
    assert json.loads(Image.open(out).text["loading"]) == {**OPTIONS, "size": [1024, 576]}


@pytest.mark.parametrize(
    "command",
    [
        ["eval", "--policies", "full", "--prompts", "1", "--forced-prompts", "0", "--out", "out.jsonl"],
        ["profile", "--prompts", "1", "--out", "heads.json"],
        ["inspect", *PROMPT, "--layers", "0", "--out", "inspect.png"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_takes_them(
    command: list[str],
    asked: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arkv_says(capsys, *command, "--quiet", *FLAGS)
    assert asked == [("scenes", {**OPTIONS, "dtype": None, "device": "cpu"})]


def test_flags_that_are_not_given_are_left_to_the_model(
    asked: Asked, capsys: pytest.CaptureFixture[str]
) -> None:
    arkv_says(capsys, "estimate")
    arkv_says(capsys, "estimate", "--source", "weights", "--size", "768X512", "--dtype", "bfloat16")
    assert asked == [
        ("scenes", {"dtype": "float32", "device": "meta"}),
        ("scenes", {"dtype": "bfloat16", "device": "meta", "source": "weights", "size": (768, 512)}),
    ]


def test_results_of_other_weights_do_not_join_a_file(
    asked: Asked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.jsonl"
    flags = ["--policies", "full", "--prompts", "1", "--forced-prompts", "0", "--out", out, "--quiet"]
    arkv_says(capsys, "eval", *flags, "--random-weights")
    complaint = arkv_says(capsys, "eval", *flags, status=1)
    assert 'loading is {"random_weights": true} there and null here' in complaint


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--vqgan", "vqgan.ckpt"], "unknown option of the model scenes 'vqgan'"),
        (["--model", "janus-pro-1b", "--size", "512x512"], "unknown option of the model janus-pro-1b 'size'"),
        (["--model", "lumina-mgpt-7b-768", "--size", "100x100"], "trained for sizes (width, height) such as"),
        (["--model", "no/where", "--source", "some/where"], "--model is no/where, a place itself"),
        (["--model", "."], "is recognised by no registered model"),
    ],
)
def test_a_flag_that_a_model_does_not_take_is_one_line(
    flags: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["generate", *PROMPT, "--random-weights", "--out", "picture.png"]
    assert complaint in arkv_says(capsys, *usual, *flags, status=1)
    assert not list(tmp_path.iterdir())


def test_a_size_decides_on_the_estimate(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("estimate", "--model", "lumina-mgpt-7b-768", "--condition", "64")
    # 48 lines of 49 tokens, and 36 of 65; both with 64 of the condition, two rows, 32 layers of width 4096.
    for more, tokens in ((), 48 * 49), (("--size", "1024x576"), 36 * 65):
        printed = arkv_says(capsys, *flags, *more)
        (line,) = (line for line in printed.splitlines() if line.startswith("(full cache)"))
        assert int(line.split()[-1].replace(",", "")) == (tokens + 64) * 2 * 32 * 2 * 4096 * 4


def test_a_path_or_a_repository_is_recognised_by_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c2i_B_256.pt").touch()
    flags = ("estimate", "--policy", "window", "--ratio", "1/4", "--model")
    named = arkv_says(capsys, *flags, "llamagen-b-256")
    assert arkv_says(capsys, *flags, tmp_path) == named.replace("llamagen-b-256", str(tmp_path))
    hub, real = "somebody/finetuned", LlamaGenB256.from_pretrained

    def load(*, source: str, dtype: torch.dtype, device: torch.device) -> LlamaGenB256:
        assert source == hub
        return real(dtype=dtype, device=device)

    monkeypatch.setattr(LlamaGenB256, "recognises", lambda source: source == hub)
    monkeypatch.setattr(LlamaGenB256, "from_pretrained", load)
    assert arkv_says(capsys, *flags, hub) == named.replace("llamagen-b-256", hub)
