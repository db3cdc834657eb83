"""Checkpoints by name, path or hub id; the hub itself is only ever a cache without a connection."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arkv import ArkvError, Decoder, load_model, load_policy, registry
from arkv.errors import CheckpointError, UnknownNameError
from arkv.models import janus
from arkv.models.janus import JanusPro
from arkv.models.janus_checkpoint import JanusVariant
from arkv.models.llamagen import LlamaGen
from arkv.models.llamagen_checkpoint import CLASSES_REPOSITORY, Classes, LlamaGenVariant
from arkv.models.pretrained import CHOICES
from arkv.models.scenes.adapter import Scenes
from arkv.models.transformer import TransformerConfig
from arkv.models.vq import VQConfig
from arkv.weights import hub
from arkv.weights.hub import fetch, is_hub_id

VQ = VQConfig(codes=32, code_dim=8, latent=32, channels=32, multipliers=(1,), blocks=1)
SHAPE = TransformerConfig(2, 32, 2, 2, 16, 48, norm_eps=1e-5)


class Narrow(LlamaGen):
    """A LlamaGen small enough for tests."""

    variant = LlamaGenVariant("narrow", "c2i_N_64.pt", SHAPE, 4, Classes(5), top_k=0, vq=VQ)


class Wide(LlamaGen):
    """Another one."""

    variant = LlamaGenVariant("wide", "c2i_W_64.pt", SHAPE, 6, Classes(5), top_k=0, vq=VQ)


class Talk(JanusPro):
    """A Janus-Pro small enough for tests."""

    variant = JanusVariant("talk", "nobody/talk", SHAPE, vocabulary=40, side=4, vq=VQ)


MODELS = {"narrow": Narrow, "wide": Wide, "talk": Talk, "scenes": Scenes}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Point(EntryPoint):
        def load(self) -> Any:
            if self.name == "broken":
                raise ImportError("no such package")
            return MODELS[self.name]

    points = {
        "arkv.models": [Point(name, "anywhere:Model", "arkv.models") for name in [*MODELS, "broken"]],
        "arkv.policies": [EntryPoint("full", "arkv.policies.full:FullCache", "arkv.policies")],
    }
    monkeypatch.setattr(registry, "entry_points", lambda group: points[group])


def write_narrow(folder: Path) -> None:
    torch.manual_seed(0)
    model = Narrow(Narrow.variant)
    weights = {name: torch.randn(slot.wanted) for name, slot in model.weight_slots().items()}
    torch.save({"model": weights}, folder / Narrow.variant.file)
    decoder = model.vq.weight_slots("llamagen")
    torch.save({"model": {n: torch.randn(s.wanted) for n, s in decoder.items()}}, folder / "vq_ds16_c2i.pt")


def test_a_model_is_recognised_by_what_is_in_a_file_or_folder(tmp_path: Path) -> None:
    write_narrow(tmp_path)
    for source in (tmp_path, str(tmp_path), tmp_path / Narrow.variant.file):
        model = load_model(source)
        assert type(model) is Narrow
        assert model.dtype == torch.float32
    assert torch.equal(load_model("narrow", source=tmp_path).codes.weight, model.codes.weight)  # type: ignore[union-attr]
    assert load_model(tmp_path, dtype="bfloat16").dtype == torch.bfloat16


def test_a_folder_of_several_models_asks_for_a_name(tmp_path: Path) -> None:
    write_narrow(tmp_path)
    (tmp_path / Wide.variant.file).touch()
    with pytest.raises(CheckpointError, match=r"may be any of narrow, wide: name it, as in load_model\("):
        load_model(tmp_path)
    assert type(load_model("narrow", source=tmp_path)) is Narrow


def test_what_nobody_recognises_is_one_line(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
        for source in (tmp_path, tmp_path / name):
            with pytest.raises(CheckpointError, match="is recognised by no registered model") as caught:
                load_model(source)
            assert "\n" not in str(caught.value)
    with pytest.raises(UnknownNameError, match="unknown model 'narow'; did you mean narrow"):
        load_model("narow")


def test_an_option_that_a_model_does_not_take_is_explained() -> None:
    with pytest.raises(UnknownNameError, match="option of the model narrow 'sauce'; did you mean source"):
        load_model("narrow", sauce="x")
    with pytest.raises(CheckpointError, match="there is no file or folder '/nowhere'"):
        load_model("narrow", source="/nowhere")


@pytest.mark.parametrize("name", ["narrow", "talk"])
def test_random_weights_need_no_files_and_depend_on_the_seed(name: str) -> None:
    model = load_model(name, random_weights=True, seed=3)
    again, other = (load_model(name, random_weights=True, seed=seed) for seed in (3, 4))
    parameters = dict(model.named_parameters())
    assert all(torch.equal(value, parameters[key]) for key, value in again.named_parameters())
    assert not all(torch.equal(value, parameters[key]) for key, value in other.named_parameters())
    assert not model.training
    result = Decoder(model, load_policy("full")).generate(model.example_prompts(2, 0))
    assert result.tokens.unique().numel() > 4, "the logits tell tokens apart"
    assert load_model(name, random_weights=True, dtype="bfloat16").dtype == torch.bfloat16
    assert load_model(name, random_weights=True, device="meta").device.type == "meta"


def test_what_is_no_weight_cannot_be_drawn() -> None:
    with pytest.raises(ArkvError, match=r"scenes has tables beside its weights \(codes\)"):
        load_model("scenes", random_weights=True)


@pytest.mark.parametrize(
    ("source", "hub"),
    [
        ("deepseek-ai/Janus-Pro-1B", True),
        ("a/b", True),
        ("janus-pro-1b", False),
        ("a/b/c", False),
        ("/a/b", False),
        ("./b", False),
        ("~/b", False),
        ("", False),
        (Path("a/b"), False),
    ],
)
def test_what_looks_like_a_repository(source: str | Path, hub: bool) -> None:
    assert is_hub_id(source) == hub


def test_a_path_wins_over_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id("a/b")
    assert fetch("a/b", ("x",)) == Path("a/b")


PROGRAM = """
import json, sys
from arkv.errors import CheckpointError
from arkv.weights.hub import fetch

assert "huggingface_hub" not in sys.modules, "nothing of the hub at import"
def tried(*arguments, **options):
    try:
        return fetch(*arguments, **options).name
    except CheckpointError as error:
        return str(error)

print(json.dumps([
    tried("some/model", ("config.json",)),
    tried("some/model", ("config.json", "model*.safetensors"), ("config.json", "*.bin")),
    tried("some/model", ("config.json",), revision="v2"),
    tried("some/model", ("config.json",), revision="v3"),
    tried("other/model", ("config.json",)),
]))
"""


def test_the_cache_and_the_offline_variable_of_the_hub_are_respected(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "pytorch_model.bin").touch()
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    environment = {key: value for key, value in environment.items() if key != "HF_HUB_CACHE"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    main, fallback, second, absent, other = json.loads(ran.stdout)
    assert main == fallback == "a" * 40
    assert second == "b" * 40
    for message, name in ((absent, "some/model"), (other, "other/model")):
        assert message.startswith(f"there is no folder '{name}', and it cannot be had from the hub: ")
        assert "\n" not in message


@pytest.mark.parametrize("kind", ["nobody answers", "no such name"])
def test_without_a_connection_it_is_refused_within_seconds_and_the_cache_is_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    def connect(*_: Any) -> None:
        if kind == "nobody answers":
            time.sleep(60)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", connect)
    monkeypatch.setattr(hub, "PATIENCE", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(CheckpointError, match=r"no connection to \S+ \(.*\), and .*; connect, or download"):
        fetch("nobody/none", ("config.json",))
    assert time.monotonic() - begun < 3
    repository = tmp_path / "models--some--model"
    (repository / "snapshots" / "c").mkdir(parents=True)
    (repository / "snapshots" / "c" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c")
    assert fetch("some/model", ("config.json",)).name == "c"


def test_only_the_files_that_are_needed_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def snapshot(repository: str, **options: Any) -> str:
        asked.append((repository, options))
        if any("bin" in pattern for pattern in options["allow_patterns"]):
            (tmp_path / "pytorch_model.bin").touch()
        (tmp_path / "config.json").touch()
        (tmp_path / "tokenizer.json").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    got = fetch("some/model", *CHOICES, revision="r", token="t")
    assert got == tmp_path
    assert [repository for repository, _ in asked] == ["some/model"] * 2, "safetensors first"
    assert all(options["revision"] == "r" and options["token"] == "t" for _, options in asked)
    asked.clear()
    write_narrow(tmp_path)
    load_model("narrow")
    ((repository, options),) = asked
    assert repository == CLASSES_REPOSITORY
    assert options["allow_patterns"] == ["c2i_N_64.pt", "vq_ds16_c2i.pt"]


def test_a_repository_is_recognised_by_its_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(repository: str, **options: Any) -> str:
        if repository == "nobody/empty":
            raise OSError("no\nconnection")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    (tmp_path / "config.json").write_text('{"model_type": "janus"}')
    monkeypatch.setattr(janus, "read_variant", lambda *_: (Talk.variant, "transformers"))
    read: list[Any] = []

    def from_pretrained(cls: type[Talk], source: str, **_: Any) -> torch.nn.Module:
        read.append(source)
        return torch.nn.Module()

    monkeypatch.setattr(Talk, "from_pretrained", classmethod(from_pretrained))
    load_model("someone/finetuned")
    load_model("nobody/talk")
    assert read == ["someone/finetuned", "nobody/talk"]
    with pytest.raises(CheckpointError, match="no connection"):
        load_model("nobody/empty")


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    from arkv.weights.files import weight_files

    torch.save({}, tmp_path / "pytorch_model.bin")
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
