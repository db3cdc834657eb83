"""Models and policies by name, through the entry points `arkv.models` and `arkv.policies`.

The built-in ones use the same door as anybody else's package. Listing names imports nothing.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arkv.errors import ArkvError, CheckpointError, Terminated, UnknownNameError, one_line, warn
from arkv.options import shown, split_commas
from arkv.parameters import check_parameters, parse_parameters
from arkv.patience import within
from arkv.scalars import plain, whole

if TYPE_CHECKING:
    import torch

    from arkv.model import Model
    from arkv.policy import CachePolicy
    from arkv.weights.quantization import WeightDtype

Kind = Literal["model", "policy"]
PATIENCE = 60.0
"""Seconds that a model may take to say whether a checkpoint is its."""

GROUPS: dict[Kind, str] = {"model": "arkv.models", "policy": "arkv.policies"}


@dataclass(frozen=True)
class Entry:
    """A name and where it comes from.

    Attributes:
        name: what users call it.
        origin: distribution and version that registered it.
    """

    name: str
    origin: str


def names(kind: Kind) -> list[Entry]:
    """Everything registered, in order of name; nothing is imported."""
    return [
        Entry(point.name, _origin(point)) for point in sorted(_points(kind).values(), key=lambda p: p.name)
    ]


def origin_of(kind: Kind, loaded: type) -> str:
    """The distribution and version that registered a class, or "unregistered"; nothing is imported."""
    value = f"{loaded.__module__}:{loaded.__qualname__}"
    found = [point for point in _points(kind).values() if point.value == value]
    return _origin(found[0]) if found else "unregistered"


def at_ratios(policies: Sequence[str], ratios: Sequence[str]) -> list[str]:
    """Every policy at every ratio, as `load_policy` takes it, none twice.

    Args:
        policies: names, with parameters if any. One that has no ratio, or is given its budget here, is taken
            once as it stands.
        ratios: such as "1/6".

    Raises:
        UnknownNameError: there is no such policy.
    """
    complete: dict[str, None] = {}  # an ordered set
    for text in policies:
        name, _, given = text.partition(":")
        known = {field.name for field in fields(load_class("policy", name))}
        fixed = {part.partition("=")[0].strip() for part in split_commas(given)} & {"budget", "ratio"}
        if "ratio" not in known or fixed:
            complete[text] = None
        else:
            complete |= {f"{text}{',' if given else ':'}ratio={ratio}": None for ratio in ratios}
    return list(complete)


def load_class(kind: Kind, name: str) -> Any:
    """Import what goes by a name.

    Raises:
        UnknownNameError: nothing does; the nearest names are suggested.
        ArkvError: the package that registered it cannot be imported, or gives something else than a
            policy or a model.
    """
    points = _points(kind)
    if not isinstance(name, str):
        raise ArkvError(f"the {kind} is {name!r:.60}: expected a name, such as {min(points, default='')!r}")
    if name not in points:
        raise UnknownNameError(kind, name, points)
    try:
        loaded = points[name].load()
    except (KeyboardInterrupt, Terminated):
        raise
    except BaseException as error:  # also sys.exit() in somebody's package
        raise ArkvError(
            f"the {kind} {name!r} of {_origin(points[name])} cannot be imported: {one_line(error)}"
        ) from error
    if kind == "policy":
        from arkv.policy import CachePolicy

        right = isinstance(loaded, type) and issubclass(loaded, CachePolicy) and is_dataclass(loaded)
        wanted = "a dataclass that derives from arkv.CachePolicy"
    else:
        from arkv.model import Model

        right = isinstance(loaded, type) and issubclass(loaded, Model)
        wanted = "a class that derives from arkv.Model"
    if not right:
        raise ArkvError(
            f"the {kind} {name!r} of {_origin(points[name])} is {points[name].value}: expected {wanted}"
        )
    return loaded


def load_policy(name: str, **parameters: Any) -> CachePolicy:
    """Build a policy.

    Args:
        name: as registered, or with parameters behind it: `"linear:anchors=24,recent=48"`.
        parameters: the policy's own, such as `ratio="1/6"`; they win over those in the name.

    Raises:
        UnknownNameError: there is no such policy or parameter.
        ArkvError: a parameter has the wrong type or value.
    """
    text = ""
    if isinstance(name, str):
        name, _, text = name.partition(":")
    policy_class = load_class("policy", name)
    given = parse_parameters(text) | {parameter: plain(value) for parameter, value in parameters.items()}
    check_parameters(name, policy_class, given)
    try:
        return policy_class(**given)
    except ArkvError:
        raise
    except Exception as error:  # of somebody's package
        raise ArkvError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    random_weights: bool = False,
    seed: int = 0,
    weights: WeightDtype | None = None,
    lora: str | Path | None = None,
    **options: Any,
) -> Model:
    """Load a model with its weights, packed where that makes it faster (see `arkv.weights.packing`).

    Args:
        name: as registered, such as `"scenes"` or `"janus-pro-1b"`; or a path or a repository on the hub with
            the checkpoint of a registered model, which is recognised by its contents.
        dtype: of weights, keys and values, as a torch dtype or its name; None for float32 on the CPU and
            bfloat16 elsewhere.
        device: where to put the weights.
        random_weights: draw the weights instead of reading them, for measuring time and memory: no file is
            needed. Prompts are then what the model takes without its tokenizer or text encoder, such as its
            `example_prompts`.
        seed: of random weights.
        weights: "int8" or "int4" to store the weights of the transformer's blocks in eight or four bits,
            rounded while they are read (see `arkv.weights.quantization`); None for plain ones.
        lora: folder, or repository on the hub, of a LoRA adapter that peft saved, which is merged into the
            weights before they are rounded.
        options: what else the model's `from_pretrained` takes: for the published families `source`, where
            its checkpoint is if not in its repository, and `revision` and `token` of the hub.

    Raises:
        UnknownNameError: there is no such model, or it takes no such option.
        CheckpointError: its weights cannot be read, or nobody recognises them; the adapter is not for them.
        MemoryLimitError: the device has not as much memory free as the weights take.
    """
    import torch

    from arkv.machine.defaults import torchs_own
    from arkv.weights.packing import pack_
    from arkv.weights.quantization import check_weight_dtype
    from arkv.weights.quantized import quantize_

    seed_number = whole(seed)
    if seed_number is None or not 0 <= seed_number < 2**64:
        raise ArkvError(f"seed is {shown(seed)}: expected a whole number from 0 to 2**64 - 1")
    device = usable_device(device)
    check_weight_dtype(weights)
    if lora is not None:
        if random_weights:
            raise ArkvError("lora is given with random weights: leave one of them out")
        options["lora"] = lora
    model_class, options = class_and_options(name, options)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = torch_dtype(dtype)
    if device.type == "mps" and dtype == torch.float64:
        raise ArkvError("the dtype is float64, which the device 'mps' has not: take float32")
    if weights is not None and "weights" in inspect.signature(model_class.from_pretrained).parameters:
        options["weights"] = weights
    with torchs_own(device), reading(options.get("source") or name):
        if random_weights:
            model = model_class.from_pretrained(dtype=dtype, device=torch.device("meta"), **options)
            model = with_random_weights(model, device, seed_number)
        else:
            model = model_class.from_pretrained(dtype=dtype, device=device, **options)
        if weights is not None:
            quantize_(model, weights)  # does nothing where that was done while the weights were read
        pack_(model)
    return model


def class_and_options(name: str | Path, options: dict[str, Any]) -> tuple[type[Model], dict[str, Any]]:
    """A model's class, by its name or by what is at a place; and its options, with that place among them."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise ArkvError(f"the model is {name!r:.60}: expected a name such as 'scenes', or a path")
    if name not in _points("model"):
        name, options = _recognised(name), {**options, "source": name}
    model_class: type[Model] = load_class("model", str(name))
    _check_options(str(name), model_class, options)
    return model_class, options


def usable_device(device: torch.device | str) -> torch.device:
    """A device that there is."""
    import torch

    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ArkvError(f"unknown device {device!r:.60}: expected a name such as 'cpu' or 'cuda:0'") from None
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ArkvError(f"the device is {str(found)!r}, but torch finds no such device; try 'cpu'") from None
    return found


@contextmanager
def reading(place: object) -> Iterator[None]:
    """Within, a file that cannot be read is a `CheckpointError`."""
    try:
        yield
    except OSError as error:
        where = error.filename or place
        raise CheckpointError(f"cannot read {where}: {error.strerror or one_line(error)}") from error


def _recognised(source: str | Path) -> str:
    """The name of the model whose checkpoint is at a path or in a repository of the hub."""
    from arkv.weights.files import exists, place
    from arkv.weights.hub import fetch, is_hub_id

    points = _points("model")
    is_there = exists(place(source))
    if not is_there and not is_hub_id(source):
        is_path = isinstance(source, Path) or any(sign in str(source) for sign in "/\\~")
        more = "and there is no such file or folder" if is_path else ""
        raise UnknownNameError("model", str(source), points, more)
    found, reasons = _recognising(source, points)
    if not found and not reasons:
        # A folder of the hub's cache, or one that is refused for what it is.
        folder = fetch(source, ("config.json", "tokenizer.json"))
        if not is_there:
            found, reasons = _recognising(folder, points)
    if len(found) == 1:
        return found[0]
    if not found and reasons:
        raise CheckpointError("; ".join(dict.fromkeys(reasons)))
    told = f"may be any of {', '.join(found)}" if found else "is recognised by no registered model"
    example = found[0] if found else "NAME"
    raise CheckpointError(f"{source} {told}: name it, as in load_model({example!r}, source={str(source)!r})")


def _recognising(source: str | Path, points: Iterable[str]) -> tuple[list[str], list[str]]:
    """The models that say that a checkpoint is theirs, and why others say that theirs is not right."""
    found, reasons = [], []
    for name in sorted(points):
        try:
            if within(PATIENCE, partial(load_class("model", name).recognises, source)):
                found.append(name)
        except CheckpointError as error:
            reasons.append(str(error))
        except ArkvError:  # somebody's package is broken; it is not needed to find another one
            continue
        except (KeyboardInterrupt, Terminated):
            raise
        except BaseException as error:  # nor is one that fails here
            warn(f"the model {name!r} cannot say whether {source} is its: {one_line(error)}")
    return found, reasons


def _check_options(name: str, model_class: type[Model], options: dict[str, Any]) -> None:
    """Raise `UnknownNameError` unless the model's `from_pretrained` takes these options."""
    known = inspect.signature(model_class.from_pretrained).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of the model {name}", option, known.keys() - {"dtype", "device"})


def with_random_weights(model: Model, device: torch.device, seed: int) -> Model:
    """A model on the meta device, moved to a device and filled there."""
    from arkv.machine.memory import allocated
    from arkv.weights.checkpoint import draw_weights_

    if tables := [name for name, _ in model.named_buffers()]:
        raise ArkvError(
            f"{model.spec.name} has tables beside its weights ({tables[0]}) that cannot be drawn: load its "
            "checkpoint"
        )
    if device.type == "meta":
        return model
    draw_weights_(allocated(model, device), seed)
    return model


def _points(kind: Kind) -> dict[str, EntryPoint]:
    """Entry points by name. Of two with one name arkv's own wins, else the first distribution's."""
    claims: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUPS[kind]):
        claims.setdefault(point.name, []).append(point)
    chosen = {}
    for name, points in claims.items():
        if len(points) == 1:  # to ask who it is from takes a millisecond, and is asked for every name
            chosen[name] = points[0]
            continue
        first, *others = sorted(
            points, key=lambda p: (not _origin(p).startswith("arkv "), _origin(p), p.value)
        )
        chosen[name] = first
        # An installation that stands twice on the path registers the same thing twice.
        if rivals := sorted({_origin(point) for point in others if point.value != first.value}):
            warn(
                f"the {kind} {name!r} is registered by {_origin(first)}, which is used, and by "
                f"{', '.join(rivals)}, which is not: it has to be given another name there"
            )
    return chosen


def _origin(point: EntryPoint) -> str:
    if point.dist is None or not point.dist.name:
        return "unknown"
    return f"{point.dist.name} {point.dist.version}"


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype, or the name of one that weights can have."""
    import torch

    known = ("float32", "bfloat16", "float16", "float64")
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, (str, torch.dtype)) or name not in known:
        raise UnknownNameError("dtype", name, known)
    return typing.cast("torch.dtype", getattr(torch, name))
