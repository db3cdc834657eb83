from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import Tiny

import arkv
from arkv import ArkvError, CachePolicy, load_model, load_policy, registry
from arkv.errors import BudgetError, CheckpointError, UnknownNameError
from arkv.options import split_commas
from arkv.policies.full import FullCache
from arkv.policies.linear import LineAR
from arkv.registry import load_class, names
from arkv.store import CachePlan

if TYPE_CHECKING:
    from package_for_type_checkers_only import Strange


def test_the_built_in_ones_are_registered_like_any_other() -> None:
    assert {"full", "linear", "random", "window"} <= {entry.name for entry in names("policy")}
    assert "scenes" in {entry.name for entry in names("model")}
    listed = [entry.name for entry in names("policy")]
    assert listed == sorted(listed)
    assert all("arkv" in entry.origin for entry in names("policy") if entry.name == "full")


@pytest.mark.parametrize("entry", names("policy"), ids=lambda entry: entry.name)
def test_whatever_is_registered_loads_and_says_where_it_is_from(entry: registry.Entry) -> None:
    policy_class = load_class("policy", entry.name)
    assert issubclass(policy_class, CachePolicy)
    assert policy_class.source
    assert policy_class.__doc__


def test_parameters_come_by_keyword_or_behind_a_colon() -> None:
    expected = LineAR(ratio="1/6", anchors=24, recent=48)
    assert load_policy("linear", ratio="1/6", anchors=24, recent=48) == expected
    assert load_policy("linear:anchors=24,recent=48,ratio=1/6") == expected
    assert load_policy("linear: anchors = 24, recent = 48", ratio="1/6") == expected
    assert load_policy("linear:anchors=1,recent=48", ratio="1/6", anchors=24) == expected
    assert load_policy("linear:ratio=0.25,recent=None") == LineAR(ratio=0.25)
    assert load_policy("linear:,budget=3,") == LineAR(budget=3)


@pytest.mark.parametrize("word", ["true", "True"])
def test_truth_is_said_as_python_or_as_json_says_it(word: str) -> None:
    assert load_policy(f"tova:mean_heads={word}") == load_policy("tova", mean_heads=True)


@pytest.mark.parametrize(
    ("name", "parameters", "facts"),
    [
        ("linar", {}, ["unknown policy 'linar'", "linear"]),
        ("qqq", {}, ["unknown policy 'qqq'", "full", "linear", "random", "window"]),
        ("", {}, ["unknown policy ''"]),
        ("linear", {"anchor": 3}, ["linear", "'anchor'", "anchors"]),
        ("linear:zzz=3", {}, ["linear", "'zzz'", "anchors, budget, period, ratio, recent"]),
        ("linear", {"anchors": "many"}, ["linear", "anchors", "'many'", "a whole number"]),
        ("linear", {"anchors": 2.5}, ["anchors", "2.5", "a whole number"]),
        ("linear", {"anchors": True}, ["anchors", "true", "a whole number"]),
        ("linear:anchors=1/2", {}, ["anchors", "'1/2'", "a whole number"]),
        ("window", {"sinks": None}, ["sinks", "nothing", "a whole number"]),
        ("window:ratio=True", {}, ["ratio", "true"]),
        ("full", {"budget": 3}, ["full", "no parameters", "budget"]),
        ("window:sinks", {}, ["'sinks'", "parameter=value"]),
        ("window:=4", {}, ["'=4'", "parameter=value"]),
        ("window:sinks=-1", {"budget": 4}, ["sinks", "-1"]),
        ("linear:recent=-1", {"budget": 4}, ["recent", "-1"]),
        ("window:ratio={[]:1}", {}, ["ratio"]),
    ],
)
def test_a_wrong_name_or_parameter_is_explained_in_one_line(
    name: str, parameters: dict[str, Any], facts: list[str]
) -> None:
    with pytest.raises(ArkvError) as caught:
        load_policy(name, **parameters).plan(arkv.Grid(24, 24), Tiny().spec)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


@given(st.text(max_size=30) | st.from_regex(r"[a-z]+=[^\s]{0,12}(,[a-z]+=.{0,5})*", fullmatch=True))
def test_any_text_behind_the_colon_is_read_or_refused(text: str) -> None:
    try:
        read = load_policy(f"window:{text}").source
    except ArkvError as error:
        read = str(error)
    assert len(read.splitlines()) == 1


def test_deep_nesting_is_no_way_to_crash_the_parser() -> None:
    with pytest.raises(ArkvError, match="sinks"):
        load_policy("window:sinks=" + "(" * 5000)


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        ({"name": "scene"}, ["unknown model 'scene'", "scenes"]),
        ({"name": "scenes", "dtype": "float31"}, ["unknown dtype 'float31'", "float32"]),
        ({"name": "scenes", "dtype": "int64"}, ["unknown dtype 'int64'"]),
        ({"name": "scenes", "device": "abacus"}, ["unknown device 'abacus'"]),
    ],
)
def test_a_model_that_cannot_be_had_is_explained_in_one_line(
    arguments: dict[str, Any], facts: list[str]
) -> None:
    with pytest.raises(ArkvError) as caught:
        load_model(**arguments)
    assert "\n" not in str(caught.value)
    assert all(fact in str(caught.value) for fact in facts)


def test_a_missing_device_is_said_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arkv.models.scenes.adapter.Scenes.from_pretrained", None)
    with pytest.raises(ArkvError, match=r"'cuda:99'.*no such device.*'cpu'"):
        load_model("scenes", device="cuda:99")


def test_a_plugin_that_fails_to_import_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint("broken", "package_that_is_not_there:Policy", "arkv.policies")
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    with pytest.raises(ArkvError, match=r"'broken'.*cannot be imported.*package_that_is_not_there") as caught:
        load_policy("broken")
    assert not isinstance(caught.value, UnknownNameError)
    assert [entry.name for entry in names("policy")] == ["broken"]


class Origin:
    """A distribution by its name."""

    def __init__(self, name: str) -> None:
        self.name, self.version = name, "1.0"


class Point(EntryPoint):
    """An entry point of some distribution, which gives what it was told to, or raises it."""

    def __new__(cls, name: str, gives: Any, origin: str = "somebody") -> Point:
        return super().__new__(cls)

    def __init__(self, name: str, gives: Any, origin: str = "somebody") -> None:
        super().__init__(name, f"{origin}.module:Thing", "any")
        vars(self).update(gives=gives, dist=Origin(origin))

    def load(self) -> Any:
        gives = vars(self)["gives"]
        if isinstance(gives, BaseException):
            raise gives
        return gives


def register(monkeypatch: pytest.MonkeyPatch, *points: Point) -> None:
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


@pytest.mark.parametrize("gives", [SystemExit(0), RuntimeError("x"), SyntaxError("y"), GeneratorExit()])
def test_a_plugin_that_ends_the_process_at_import_is_an_error_of_its_own(
    gives: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, Point("bad", gives), Point("full", FullCache, "arkv"))
    with pytest.raises(ArkvError, match=f"'bad' of somebody 1.0 cannot be imported: {type(gives).__name__}"):
        load_policy("bad")
    assert load_policy("full") == FullCache()
    assert [entry.name for entry in names("policy")] == ["bad", "full"]


def test_whoever_interrupts_an_import_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch, Point("slow", KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        load_policy("slow")


def test_a_plugin_by_a_name_that_is_taken_is_told_and_does_not_win(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Point("linear", LineAR, "arkv"), Point("linear", FullCache, "aaa")
    for points in ((ours, theirs), (theirs, ours)):
        register(monkeypatch, *points)
        with pytest.warns(
            UserWarning, match=r"'linear' is registered by arkv 1.0, which is used, and by aaa 1.0"
        ):
            assert load_class("policy", "linear") is LineAR
        with pytest.warns(UserWarning, match="given another name"):
            assert [entry.origin for entry in names("policy")] == ["arkv 1.0"]
    register(monkeypatch, Point("x", LineAR, "b"), Point("x", FullCache, "a"))
    with pytest.warns(UserWarning, match="registered by a 1.0, which is used, and by b 1.0"):
        assert load_class("policy", "x") is FullCache


def test_a_plugin_that_cannot_say_what_is_its_own_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    class Right(Tiny):
        @classmethod
        def recognises(cls, source: Any) -> bool:
            return True

        @classmethod
        def from_pretrained(cls, source: Any, **_: Any) -> Any:
            return cls()

    def raising(error: BaseException) -> Any:
        class Wrong(Tiny):
            @classmethod
            def recognises(cls, source: Any) -> bool:
                raise error

        return Wrong

    for error in (RuntimeError("oops"), SystemExit(1), KeyError("x"), RecursionError(), OSError(13, "no")):
        register(monkeypatch, Point("a", raising(error)), Point("right", Right), Point("z", SystemExit(0)))
        with pytest.warns(UserWarning, match="the model 'a' cannot say whether"):
            assert type(load_model(tmp_path)) is Right

    class Hanging(Tiny):
        @classmethod
        def recognises(cls, source: Any) -> bool:
            time.sleep(30)
            return True

    monkeypatch.setattr(registry, "PATIENCE", 0.2)
    register(monkeypatch, Point("a", Hanging), Point("right", Right))
    with pytest.warns(UserWarning, match="cannot say whether .*: TimeoutError: it is not done after 0.2 s"):
        assert type(load_model(tmp_path)) is Right
    register(monkeypatch, Point("a", raising(CheckpointError("it is cut short"))))
    with pytest.raises(CheckpointError, match="^it is cut short$"):
        load_model(tmp_path)


def test_a_file_that_a_model_cannot_open_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Locked(Tiny):
        @classmethod
        def from_pretrained(cls, **_: Any) -> Any:
            raise PermissionError(13, "Permission denied", "/models/x/y.bin")

    register(monkeypatch, Point("locked", Locked))
    with pytest.raises(CheckpointError, match="^cannot read /models/x/y.bin: Permission denied$"):
        load_model("locked")


@pytest.mark.parametrize(
    "number", [numpy.int64(24), torch.tensor(24), numpy.array(24), torch.tensor([24])[0]]
)
def test_numbers_of_numpy_and_torch_are_parameters(number: Any) -> None:
    policy = load_policy("linear", anchors=number, ratio=numpy.float32(0.25))
    assert policy == LineAR(anchors=24, ratio=0.25)
    assert type(policy.anchors) is int
    assert CachePlan(numpy.int64(4), torch.tensor(2)) == CachePlan(4, 2)


@pytest.mark.parametrize("budget", [10**30, -(10**30), 2**31, 0, 1.5, "4", None, float("nan"), (10**30,)])
def test_a_budget_that_no_tensor_can_count_is_refused(budget: Any) -> None:
    with pytest.raises(BudgetError, match="a plan with a budget") as caught:
        CachePlan(budget, 1)
    assert len(str(caught.value)) < 200
    with pytest.raises(BudgetError, match="a plan with a period"):
        CachePlan(1, 10**30)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"dtype": torch.float8_e4m3fn}, "unknown dtype"),
        ({"dtype": numpy.float32}, "unknown dtype"),
        ({"dtype": 16}, "unknown dtype"),
        ({"device": None}, "unknown device None"),
        ({"device": []}, "unknown device"),
        ({"device": 1.5}, "unknown device"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is"),
        ({"seed": "x"}, "seed is 'x'"),
        ({"name": None}, "the model is None"),
        ({"name": 3}, "the model is 3"),
        ({"name": ["scenes"]}, "the model is"),
        ({"name": ""}, "the model is ''"),
        ({"name": "x" * 5000}, "unknown model"),
        ({"name": "~/nowhere/at/all"}, "and there is no such file or folder"),
        ({"name": "a\0b"}, "unknown model"),
        ({"name": "\udc80"}, "unknown model"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode(),
)
def test_arguments_of_the_wrong_kind_are_one_line(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ArkvError) as caught:
        load_model(**{"name": "scenes"} | arguments)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("name", [None, 3, FullCache(), ["full"]])
def test_a_policy_that_is_no_name_is_one_line(name: Any) -> None:
    with pytest.raises(ArkvError, match="the policy is"):
        load_policy(name)


def test_dtypes_go_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert registry.torch_dtype(name) is torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Plugin(FullCache):
    """A policy as somebody else might write it."""

    mode: Literal["mean", "max"] | None = None
    w: tuple[int, int] = (1, 1)
    names: list[str] | None = None
    anything: Any = None
    recent: int = 3

    def __post_init__(self) -> None:
        if self.recent > 10:
            raise ValueError("recent is\ntoo large")
        if self.recent < 0:
            raise TypeError("recent is below 0")
        if self.recent == 10:
            raise arkv.ArkvError("never ten")


@dataclass(frozen=True, kw_only=True)
class Heir(Plugin):
    """One of its annotations is there for type checkers only."""

    strange: Strange | None = None


class Bare:
    """Neither policy nor model."""


not_a_class = Plugin()


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names above, registered as policies and as models."""
    module = importlib.import_module(__name__)

    class Named(EntryPoint):
        def load(self) -> Any:
            return getattr(module, self.attr)

    everything = ("Plugin", "Heir", "Bare", "not_a_class", "Tiny", "test_version_text")
    points = [Named(name.lower(), f"somewhere:{name}", "any") for name in everything]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)


def test_version_text() -> None:
    assert isinstance(arkv.__version__, str)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", ["plugin", "heir"])
def test_parameters_of_a_plugin_are_read_as_python_writes_them(name: str) -> None:
    assert load_policy(name).recent == 3
    assert load_policy(name, recent=4).recent == 4
    assert load_policy(f"{name}:anything=True").anything is True
    assert load_policy(f"{name}:w=(1,2),recent=5,mode='max',names=['a,b','c']") == type(load_policy(name))(
        w=(1, 2), recent=5, mode="max", names=["a,b", "c"]
    )
    assert load_policy(f"{name}:mode=mean").mode == "mean"
    assert load_policy(f"{name}:mode=None").mode is None


@pytest.mark.usefixtures("plugged")
def test_types_that_cannot_be_resolved_are_left_to_the_constructor() -> None:
    assert load_policy("heir:strange=7").strange == 7
    with pytest.raises(ArkvError, match="^heir: .*str") as caught:
        load_policy("heir:recent=few")
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("plugin:mode=median", "plugin: mode is 'median', expected 'mean' or 'max'"),
        ("plugin:mode=1", "plugin: mode is 1, expected 'mean' or 'max'"),
        ("plugin:w=3", "plugin: w is 3, expected tuple[int, int]"),
        ("plugin:w=[1,2]", "plugin: w is [1, 2], expected tuple[int, int]"),
        ("plugin:recent=11", "plugin: recent is too large"),
        ("plugin:recent=-1", "plugin: recent is below 0"),
        ("plugin:recent=10", "never ten"),
    ],
)
def test_what_a_plugin_refuses_is_one_line(name: str, complaint: str) -> None:
    with pytest.raises(ArkvError) as caught:
        load_policy(name)
    assert str(caught.value) == complaint


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", ["bare", "not_a_class", "tiny", "test_version_text"])
def test_what_is_no_policy_is_refused_by_name(name: str) -> None:
    with pytest.raises(ArkvError, match=rf"policy '{name}' of unknown is somewhere:.*dataclass.*CachePolicy"):
        load_policy(name)


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("name", ["bare", "not_a_class", "plugin", "test_version_text"])
def test_what_is_no_model_is_refused_by_name(name: str) -> None:
    with pytest.raises(ArkvError, match=rf"model '{name}' of unknown is somewhere:.*arkv.Model"):
        load_model(name)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("a,b", ["a", "b"]),
        ("w=(1,2),recent=3", ["w=(1,2)", "recent=3"]),
        ("w=[(1,2),{3:4,5:6}],b", ["w=[(1,2),{3:4,5:6}]", "b"]),
        ("t='a,b',u=\"c,')\",v", ["t='a,b'", 'u="c,\')"', "v"]),
        ("a),b", ["a)", "b"]),
        ("a(,b", ["a(,b"]),
    ],
)
def test_commas_count_outside_brackets_and_quotes_only(text: str, parts: list[str]) -> None:
    assert split_commas(text) == parts


def test_the_public_names_resolve_to_what_goes_by_them() -> None:
    # A submodule of the same name would take the place of a function once it is imported.
    importlib.import_module("arkv.decoder")
    for name in arkv.__all__:
        assert getattr(arkv, name).__name__ == name
    assert set(arkv.__all__) < set(dir(arkv))
    assert arkv.__version__
    with pytest.raises(AttributeError, match="nothing"):
        arkv.nothing  # noqa: B018


def test_a_parameter_that_stands_twice_is_refused() -> None:
    with pytest.raises(ArkvError, match=r"ratio is given twice, in 'ratio=1/2, ratio =1/3': give it once"):
        load_policy("window:ratio=1/2, ratio =1/3")
