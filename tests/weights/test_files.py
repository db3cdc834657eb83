"""Files that are not what they are called, or have more in them than tensors: told, and read where safe."""

from __future__ import annotations

import json
import os
from collections import OrderedDict, defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arkv.errors import CheckpointError
from arkv.weights.checkpoint import WeightSlot, load_weights_
from arkv.weights.files import exists, is_file, place, read_config, weight_files
from arkv.weights.hub import fetch
from arkv.weights.torch_files import read_tensors

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265\n"


class Callback:
    """What a training program keeps."""

    def __init__(self) -> None:
        self.best, self.seen = 0.5, {1, 2}


class Attributes(dict):  # type: ignore[type-arg]
    """A dictionary of somebody's own."""


class History(list):  # type: ignore[type-arg]
    """A list of somebody's own."""


def refusal(call: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


BESIDE: dict[str, Any] = {
    "numpy scalar": numpy.float64(0.25),
    "numpy array": numpy.arange(3),
    "path": Path("runs/1"),
    "defaultdict": defaultdict(list, {"loss": [1.0, 2.0]}),
    "callback": Callback(),
    "function": refusal,
    "partial": partial(refusal, 3),
    "dictionary of a class": Attributes(lr=0.1),
    "list of a class": History([1.0, 2.0]),
    "several": [numpy.int64(3), Path("x"), Callback(), defaultdict(dict)],
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_what_lies_beside_tensors_is_named_and_the_tensors_are_read(
    tmp_path: Path, beside: str, zipped: bool, recwarn: pytest.WarningsRecorder
) -> None:
    path, wanted = tmp_path / "x.pt", torch.arange(6.0).view(2, 3)
    content = {"model": {"weight": wanted}, "extra": BESIDE[beside]}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    target = torch.zeros(2, 3)
    load_weights_({"weight": WeightSlot(target)}, [path])
    assert torch.equal(target, wanted)
    told = [str(warning.message) for warning in recwarn if "beside its tensors" in str(warning.message)]
    assert told
    if beside == "callback":
        assert "Callback" in told[0]


def test_tensors_in_a_dictionary_of_a_class_are_read(tmp_path: Path) -> None:
    for content in (defaultdict(list, {"weight": torch.ones(2)}), Attributes(weight=torch.ones(2))):
        torch.save(content, tmp_path / "x.pt")
        with pytest.warns(UserWarning, match="beside"):
            assert read_tensors(tmp_path / "x.pt")["weight"].tolist() == [1, 1]


class Runs:
    """Would run something when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


@pytest.mark.parametrize("function", [eval, exec, print, os.system, __import__, getattr, open])
def test_a_file_that_would_run_something_is_refused(tmp_path: Path, function: Any) -> None:
    for content in (Runs(function, "x"), {"weight": torch.ones(2), "more": [Path("x"), Runs(function, "x")]}):
        torch.save(content, tmp_path / "x.pt")
        assert "reading it would run" in refusal(lambda: read_tensors(tmp_path / "x.pt"))


def test_a_whole_module_is_told_from_its_weights(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(2, 2)), tmp_path / "x.pt")
    told = refusal(lambda: read_tensors(tmp_path / "x.pt"))
    assert "holds a whole torch.nn.modules.container.Sequential" in told
    assert "state_dict()" in told


def test_averaged_weights_beside_the_model_are_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": {"weight": torch.zeros(2)}, "ema": {"weight": torch.ones(2)}}, path)
    with pytest.warns(UserWarning, match="averaged weights, 'ema', beside 'model', which is what is read"):
        assert read_tensors(path)["weight"].tolist() == [0, 0]
    torch.save({"ema": {"weight": torch.ones(2)}}, path)
    assert "averaged weights only" in refusal(lambda: read_tensors(path))


def test_a_pointer_or_a_page_in_place_of_a_file_is_told(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt", "x.bin"):
        for content, said in ((POINTER, "git lfs pull"), ("<!DOCTYPE html><p>", "web page"), ("", "empty")):
            (tmp_path / name).write_text(content)
            path = tmp_path / name
            told = refusal(lambda path=path: load_weights_({"w": WeightSlot(torch.zeros(1))}, [path]))
            assert said in told
            assert str(path) in told
    (tmp_path / "config.json").write_text(POINTER)
    assert "git lfs pull" in refusal(lambda: read_config(tmp_path / "config.json"))


def test_a_folder_of_the_hubs_cache_is_told(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--some--model"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    told = refusal(lambda: fetch(repository, ("x",)))
    assert str(repository / "snapshots" / "abc") in told
    assert "some/model" in told
    for folder in (tmp_path, tmp_path / "hub"):
        assert "is the hub's cache" in refusal(lambda folder=folder: fetch(folder, ("x",)))
    assert fetch(repository / "snapshots" / "abc", ("x",)).name == "abc"


@pytest.mark.parametrize("name", ["../precious.bin", "/etc/passwd", "a/../../b", "", "..\\x.bin"])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert "does not lie in its folder" in refusal(lambda: weight_files(tmp_path))


def test_a_tensor_in_two_files_is_told(tmp_path: Path) -> None:
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for number, path in enumerate(files):
        save_file({"weight": torch.full((2,), float(number))}, path)
    slots = {"weight": WeightSlot(torch.zeros(2))}
    assert "has weight in two files" in refusal(lambda: load_weights_(slots, files))


def test_no_permission_anywhere_below_a_path_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Any, *_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("arkv.weights.files.os.stat", denied)
    for call in (is_file, exists, weight_files, lambda path: fetch(path, ("x",))):
        assert "Permission denied" in refusal(lambda call=call: call(tmp_path))  # type: ignore[operator]
    monkeypatch.undo()
    save_file({"w": torch.ones(1)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(Path, "open", denied)
    slots = {"w": WeightSlot(torch.zeros(1))}
    told = refusal(lambda: load_weights_(slots, [tmp_path / "x.safetensors"]))
    assert "Permission denied" in told
    assert "damaged" not in told


def test_a_path_is_a_path_wherever_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert place("~/x.json") == place(Path("~/x.json")) == tmp_path / "x.json"
    assert read_config(Path("~/x.json")) == {"a": 1}
    assert fetch("~", ("x",)) == tmp_path
    assert "is no path" in refusal(lambda: place(3))  # type: ignore[arg-type]
    assert not exists(Path("a\0b"))
    assert not exists(Path("x" * 5000))


def test_a_configuration_that_is_nested_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert "is not JSON" in refusal(lambda: read_config(tmp_path / "config.json"))


def test_an_ordered_dictionary_is_what_it_always_was(tmp_path: Path) -> None:
    torch.save(OrderedDict(weight=nn.Parameter(torch.ones(2))), tmp_path / "x.pt")
    assert read_tensors(tmp_path / "x.pt")["weight"].tolist() == [1, 1]
