"""Which model to load, and from where: the flags that commands have in common.

They are the arguments of `load_model` and of the models' `from_pretrained`, under the same names. A model
that does not take one of them says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arkv.errors import ArkvError

if TYPE_CHECKING:
    from arkv.jobs.recipe import Recipe
    from arkv.model import Model

SHAPE_OPTIONS = ("source", "revision", "size")
WEIGHT_OPTIONS = ("decoder", "vqgan", "text_encoder", "tokenizer")


def add_model(parser: argparse.ArgumentParser, weights: bool = True) -> None:
    """Add the flags to a command.

    Args:
        parser: of the command.
        weights: whether the command reads weights; else only what decides on shapes can be said.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="scenes",
        metavar="NAME",
        help="see 'arkv models'; or a path or a repository of the hub with a checkpoint "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--source",
        metavar="PLACE",
        help="path or repository of a checkpoint, for a model that is given by name (default: its own)",
    )
    group.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the repository (default: main)"
    )
    group.add_argument(
        "--size",
        type=_size,
        metavar="WIDTHxHEIGHT",
        help="of the pictures, for models of several shapes: Lumina-mGPT (default: the square)",
    )
    if not weights:
        return
    group.add_argument(
        "--decoder",
        metavar="PLACE",
        help="weights of the picture decoder: LlamaGen (default: beside the model's)",
    )
    group.add_argument(
        "--vqgan", metavar="FILE", help="vqgan.ckpt: Lumina-mGPT (default: in the folder of the checkpoint)"
    )
    group.add_argument(
        "--text-encoder",
        metavar="PLACE",
        help="folder or repository: LlamaGen for captions (default: google/flan-t5-xl)",
    )
    group.add_argument(
        "--tokenizer",
        metavar="PLACE",
        help="tokenizer.json, its folder or repository: Lumina-mGPT (default: beside the checkpoint)",
    )
    group.add_argument(
        "--random-weights",
        action="store_true",
        help="draw the weights instead of reading them, to measure or to try out without a checkpoint",
    )


def load(arguments: argparse.Namespace | Recipe, device: str | None = None) -> Model:
    """The model that the flags ask for.

    Args:
        arguments: of a command with these flags, `dtype` and, unless given here, `device`; or a recipe,
            which has the same names.
        device: where to, for commands that cannot be told.

    Raises:
        ArkvError: as `arkv.load_model`.
    """
    from arkv.registry import load_model, names
    from arkv.weights.hub import is_hub_id

    options = _given(arguments)
    name = arguments.model
    is_place = name not in {entry.name for entry in names("model")} and (
        is_hub_id(name) or Path(name).exists()
    )
    if "source" in options and is_place:
        raise ArkvError(
            f"--model is {name}, a place itself: leave out --source, or give the name of a model with it"
        )
    if getattr(arguments, "random_weights", False):
        options["random_weights"] = True
    place = arguments.device if device is None else device
    return load_model(name, dtype=arguments.dtype, device=place, **options)


def described(arguments: argparse.Namespace | Recipe) -> dict[str, Any] | None:
    """What was asked for beside a registered name, ready for JSON; None for nothing."""
    from arkv.registry import names

    told: dict[str, Any] = dict(_given(arguments))
    if "size" in told:
        told["size"] = list(told["size"])
    if arguments.model not in {entry.name for entry in names("model")}:
        told["source"] = arguments.model
    if arguments.random_weights:
        told["random_weights"] = True
    return told or None


def _given(arguments: argparse.Namespace | Recipe) -> dict[str, Any]:
    values = {name: getattr(arguments, name, None) for name in (*SHAPE_OPTIONS, *WEIGHT_OPTIONS)}
    return {name: value for name, value in values.items() if value is not None}


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: expected one such as 1024x576")
    return int(width), int(height)
