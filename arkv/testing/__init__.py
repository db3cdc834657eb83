"""Conformance tests for the authors of cache policies, and the tiny model and the oracle behind them.

    from arkv.testing import PolicySuite

    class TestMine(PolicySuite):
        policy = MyPolicy

This package is the only part of arkv that needs pytest and hypothesis.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
    import pytest
except ImportError as error:
    raise ImportError(
        f"arkv.testing needs pytest and hypothesis ({error}): pip install 'arkv[test]'"
    ) from error

# pytest explains a failed assertion only in modules that it was told of before they are imported.
for _module in ("checks", "invariants", "suite"):
    pytest.register_assert_rewrite(f"{__name__}.{_module}")

from arkv.testing.cases import Case as Case
from arkv.testing.oracle import Oracle as Oracle
from arkv.testing.suite import PolicySuite as PolicySuite
from arkv.testing.tiny import Tiny as Tiny
from arkv.testing.tiny import random_tokens as random_tokens

__all__ = ["Case", "Oracle", "PolicySuite", "Tiny", "random_tokens"]
