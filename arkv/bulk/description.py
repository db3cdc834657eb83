"""A job in a file: `job.yaml`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_type_hints

from arkv.errors import ArkvError, UnknownNameError
from arkv.fields import fits, wanted
from arkv.jobs.job import Job
from arkv.jobs.recipe import Recipe
from arkv.pictures.layouts import LAYOUTS
from arkv.pictures.prompts import read_prompts

BATCH_SIZE = 16

EngineName = Literal["in-process", "torchrun", "ray"]


@dataclass(frozen=True)
class Description:
    """A job and how to run it. In a file, the recipe's fields stand beside the others.

    Attributes:
        prompts: file or folder, as `arkv.pictures.prompts` reads it.
        out: folder for the pictures.
        recipe: what decides on a picture beside its prompt and its seed.
        samples: pictures of a prompt; None for what the layout usually has.
        layout: of `arkv.pictures.layouts`; None for the one that goes with the prompts' format, else "flat".
        npz_side: pixels that the pictures of an archive are resized to.
        seed: of the job.
        batch_size: pictures decoded at a time by a worker, or "auto" for as many as fit.
        engine: "in-process"; "torchrun" for a process a GPU; "ray" for a cluster.
        workers: how many; None for one a GPU, or one where there is none.
        address: of a Ray cluster; None to start Ray on this machine.
        pixel_workers: processes that turn tokens into files, under Ray; 0 leaves that to those who draw.
    """

    prompts: str
    out: str
    recipe: Recipe = field(default_factory=Recipe)
    samples: int | None = None
    layout: str | None = None
    npz_side: int | None = None
    seed: int = 0
    batch_size: int | Literal["auto"] = BATCH_SIZE
    engine: EngineName = "in-process"
    workers: int | None = None
    address: str | None = None
    pixel_workers: int = 0

    def job(self) -> Job:
        """What is to be drawn.

        Raises:
            ArkvError: the prompts cannot be read, or do not go with the layout.
        """
        kind, prompts = read_prompts(Path(self.prompts))
        layout = self.layout or (kind if kind in LAYOUTS else "flat")
        if layout not in LAYOUTS:
            raise UnknownNameError("layout", layout, LAYOUTS)
        samples = LAYOUTS[layout].samples if self.samples is None else self.samples
        return Job(prompts, layout, samples, self.seed, self.npz_side)

    def values(self) -> dict[str, Any]:
        """All fields in one dictionary, ready for JSON; `from_values` takes it back."""
        values = dataclasses.asdict(self)
        return {**values.pop("recipe"), **values}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str = "the job") -> Description:
        """A job from its fields by name.

        Args:
            values: of the recipe, too.
            where: what they stand in, for messages.

        Raises:
            ArkvError: a name is unknown, a value is not of its type, or prompts or folder are lacking.
        """
        mine, recipes = get_type_hints(cls), get_type_hints(Recipe)
        del mine["recipe"]
        known = {**mine, **recipes}
        read: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise UnknownNameError(f"name in {where}", name, known)
            read[name] = tuple(value) if isinstance(value, list) else value
            if not fits(read[name], known[name]):
                raise ArkvError(f"{name} is {value!r} in {where}: expected {wanted(known[name])}")
        for name in ("prompts", "out"):
            if name not in read:
                raise ArkvError(
                    f"{where} lacks {name!r}: say which prompts to draw, and the folder to draw into"
                )
        recipe = Recipe(**{name: value for name, value in read.items() if name in recipes})
        return cls(recipe=recipe, **{name: value for name, value in read.items() if name in mine})


def read_description(path: Path) -> Description:
    """Read a job from a YAML file; its paths are seen from the folder that the command is started in.

    Raises:
        ArkvError: it cannot be read, or is no job.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArkvError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        told = " ".join(str(error).split())
        raise ArkvError(f"{path} is not YAML: {told}") from None
    if not isinstance(values, dict):
        raise ArkvError(f"{path} has no names with values in it: expected lines such as 'policy: linear'")
    return Description.from_values({str(name): value for name, value in values.items()}, str(path))
