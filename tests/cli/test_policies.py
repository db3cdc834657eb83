"""`arkv policies` and `arkv models`."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest
from saying import arkv_says

import arkv
from arkv import registry
from arkv.models.scenes.adapter import Scenes
from arkv.models.scenes.codebook import GRID


def test_policies_are_listed_with_source_and_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "policies")
    (line,) = (line for line in printed.splitlines() if line.startswith("linear "))
    for part in (f"arkv {arkv.__version__}", "arXiv 2512.04857", "ratio=None", "anchors=4"):
        assert part in line


def test_models_are_listed_with_their_shape(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "models")
    (line,) = (line for line in printed.splitlines() if line.startswith("scenes "))
    for part in (f"arkv {arkv.__version__}", f"{GRID} x {GRID}", f" {GRID**2} ", " M "):
        assert part in line


@pytest.mark.parametrize("broken", [OSError("no\nhub"), AttributeError("source"), ImportError("torch 1")])
def test_a_broken_plugin_hides_no_other(
    broken: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(EntryPoint):
        def load(self) -> None:
            raise broken

    class Asked(type(Scenes)):  # type: ignore[misc]
        def __getattribute__(cls, name: str) -> object:
            if name in ("source", "from_pretrained"):
                raise broken
            return super().__getattribute__(name)

    class AskedModel(Scenes, metaclass=Asked):
        """A model that cannot be built."""

    class AskedPolicy(type(arkv.load_policy("full")), metaclass=Asked):  # type: ignore[misc]
        """A policy that does not say where it is from."""

    class Lazy(EntryPoint):
        def load(self) -> object:
            return AskedModel if self.group == "arkv.models" else AskedPolicy

    real = registry.entry_points
    monkeypatch.setattr(
        registry,
        "entry_points",
        lambda group: [*real(group=group), Broken("bad", "bad:Bad", group), Lazy("late", "late:Late", group)],
    )
    told = " ".join(f"{type(broken).__name__}: {broken}".split())
    for command, good in (("policies", "linear"), ("models", "scenes")):
        lines = arkv_says(capsys, command).splitlines()
        assert any(line.startswith(f"{good} ") and "broken" not in line for line in lines)
        for name in ("bad", "late"):
            (line,) = (line for line in lines if line.startswith(f"{name} "))
            assert "broken: " in line
            assert told in line


def test_a_policy_without_a_source_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(type(arkv.load_policy("full")), "source", "")
    (line,) = (line for line in arkv_says(capsys, "policies").splitlines() if line.startswith("full "))
    assert line.split()[-2:] == ["-", "-"]


def test_a_policy_is_shown_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "policies", "linear")
    assert printed.startswith(f"linear, from arkv {arkv.__version__}\nsource: LineAR, arXiv 2512.04857\n")
    assert "Condition, anchors and recent lines are safe" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("scoring "))
    for part in ("'softmax' or 'raw'", "softmax", "ranks by attention"):
        assert part in line
    (line,) = (line for line in printed.splitlines() if line.startswith("ratio "))
    assert line.count("  ") >= 3, "what a base class says of it is there"


def test_every_policy_and_no_other_can_be_shown(capsys: pytest.CaptureFixture[str]) -> None:
    for entry in registry.names("policy"):
        assert entry.name in arkv_says(capsys, "policies", entry.name)
    assert "did you mean linear?" in arkv_says(capsys, "policies", "linar", status=1)


def test_a_model_is_shown_in_detail(capsys: pytest.CaptureFixture[str]) -> None:
    printed = arkv_says(capsys, "models", "scenes")
    for part in ("model:      scenes", f"{GRID} x {GRID}", "from_pretrained("):
        assert part in printed
    assert "did you mean scenes?" in arkv_says(capsys, "models", "scene", status=1)
