"""Models and policies by name, through the entry points `arkv.models` and `arkv.policies`.

The built-in ones use the same door as anybody else's package. Listing names imports nothing.
"""

from __future__ import annotations

import ast
import inspect
import typing
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from arkv.errors import ArkvError, CheckpointError, UnknownNameError
from arkv.options import check_type, expected, shown, split_commas

if TYPE_CHECKING:
    import torch

    from arkv.model import Model
    from arkv.policy import CachePolicy

Kind = Literal["model", "policy"]
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
    if name not in points:
        raise UnknownNameError(kind, name, points)
    try:
        loaded = points[name].load()
    except Exception as error:
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


def one_line(error: Exception) -> str:
    """Type and message of somebody else's exception, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


def load_policy(name: str, **parameters: Any) -> CachePolicy:
    """Build a policy.

    Args:
        name: as registered, or with parameters behind it: `"linear:anchors=24,recent=48"`.
        parameters: the policy's own, such as `ratio="1/6"`; they win over those in the name.

    Raises:
        UnknownNameError: there is no such policy or parameter.
        ArkvError: a parameter has the wrong type or value.
    """
    name, _, text = name.partition(":")
    policy_class = load_class("policy", name)
    given = _parse_parameters(text) | parameters
    _check_parameters(name, policy_class, given)
    try:
        return policy_class(**given)
    except ArkvError:
        raise
    except (TypeError, ValueError) as error:
        raise ArkvError(f"{name}: {' '.join(str(error).split()) or type(error).__name__}") from error


def _check_parameters(name: str, policy_class: type[CachePolicy], given: dict[str, Any]) -> None:
    """Raise `ArkvError` unless the parameters are those of the policy, of the right types, and enough."""
    known = {field.name: field for field in fields(policy_class) if field.init}
    hints = parameter_types(policy_class)
    for parameter, value in given.items():
        if not known:
            raise ArkvError(f"the policy {name} takes no parameters: leave out {parameter}={value}")
        if parameter not in known:
            raise UnknownNameError(f"parameter of the policy {name}", parameter, known)
        hint = hints.get(parameter, Any)
        if not check_type(hint, value):
            raise ArkvError(f"{name}: {parameter} is {shown(value)}, expected {expected(hint)}")
    missing = [f.name for f in known.values() if f.default is f.default_factory is MISSING]
    if absent := [parameter for parameter in missing if parameter not in given]:
        raise ArkvError(f"the policy {name} needs {' and '.join(absent)}: give it as {name}:{absent[0]}=...")


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    random_weights: bool = False,
    seed: int = 0,
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
        options: what else the model's `from_pretrained` takes: for the published families `source`, where
            its checkpoint is if not in its repository, and `revision` and `token` of the hub.

    Raises:
        UnknownNameError: there is no such model, or it takes no such option.
        CheckpointError: its weights cannot be read, or nobody recognises them.
    """
    import torch

    from arkv.weights.packing import pack_

    if name not in _points("model"):
        name, options["source"] = _recognised(name), name
    model_class = load_class("model", str(name))
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ArkvError(f"unknown device {device!r}: expected a name such as 'cpu' or 'cuda:0'") from error
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ArkvError(f"the device is {str(device)!r}, but torch finds no such device; try 'cpu'") from None
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = torch_dtype(dtype)
    _check_options(str(name), model_class, options)
    if random_weights:
        model = model_class.from_pretrained(dtype=dtype, device=torch.device("meta"), **options)
        model = _with_random_weights(model, device, seed)
    else:
        model = model_class.from_pretrained(dtype=dtype, device=device, **options)
    pack_(model)
    return model


def _recognised(source: str | Path) -> str:
    """The name of the model whose checkpoint is at a path or in a repository of the hub."""
    from arkv.weights.hub import fetch, is_hub_id

    points = _points("model")
    exists = Path(source).exists()
    if not exists and not is_hub_id(source):
        raise UnknownNameError("model", str(source), points)
    candidates = {}
    for name in sorted(points):
        try:
            candidates[name] = load_class("model", name).recognises
        except ArkvError:  # somebody's package is broken; it is not needed to find another one
            continue
    found = [name for name, recognises in candidates.items() if recognises(source)]
    if not found and not exists:
        folder = fetch(source, ("config.json",))
        found = [name for name, recognises in candidates.items() if recognises(folder)]
    if len(found) == 1:
        return found[0]
    told = f"may be any of {', '.join(found)}" if found else "is recognised by no registered model"
    example = found[0] if found else "NAME"
    raise CheckpointError(f"{source} {told}: name it, as in load_model({example!r}, source={str(source)!r})")


def _check_options(name: str, model_class: type[Model], options: dict[str, Any]) -> None:
    """Raise `UnknownNameError` unless the model's `from_pretrained` takes these options."""
    known = inspect.signature(model_class.from_pretrained).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for option in options:
        if option not in known:
            raise UnknownNameError(f"option of the model {name}", option, known.keys() - {"dtype", "device"})


def _with_random_weights(model: Model, device: torch.device, seed: int) -> Model:
    """A model on the meta device, moved to a device and filled there."""
    from arkv.weights.checkpoint import draw_weights_

    if tables := [name for name, _ in model.named_buffers()]:
        raise ArkvError(
            f"{model.spec.name} has tables beside its weights ({tables[0]}) that cannot be drawn: load its "
            "checkpoint"
        )
    if device.type == "meta":
        return model
    model.to_empty(device=device)
    draw_weights_(model, seed)
    return model


def _points(kind: Kind) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUPS[kind])}


def _origin(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "unknown"


def torch_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype, or the name of one that weights can have."""
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    known = ("float32", "bfloat16", "float16")
    if dtype not in known:
        raise UnknownNameError("dtype", dtype, known)
    return typing.cast(torch.dtype, getattr(torch, dtype))


def _parse_parameters(text: str) -> dict[str, Any]:
    """`"anchors=24,ratio=1/6"` to a dictionary; what is not a Python literal stays text."""
    parsed = {}
    for part in filter(None, split_commas(text)):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ArkvError(
                f"cannot read {part!r}: expected parameter=value, as in 'linear:anchors=24,recent=48'"
            )
        try:
            parsed[name.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            parsed[name.strip()] = value.strip()
    return parsed


def parameter_types(policy_class: type[CachePolicy]) -> dict[str, Any]:
    """The types of the fields; none at all where one names something imported for type checkers only."""
    try:
        return get_type_hints(policy_class)
    except NameError:
        return {}
