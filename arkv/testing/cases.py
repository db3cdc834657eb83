"""Random models, parameters and batches for a policy, all of them small."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from arkv.decoding.loop import Loop
from arkv.errors import BudgetError
from arkv.grid import Grid
from arkv.model import Condition, ModelSpec
from arkv.policy import CachePolicy
from arkv.testing.tiny import LONGEST, WORDS, Prompt, Tiny, random_tokens

Parameters = Callable[[ModelSpec], st.SearchStrategy[dict[str, Any]]]
"""A model's shape to the parameters that are worth trying with it, those of the size left out."""


@dataclass(repr=False)
class Case:
    """A model, a policy and a batch of given tokens.

    Attributes:
        model: with random weights.
        policy: planned for the model.
        prompts: one a picture.
        tokens: int64 `[pictures, N]`.
        guided: whether every picture has an unconditional row too.
    """

    model: Tiny
    policy: CachePolicy
    prompts: list[Prompt]
    tokens: Tensor
    guided: bool

    def __repr__(self) -> str:
        spec = self.model.spec
        return (
            f"Case({self.policy}, {spec.grid}, layers={spec.layers}, heads={spec.heads}, "
            f"kv_heads={spec.kv_heads}, prompts={self.prompts}, guided={self.guided})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # hypothesis would write out the weights

    @property
    def rows(self) -> Tensor:
        """The given tokens of every row, int64 `[rows, N]`."""
        return self.tokens.repeat(2, 1) if self.guided else self.tokens

    def begin(self, policy: CachePolicy | None = None) -> tuple[Loop, Condition]:
        """A loop for the batch, of this policy or of another in its stead, and what to prefill."""
        condition = self.model.condition(self.prompts, self.guided)
        rows, length = condition.mask.shape
        return Loop(self.model, policy or self.policy, rows, length, "none", self.guided), condition

    def of_picture(self, index: int) -> tuple[Case, list[int]]:
        """The case with one picture only, and the rows which that one has here."""
        alone = dataclasses.replace(self, prompts=[self.prompts[index]], tokens=self.tokens[[index]])
        return alone, [index, index + len(self.prompts)] if self.guided else [index]


SIZES = ("budget", "ratio")
"""Parameters that say how much is kept."""


def size_parameters(policy: type[CachePolicy], given: Mapping[str, Any]) -> list[str]:
    """Those of `SIZES` which a policy takes; none if its size is given already."""
    taken = {field.name for field in dataclasses.fields(policy) if field.init}
    return [] if any(name in given for name in SIZES) else [name for name in SIZES if name in taken]


def sized(policy: type[CachePolicy], given: Mapping[str, Any], size: int, tokens: int) -> CachePolicy:
    """A policy that keeps `size` of `tokens`, where it takes a size."""
    names = size_parameters(policy, given)
    values = {"budget": size, "ratio": f"{min(size, tokens)}/{tokens}"}
    return policy(**given, **{name: values[name] for name in names[:1]})


def is_legal(policy: type[CachePolicy], given: Mapping[str, Any], size: int, spec: ModelSpec) -> bool:
    """Whether a policy can be planned for this size."""
    try:
        sized(policy, given, size, spec.grid.tokens).plan(spec.grid, spec)
    except BudgetError:
        return False
    return True


def least_size(policy: type[CachePolicy], given: Mapping[str, Any], spec: ModelSpec) -> int | None:
    """The smallest legal size; None if not even all tokens are one."""
    tokens = spec.grid.tokens
    return next((size for size in range(1, tokens + 1) if is_legal(policy, given, size, spec)), None)


def is_whole(policy: CachePolicy, spec: ModelSpec) -> bool:
    """Whether the plan holds every token of a picture in every head."""
    budgets = policy.plan(spec.grid, spec).budgets(spec)
    return all(budget >= spec.grid.tokens for layer in budgets for budget in layer)


prompts = st.lists(st.integers(0, WORDS - 1), max_size=LONGEST).map(tuple)

# A head for every query, several queries to a head, one head alone.
HEADS = ((2, 2), (1, 1), (4, 2), (2, 1), (3, 3))


@st.composite
def models(draw: st.DrawFn) -> Tiny:
    """Grids of up to five lines and columns, with newlines or without, one to three layers."""
    grid = draw(st.builds(Grid, st.integers(1, 5), st.integers(1, 5), st.booleans()))
    heads, kv_heads = draw(st.sampled_from(HEADS))
    return Tiny(grid, draw(st.integers(1, 3)), heads, kv_heads, seed=draw(st.integers(0, 99)))


@st.composite
def cases(
    draw: st.DrawFn,
    policy: type[CachePolicy],
    parameters: Parameters,
    whole: bool = False,
    model: Tiny | None = None,
) -> Case:
    """Anything small.

    Args:
        draw: from hypothesis.
        policy: what to build.
        parameters: what to build it with.
        whole: keep every token, by a budget that is large enough or by a ratio of 1.
        model: None for any.
    """
    model = model or draw(models())
    grid = model.spec.grid
    given = draw(parameters(model.spec))
    if whole and size_parameters(policy, given):
        assume(is_legal(policy, given, grid.tokens, model.spec))
        sizes = {"budget": st.integers(grid.tokens, grid.tokens + 2), "ratio": st.sampled_from([1.0, 1, "1"])}
        name = draw(st.sampled_from(size_parameters(policy, given)))
        built = policy(**given, **{name: draw(sizes[name])})
    else:
        size = grid.tokens
        if not whole:
            least = least_size(policy, given, model.spec)
            assume(least is not None)
            size = draw(st.integers(typing.cast(int, least), grid.tokens))
            assume(is_legal(policy, given, size, model.spec))
        built = sized(policy, given, size, grid.tokens)
    return draw(batches(model, built))


@st.composite
def batches(draw: st.DrawFn, model: Tiny, policy: CachePolicy) -> Case:
    """One to three pictures, with guidance or without, with prompts of different lengths."""
    of_pictures = draw(st.lists(prompts, min_size=1, max_size=3))
    tokens = random_tokens(model, len(of_pictures), seed=draw(st.integers(0, 99)))
    return Case(model, policy, of_pictures, tokens, draw(st.booleans()))


LONG_PROMPT: Prompt = tuple(range(LONGEST))

CORNERS = {
    "one head": (Grid(3, 3), (1, 1)),
    "one line": (Grid(1, 5), (2, 2)),
    "one column": (Grid(5, 1), (4, 2)),
    "one token": (Grid(1, 1), (2, 2)),
    "newlines": (Grid(3, 2, newline=True), (3, 3)),
    "a condition longer than the image": (Grid(4, 1), (2, 2)),
}
"""Grid, and query and key heads, of cases that are easily forgotten."""


def corner(policy: type[CachePolicy], given: Mapping[str, Any], model: Tiny, size: int) -> Case:
    """A case of `CORNERS`: guided, left-padded, of one size."""
    of_pictures: list[Prompt] = [LONG_PROMPT, (1,)]
    built = sized(policy, given, size, model.spec.grid.tokens)
    return Case(model, built, of_pictures, random_tokens(model, 2), guided=True)


def fuzzed(policy: type[CachePolicy]) -> st.SearchStrategy[dict[str, Any]]:
    """Values that a policy's annotations allow, sensible or not, for one parameter or for many."""
    values = {name: drawn for name, hint in _hints(policy) if (drawn := _values(hint)) is not None}
    if not values:
        return st.just({})
    # Sizes have their own place in what is tried.
    alone = sorted(values.keys() - set(SIZES)) or sorted(values)
    one = st.sampled_from(alone).flatmap(lambda name: st.fixed_dictionaries({name: values[name]}))
    return one | st.fixed_dictionaries({}, optional=values)


def extremes(policy: type[CachePolicy]) -> list[tuple[str, Any]]:
    """Every parameter of a policy with each of the values at the limits of what its annotation allows."""
    return [(name, value) for name, hint in _hints(policy) for value in _extremes(hint)]


def _hints(policy: type[CachePolicy]) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(policy)
    return [(field.name, hints.get(field.name)) for field in dataclasses.fields(policy) if field.init]


def _extremes(hint: Any) -> list[Any]:
    if typing.get_origin(hint) is Literal:
        return list(typing.get_args(hint))
    parts = _parts(hint)
    return [value for part in parts for value in _extremes(part)] if parts else list(_LIMITS.get(hint, ()))


def _parts(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union; empty for anything else."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()


def _values(hint: Any) -> st.SearchStrategy[Any] | None:
    """Values of an annotation; None where it is not one of those that a parameter is read from text with."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if typing.get_origin(hint) is Literal:
        return st.sampled_from(typing.get_args(hint))
    parts = [values for part in _parts(hint) if (values := _values(part)) is not None]
    return st.one_of(parts) if parts else None


# The large ones do not fit into the tensors of a store, or into any.
_LIMITS: dict[Any, tuple[Any, ...]] = {
    type(None): (None,),
    bool: (False, True),
    int: (0, 1, -1, 2**31, 2**63, 10**30, -(10**30)),
    float: (0.0, 1.0, -1.0, math.inf, -math.inf, math.nan),
    str: ("", "0", "1/0", "no such thing"),
}

# Mostly near what means something on a tiny grid.
_PLAIN: dict[Any, st.SearchStrategy[Any]] = {
    type(None): st.none(),
    bool: st.booleans(),
    int: st.integers(-2, 40) | st.sampled_from(_LIMITS[int]),
    float: st.floats(0, 1) | st.floats(),
    str: st.sampled_from(["1/2", "1/6", "0.5", "1"]) | st.text(max_size=6),
}
