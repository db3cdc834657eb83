"""Which model to load, from where and onto what: the options that decide on it.

They are the arguments of `load_model` and of the models' `from_pretrained`, under the same names. A model
that does not take one of them says so.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from arkv.errors import ArkvError, CheckpointError, UnknownNameError
from arkv.options import Filled, Place, Size, option, options

if TYPE_CHECKING:
    from arkv.model import Model, PictureDecoder

SHAPE_OPTIONS = ("source", "revision", "size", "weights")
WEIGHT_OPTIONS = ("decoder", "vqgan", "text_encoder", "tokenizer", "lora")
PROMPT_OPTIONS = ("negative_prompt", "suffix")

Dtype = Literal["float32", "bfloat16", "float16"]
WeightDtype = Literal["int8", "int4"]
Loaded = TypeVar("Loaded")


@options
class ShapeOptions:
    """A model as far as shapes go."""

    SECTION = "Model"

    model: Place = option(
        default="scenes",
        metavar="NAME",
        help="see 'arkv models'; or a path or a repository of the hub with a checkpoint",
    )
    source: Place | None = option(
        default=None,
        metavar="PLACE",
        help="path or repository of a checkpoint, for a model that is given by name (default: its own)",
    )
    revision: Filled | None = option(
        default=None, metavar="NAME", help="branch, tag or commit of the repository (default: main)"
    )
    size: Size | None = option(
        default=None,
        metavar="WIDTHxHEIGHT",
        help="of the pictures, for models of several shapes: Lumina-mGPT, Emu3, Emu3.5 (default: the square)",
    )
    weights: WeightDtype | None = option(
        default=None, help="store the weights of the blocks in eight or four bits (default: as --dtype says)"
    )

    def load_model(self, device: str | None = None) -> Model:
        """The model, where the options say or on another device; on the meta device, without weights.

        Raises:
            ArkvError: as `arkv.load_model`.
        """
        from arkv.registry import load_model

        return self._load(partial(load_model, dtype=getattr(self, "dtype", None)), device)

    def load_picture_decoder(self, device: str) -> PictureDecoder:
        """What makes pictures of the model's tokens, and no more of it than that takes.

        Raises:
            ArkvError: as `arkv.load_model`.
        """
        from arkv.picture_decoder import load_picture_decoder

        return self._load(load_picture_decoder, device)

    def _load(self, load: Callable[..., Loaded], device: str | None) -> Loaded:
        from arkv.registry import names
        from arkv.weights.files import exists, place
        from arkv.weights.hub import is_hub_id

        options, name = self._given(), self.model
        known = [entry.name for entry in names("model")]
        is_there = name in known or exists(place(name))
        if not is_there and not is_hub_id(name):
            raise UnknownNameError("model", name, known, "and there is no such file or folder")
        if name not in known and "source" in options:
            raise ArkvError(
                f"--model is {name}, a place itself: leave out --source, or give the name of a model with it"
            )
        if getattr(self, "random_weights", False):
            options["random_weights"] = True
        target = getattr(self, "device", "meta") if device is None else device
        try:
            return load(name, device=target, **options)
        except CheckpointError as error:
            if is_there:
                raise
            raise CheckpointError(
                f"no model is called {name!r}, there is no such file or folder, and as a repository: {error}"
            ) from None

    def described(self) -> dict[str, Any] | None:
        """What was asked for beside a registered name, ready for JSON; None for nothing."""
        from arkv.registry import names

        told: dict[str, Any] = dict(self._given())
        if "size" in told:
            told["size"] = list(told["size"])
        if self.model not in {entry.name for entry in names("model")}:
            told["source"] = self.model
        if getattr(self, "random_weights", False):
            told["random_weights"] = True
        return told or None

    def _given(self) -> dict[str, Any]:
        values = {
            name: getattr(self, name, None) for name in (*SHAPE_OPTIONS, *WEIGHT_OPTIONS, *PROMPT_OPTIONS)
        }
        return {name: value for name, value in values.items() if value is not None}


@options
class ModelOptions(ShapeOptions):
    """A model with its weights."""

    SECTION = "Model"

    decoder: Place | None = option(
        default=None,
        metavar="PLACE",
        help="weights of the picture decoder: LlamaGen, Emu3, Lumina-mGPT 2.0 (default: beside the model's)",
    )
    vqgan: Place | None = option(
        default=None,
        metavar="FILE",
        help="vqgan.ckpt: Lumina-mGPT (default: in the folder of the checkpoint)",
    )
    text_encoder: Place | None = option(
        default=None,
        metavar="PLACE",
        help="folder or repository: LlamaGen for captions (default: google/flan-t5-xl)",
    )
    tokenizer: Place | None = option(
        default=None,
        metavar="PLACE",
        help="tokenizer.json, its folder or repository: Lumina-mGPT (default: beside the checkpoint)",
    )
    lora: Place | None = option(
        default=None,
        metavar="PLACE",
        help="folder or repository of a LoRA adapter to merge into the weights",
    )
    negative_prompt: str | None = option(
        default=None,
        metavar="TEXT",
        help="what the unconditional rows say: Emu3 (default: what its authors have there)",
    )
    suffix: str | None = option(
        default=None,
        metavar="TEXT",
        help="put behind every prompt: Emu3 (default: its authors' words for quality)",
    )
    random_weights: bool = option(
        default=False,
        help="draw the weights instead of reading them, to measure or to try out without a checkpoint",
    )


@options
class DeviceOptions:
    """Where a model is."""

    SECTION = "Compute"

    dtype: Dtype | None = option(
        default=None, help="of weights and cache (default: float32 on the CPU, bfloat16 elsewhere)"
    )
    device: Filled = option(default="cpu", metavar="DEVICE", help="such as cpu or cuda:0")
