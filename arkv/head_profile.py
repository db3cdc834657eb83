"""What was measured of a model's heads, in a file that policies read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from arkv.errors import ArkvError, CheckpointError
from arkv.weights.files import read_config

FACTS: Mapping[str, Any] = {
    "model": str,
    "radius": int,
    "prompts": int,
    "guidance": (int, float),
    "date": str,
    "versions": dict,
}
"""What JSON may hold in the fields of a profile, beside its shares."""


@dataclass(frozen=True)
class HeadProfile:
    """What was measured of a model's heads.

    Attributes:
        model: its name.
        outside: by layer and key head, the share of attention to visual tokens that goes beyond the
            neighbourhood, from 0 to 1.
        radius: cells that the neighbourhood reaches upwards and to either side.
        prompts: pictures drawn.
        guidance: scale they were drawn with; at 1 there were no unconditional rows.
        date: when, in UTC.
        versions: of arkv and torch.
    """

    model: str
    outside: tuple[tuple[float, ...], ...]
    radius: int
    prompts: int
    guidance: float
    date: str
    versions: Mapping[str, str]

    def to_json(self) -> str:
        """One JSON object, a layer a line, as `load` reads it."""
        members = []
        for name, value in asdict(self).items():
            text = json.dumps(value)
            if name == "outside":
                layers = ",\n".join(f"    {json.dumps(layer)}" for layer in self.outside)
                text = f"[\n{layers}\n  ]"
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
            CheckpointError: the file is missing, is not JSON, or does not hold a profile.
        """
        remedy = f"write one with 'arkv profile --model NAME --out {path}'"
        try:
            content = read_config(Path(path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {remedy}") from None
        try:
            outside = tuple(tuple(_share(x) for x in layer) for layer in content["outside"])
            if len({len(layer) for layer in outside}) != 1 or not outside[0]:
                raise ValueError("layers have to have the same number of heads, at least one")
            known = {field.name: content[field.name] for field in fields(cls)}
            for name, kind in FACTS.items():
                if not isinstance(known[name], kind) or isinstance(known[name], bool):
                    raise ValueError(f"{name!r} is {known[name]!r}")
        except KeyError as error:
            raise CheckpointError(f"{path} is no profile of heads: {error} is missing; {remedy}") from None
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no profile of heads: {error}; {remedy}") from None
        return cls(**known | {"outside": outside})


def _share(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"'outside' has {value!r}, expected shares from 0 to 1")
    return float(value)
