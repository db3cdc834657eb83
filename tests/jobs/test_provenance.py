"""What decides on a result: code, weights and files, and what does not."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from profiles import profile_of, saved
from tiny import Tiny

import arkv
from arkv.jobs import provenance
from arkv.jobs.provenance import changes, facts_of_class, facts_of_model, facts_of_policy, weights_digest
from arkv.policies.linear import LineAR
from arkv.policies.window import SlidingWindow, StreamingLLM

PLUGIN = '''
"""A plug-in."""
from dataclasses import dataclass
from arkv.policies.window import SlidingWindow

@dataclass(frozen=True, kw_only=True)
class Plugged(SlidingWindow):
    """Keeps the newest."""
    extra: int = 3
'''


def source_of(folder: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The digest of a plug-in whose file has this content."""
    folder.mkdir()
    (folder / "plugged.py").write_text(content)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "plugged", raising=False)
    return facts_of_class(__import__("plugged").Plugged)["source"]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("extra: int = 3", "extra: int = 3  # three of them", True),
        ("Keeps the newest.", "Keeps the newest tokens.", True),
        ("extra: int = 3", "extra: int = 4", False),
    ],
    ids=["comment", "docstring", "code"],
)
def test_code_counts_and_words_do_not(
    old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = source_of(tmp_path / "before", PLUGIN, monkeypatch)
    after = source_of(tmp_path / "after", PLUGIN.replace(old, new), monkeypatch)
    assert (before == after) == same


def test_a_class_answers_for_those_that_it_derives_from(monkeypatch: pytest.MonkeyPatch) -> None:
    before, other = facts_of_class(StreamingLLM), facts_of_class(LineAR)
    read = provenance._source

    def changed(module: str, classes: list[type]) -> str:
        return read(module, classes) + "more" * (module == SlidingWindow.__module__)

    monkeypatch.setattr(provenance, "_source", changed)
    assert facts_of_class(StreamingLLM)["source"] != before["source"]
    assert facts_of_class(LineAR) == other


PACKAGE = {
    "__init__.py": "",
    "policy.py": "from arkv.policies.window import SlidingWindow\nfrom theirs.mixin import Scoring\n"
    "class Plugged(Scoring, SlidingWindow):\n    pass\n",
    "mixin.py": "from theirs.helper import SIGN\nclass Scoring:\n    sign = SIGN\n",
    "helper.py": "SIGN = 1\n",
}


@pytest.mark.parametrize(
    ("file", "old", "new", "same"),
    [
        ("mixin.py", "sign = SIGN", "sign = -SIGN", False),
        ("helper.py", "SIGN = 1", "SIGN = 2", False),
        ("helper.py", "SIGN = 1", "SIGN = 1  # up", True),
    ],
    ids=["mixin", "helper", "comment"],
)
def test_what_lies_beside_a_class_in_its_package_counts(
    file: str, old: str, new: str, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for content in (PACKAGE, PACKAGE | {file: PACKAGE[file].replace(old, new)}):
        folder = tmp_path / str(len(found)) / "theirs"
        folder.mkdir(parents=True)
        for name, text in content.items():
            (folder / name).write_text(text)
        with monkeypatch.context() as patch:
            patch.syspath_prepend(folder.parent)
            for module in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
                patch.delitem(sys.modules, module)
            found.append(facts_of_class(importlib.import_module("theirs.policy").Plugged)["source"])
    for module in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:
        del sys.modules[module]
    assert (found[0] == found[1]) == same


@dataclass(frozen=True, kw_only=True)
class Unregistered(SlidingWindow):
    """Of nobody's package."""


def test_the_package_is_that_which_registered_the_class() -> None:
    assert facts_of_class(LineAR)["package"] == f"arkv {arkv.__version__}"
    assert facts_of_class(Unregistered)["package"] == "unregistered"


def test_policies_within_a_policy_count_and_parameters_do_not() -> None:
    spec = Tiny().spec
    of_linear, of_window = (
        facts_of_policy(arkv.load_policy("pyramid", budget=9, of=of), spec) for of in ("linear", "window")
    )
    assert of_linear["LineAR"] == facts_of_policy(arkv.load_policy("linear", budget=3), spec)
    assert "LineAR" not in of_window


def test_a_profile_that_is_measured_anew_counts(tmp_path: Path) -> None:
    spec = Tiny().spec
    path = tmp_path / "heads.json"
    found = []
    for shares in ([[0.1, 0.9]] * 2, [[0.1, 0.8]] * 2):
        policy = arkv.load_policy("ssd", budget=9, profile=saved(profile_of(spec, shares), path))
        found.append(facts_of_policy(policy, spec))
    assert found[0]["source"] == found[1]["source"]
    assert changes(*found)[0].startswith("files heads.json was ")


def test_weights_count_to_the_last_bit() -> None:
    model, other = Tiny(), Tiny()
    assert facts_of_model(model) == facts_of_model(other)
    with torch.no_grad():
        other.codes.weight[3, 2] += 1e-6
    assert weights_digest(model) != weights_digest(other)
    assert weights_digest(model) != weights_digest(Tiny().bfloat16())


def test_changes_are_told_in_words() -> None:
    there = {"policy": {"package": "fading 0.1", "source": "a"}, "prompts": "x"}
    assert changes(there, there) == []
    here = {"policy": {"package": "fading 0.2", "source": "a"}, "prompts": "y"}
    assert changes(there, here) == [
        "policy package was fading 0.1 and is fading 0.2",
        "prompts was x and is y",
    ]
    assert changes(None, here) == ["it does not say whose code made it"]
