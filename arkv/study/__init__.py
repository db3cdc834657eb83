"""What a policy does to pictures: accuracy, attention lost, what a cache holds, and figures of it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arkv.study.comparison import Comparison as Comparison
    from arkv.study.comparison import compare_policies as compare_policies
    from arkv.study.evaluation import Evaluation as Evaluation
    from arkv.study.evaluation import Settings as Settings
    from arkv.study.pairs import Pair as Pair

# Resolved on first use: whoever wants a figure does not wait for the rest.
_HOMES = {
    "Comparison": "comparison",
    "Evaluation": "evaluation",
    "Pair": "pairs",
    "Settings": "evaluation",
    "compare_policies": "comparison",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'arkv.study' has no attribute {name!r}")
    return getattr(import_module(f"arkv.study.{_HOMES[name]}"), name)
