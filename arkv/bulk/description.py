"""A job in a file: `job.yaml`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arkv.errors import ArkvError, UnknownNameError
from arkv.jobs.list_options import ListOptions
from arkv.jobs.recipe import Recipe
from arkv.options import Count, Filled, PathText, Positive, Seed, fields_of, option, options, read, shown

if TYPE_CHECKING:
    from arkv.jobs.job import Job

BATCH_SIZE = 16
LARGEST_FILE = 2**20  # bytes of a job.yaml

EngineName = Literal["in-process", "torchrun", "ray"]


@options
class Description(ListOptions):
    """A job and how to run it. In a file, the recipe's options stand beside the others."""

    prompts: PathText = option(help="file or folder with the prompts, as `arkv.pictures.prompts` reads it")
    out: PathText = option(help="folder for the pictures")
    recipe: Recipe = option(default=Recipe(), help="what decides on a picture beside its prompt and its seed")
    seed: Seed = option(default=0, help="of the job; a picture's is made of it and of the picture's number")
    batch_size: Positive | Literal["auto"] = option(
        default=BATCH_SIZE, help="pictures decoded at a time by a worker, or auto for as many as fit"
    )
    engine: EngineName = option(
        default="in-process", help="who draws: torchrun for a process a GPU, ray for a cluster"
    )
    workers: Positive | None = option(
        default=None, help="processes, where the engine has several (default: one a GPU, else one)"
    )
    address: Filled | None = option(
        default=None, help="HOST:PORT of a Ray cluster (default: Ray is started on this machine)"
    )
    pixel_workers: Count = option(
        default=0,
        help="under Ray, processes that turn tokens into files; 0 leaves that to those who draw",
    )

    def check(self) -> None:
        """Look at what can be seen before anything is loaded or begun.

        Raises:
            ArkvError: options do not go together, the policy cannot be, or the engine is not installed.
        """
        if self.npz_side is not None and self.layout not in (None, "npz"):
            raise ArkvError(f"npz_side is for the layout npz, and the layout is {self.layout}")
        if self.engine == "ray" and not _is_installed("ray"):
            raise ArkvError("the engine ray needs Ray: pip install 'arkv[ray]'")
        self.recipe.load_policy()

    def job(self) -> Job:
        """What is to be drawn.

        Raises:
            ArkvError: as `check`; or the prompts cannot be read, are too many, or do not go with the layout.
        """
        from arkv.jobs.job import Job
        from arkv.pictures.layouts import LAYOUTS
        from arkv.pictures.prompts import read_prompts

        self.check()
        kind, prompts = read_prompts(Path(self.prompts))
        layout = self.layout or (kind if kind in LAYOUTS else "flat")
        samples = LAYOUTS[layout].samples if self.samples is None else self.samples
        return Job(prompts, layout, samples, self.seed, self.npz_side)

    def values(self) -> dict[str, Any]:
        """All options in one dictionary, ready for JSON; `from_values` takes it back."""
        values = dataclasses.asdict(self)
        return {**values.pop("recipe"), **values}

    @classmethod
    def from_values(cls, values: Mapping[str, Any], where: str = "the job") -> Description:
        """A job from its options by name.

        Args:
            values: of the recipe, too.
            where: what they stand in, for messages.

        Raises:
            ArkvError: a name is unknown, a value is none that it may have, or prompts or folder are lacking.
        """
        recipes = fields_of(Recipe)
        mine = {name: field for name, field in fields_of(cls).items() if name != "recipe"}
        for name in values:
            if name not in mine and name not in recipes:
                raise UnknownNameError(f"name in {where}", str(name), [*mine, *recipes])
        for name in ("prompts", "out"):
            if name not in values:
                raise ArkvError(
                    f"{where} lacks {name!r}: say which prompts to draw, and the folder to draw into"
                )
        recipe = read(Recipe, {name: v for name, v in values.items() if name in recipes}, where=where)
        rest = {name: value for name, value in values.items() if name in mine}
        return read(cls, {"recipe": recipe, **rest}, where=where)


def _is_installed(library: str) -> bool:
    """Whether a library can be imported, without doing so."""
    if library in sys.modules:
        return sys.modules[library] is not None
    return importlib.util.find_spec(library) is not None


def schema() -> dict[str, Any]:
    """The JSON schema of a job's file: editors complete and check names and values by it."""
    import pydantic

    flat, nested = (pydantic.TypeAdapter(cls).json_schema() for cls in (Description, Recipe))
    properties = {**flat["properties"], **nested["properties"]}
    del properties["recipe"]
    for told in properties.values():
        told.pop("x-arkv", None)
    names = ["prompts", "out", *(name for name in properties if name not in ("prompts", "out"))]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "arkv job",
        "description": "What 'arkv run' draws.",
        "type": "object",
        "additionalProperties": False,
        "required": flat["required"],
        "properties": {name: properties[name] for name in names},
    }


def read_description(path: Path) -> Description:
    """Read a job from a YAML file; its paths are seen from the folder that the command is started in.

    Raises:
        ArkvError: it cannot be read, or is no job.
    """
    return Description.from_values(_values_of(path), str(path))


def _values_of(path: Path) -> dict[str, Any]:
    """The names and values of a YAML file.

    Raises:
        ArkvError: it cannot be read, or has none.
    """
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a name that stands twice, of which YAML would take the last."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """A mapping, each of its names once."""
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, times in names.items():
                if times > 1:
                    raise yaml.YAMLError(f"the name {shown(name)} stands twice")
            return super().construct_mapping(node, deep)

    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ArkvError(f"{path} is larger than {LARGEST_FILE} bytes: a job is a few lines of YAML")
        values = yaml.load(content.decode("utf-8-sig"), Loader)
    except OSError as error:
        raise ArkvError(f"cannot read {path}: {error.strerror}") from None
    except ArkvError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError, RecursionError) as error:
        # Beside its own errors, what its constructors of dates, numbers and the like say of impossible ones.
        told = " ".join(str(error).split())
        raise ArkvError(f"{path} is not YAML: {told[:500]}") from None
    if not isinstance(values, dict):
        raise ArkvError(f"{path} has no names with values in it: expected lines such as 'policy: linear'")
    return {shown(name, texts=True): value for name, value in values.items()}
