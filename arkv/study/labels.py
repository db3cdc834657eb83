"""What a row of results is called: a policy with its parameters, and how it stores keys and values."""

from __future__ import annotations

from typing import get_args

from arkv.attention.quantization import KvDtype
from arkv.options import split_commas


def labelled(policy: str, kv_dtype: KvDtype | None) -> str:
    """A policy and how it stores keys and values, as rows are found by: "linear:ratio=1/6@int8"."""
    return policy if kv_dtype is None else f"{policy}@{kv_dtype}"


def unlabelled(label: str) -> tuple[str, KvDtype | None]:
    """What `labelled` put together."""
    policy, _, ending = label.rpartition("@")
    for kv_dtype in get_args(KvDtype):
        if ending == kv_dtype:
            return policy, kv_dtype
    return label, None


def without_ratio(label: str) -> str:
    """A label without its ratio: what the rows of a policy have in common."""
    text, kv_dtype = unlabelled(label)
    name, _, parameters = text.partition(":")
    kept = [part for part in split_commas(parameters) if part.partition("=")[0].strip() != "ratio"]
    return labelled(":".join(filter(None, (name, ",".join(kept)))), kv_dtype)
