"""arkv: autoregressive image generation with a small part of the KV cache.

decoder = arkv.Decoder(arkv.load_model("scenes"), arkv.load_policy("linear", ratio="1/6"))
result = decoder.generate(["a red circle left of a blue square"], seeds=[0])
result.images[0].save("picture.png")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arkv.decoder import Decoder as Decoder
    from arkv.decoder import ForcedLogits as ForcedLogits
    from arkv.decoder import Result as Result
    from arkv.errors import ArkvError as ArkvError
    from arkv.grid import Grid as Grid
    from arkv.model import Condition as Condition
    from arkv.model import Model as Model
    from arkv.model import ModelSpec as ModelSpec
    from arkv.policy import CachePolicy as CachePolicy
    from arkv.policy import Observation as Observation
    from arkv.policy import RankedPolicy as RankedPolicy
    from arkv.registry import load_model as load_model
    from arkv.registry import load_policy as load_policy
    from arkv.store import CachePlan as CachePlan
    from arkv.store import Store as Store

    __version__: str

# Resolved on first use, so that `arkv --help` does not wait for torch.
_HOMES = {
    "ArkvError": "errors",
    "CachePlan": "store",
    "CachePolicy": "policy",
    "Condition": "model",
    "Decoder": "decoder",
    "ForcedLogits": "decoder",
    "Grid": "grid",
    "Model": "model",
    "ModelSpec": "model",
    "Observation": "policy",
    "RankedPolicy": "policy",
    "Result": "decoder",
    "Store": "store",
    "load_model": "registry",
    "load_policy": "registry",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("arkv")
    if name not in _HOMES:
        raise AttributeError(f"module 'arkv' has no attribute {name!r}")
    return getattr(import_module(f"arkv.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
