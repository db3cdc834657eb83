"""What was measured of a model's heads, in a file that policies read."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError, CheckpointError
from arkv.grid import Grid
from arkv.model import ModelSpec
from arkv.weights.files import read_config

PERCENTS = range(1, 100)
"""The shares of attention that a head's reach is kept for."""

FACTS: Mapping[str, Any] = {
    "model": str,
    "tokens": int,
    "prompts": int,
    "guidance": (int, float),
    "date": str,
    "versions": dict,
}
"""What JSON may hold in the fields of a profile, beside its reaches."""


@dataclass(frozen=True)
class HeadProfile:
    """What was measured of a model's heads: how far back each one looks.

    The lag of a token is its distance behind the query in raster order, 0 for the query's own. A window of W
    tokens holds the lags up to W.

    Attributes:
        model: its name.
        tokens: visual tokens of its pictures, `N`.
        reach: by layer, key head and percent from 1 to 99: the least window that leaves out no more than
            this share of the attention to visual tokens. 99 whole numbers a head, and the share that any
            window leaves out, to a percent.
        prompts: pictures drawn.
        guidance: scale they were drawn with; at 1 there were no unconditional rows.
        date: when, in UTC.
        versions: of arkv and torch.
    """

    model: str
    tokens: int
    reach: tuple[tuple[tuple[int, ...], ...], ...]
    prompts: int
    guidance: float
    date: str
    versions: Mapping[str, str]

    def left_out(self, window: int) -> tuple[tuple[float, ...], ...]:
        """The share of attention that a window leaves out, by layer and key head.

        Args:
            window: tokens before the query's own.

        Returns:
            Shares, rounded down to a percent, so that one that is at least p percent exceeds p percent.
        """
        return tuple(tuple(_exceeded(head, window) / 100 for head in layer) for layer in self.reach)

    def windows(self, share: float) -> tuple[tuple[int, ...], ...]:
        """The least window of each head that leaves out no more than a share of its attention.

        Args:
            share: of the attention to visual tokens, rounded down to a percent. Below one percent nothing is
                known, and a window holds all tokens.

        Returns:
            Tokens before the query's own, by layer and key head.
        """
        percent = math.floor(round(100 * share, 6))
        if percent < 1:
            return tuple(tuple(self.tokens for _ in layer) for layer in self.reach)
        return tuple(tuple(head[min(percent, len(PERCENTS)) - 1] for head in layer) for layer in self.reach)

    def to_json(self) -> str:
        """One JSON object, a head a line, as `load` reads it."""
        members = []
        for name, value in asdict(self).items():
            text = json.dumps(value)
            if name == "reach":
                layers = [",\n".join(f"      {json.dumps(head)}" for head in layer) for layer in self.reach]
                text = "[\n" + ",\n".join(f"    [\n{layer}\n    ]" for layer in layers) + "\n  ]"
            members.append(f"  {json.dumps(name)}: {text}")
        return "{\n" + ",\n".join(members) + "\n}\n"

    def save(self, path: Path | str) -> None:
        """Write the profile to a file.

        Raises:
            ArkvError: it cannot be written.
        """
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise ArkvError(f"cannot write {path}: {error.strerror}") from None

    @classmethod
    def load(cls, path: Path | str) -> HeadProfile:
        """Read a profile.

        Raises:
            CheckpointError: the file is missing, is not JSON, does not hold a profile, or one of the older
                kind.
        """
        remedy = f"write one with 'arkv profile --model NAME --out {path}'"
        try:
            content = read_config(Path(path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {remedy}") from None
        if "outside" in content and "reach" not in content:
            raise CheckpointError(
                f"{path} is a profile of the older kind, which says what lies outside of a neighbourhood of "
                f"cells and not what a window leaves out; {remedy}"
            )
        try:
            known = {field.name: content[field.name] for field in fields(cls)}
            for name, kind in FACTS.items():
                if not isinstance(known[name], kind) or isinstance(known[name], bool):
                    raise ValueError(f"{name!r} is {known[name]!r}")
            reach = tuple(tuple(_reach(head, known["tokens"]) for head in layer) for layer in known["reach"])
            if len({len(layer) for layer in reach}) != 1 or not reach[0]:
                raise ValueError("layers have to have the same number of heads, at least one")
        except KeyError as error:
            raise CheckpointError(f"{path} is no profile of heads: {error} is missing; {remedy}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no profile of heads: {error}; {remedy}") from None
        return cls(**known | {"reach": reach})

    @classmethod
    def of_model(cls, spec: ModelSpec, path: Path | str) -> HeadProfile:
        """Read the profile of a model.

        Raises:
            CheckpointError: as `load`.
            ArkvError: it is of another model: layers, heads or tokens differ.
        """
        profile = cls.load(path)
        heads, tokens = [len(layer) for layer in profile.reach], spec.grid.tokens
        if heads != [spec.kv_heads] * spec.layers or profile.tokens != tokens:
            raise ArkvError(
                f"{path} has {len(heads)} layers of {sorted(set(heads))} heads and {profile.tokens} tokens, "
                f"{spec.name} {spec.layers} of {spec.kv_heads} and {tokens}: it is of another model"
            )
        return profile


def profile_files(spec: ModelSpec, given: str | None) -> tuple[Path, ...]:
    """The file of a policy that reads a profile: the given one, else the model's own, else none."""
    path = given or spec.head_profile
    return () if path is None else (Path(path),)


def usual_window(grid: Grid) -> int:
    """The window that SSD's figures speak for: 64 tokens in lines of 24, so 8/3 lines, to the nearest token.

    It scales with the line, because what a head looks at nearby is above the query as well as beside it.
    """
    return round(grid.line * 64 / 24)


def _exceeded(reach: Sequence[int], window: int) -> int:
    """How many percent a window leaves out; the windows of `reach` fall as the percents rise."""
    return bisect_left(reach, -window, key=lambda least: -least)


def _reach(value: Any, tokens: int) -> tuple[int, ...]:
    windows = tuple(value)
    if any(isinstance(w, bool) or not isinstance(w, int) or not 0 <= w <= tokens for w in windows):
        raise ValueError(f"'reach' has {value!r}, expected whole numbers from 0 to {tokens}")
    if len(windows) != len(PERCENTS) or any(a < b for a, b in pairwise(windows)):
        raise ValueError(
            f"'reach' has {value!r}, expected {len(PERCENTS)} numbers a head, none greater than the last"
        )
    return windows
