"""The code that Inductor writes for a GPU, on a machine without one: no copy of the cache, no more launches.

Nothing is run: see `cuda_code.py`. It needs the build of torch for CUDA, which the environment with the
oldest supported versions has.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from arkv.registry import load_class, names

SCRIPT = Path(__file__).with_name("cuda_code.py")
HELPERS = Path(__file__).parents[1] / "helpers"
EIGHT_BITS = ("int8", "fp8")
LAUNCHES = {
    "janus": (5, 4, 1),
    "llamagen": (5, 4, 1),
    "lumina": (8, 4, 1),
    "emu3": (6, 4, 1),
    "emu3.5": (6, 4, 1),
    "janus-int4": (5, 0, 5),
    "janus-window": (5, 4, 1),
}
"""Of a layer: kernels of Inductor's, products, and operators of ours. Nobody may add one unawares.

With grouped heads queries and keys are of two sizes, and turned by a kernel each."""
LAUNCHES_OF_A_PASS = (8, 4, 1)
"""Of a window: it keeps what a policy will be shown, and each query sees slots of its own."""
SORT, TOP_K = "aten.sort.stable", "aten.topk.default"
"""What torch has kernels for, better than Inductor's; once a line, in evictions only."""
FEW_SIZES = ("ssd", "pyramid", "front")
"""Policies whose heads are of a few sizes: they select by top-k, and a sort of the pool would be more."""

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="needs torch's build for CUDA, though no GPU"
)


def case(policy: str, kv_dtype: str | None = None) -> str:
    """As `cuda_code.py` takes it; HEADS stands for a profile of the model's heads."""
    known = {field.name for field in dataclasses.fields(load_class("policy", policy))}
    given = {"ratio": "1/6", "profile": "HEADS"}
    parameters = ",".join(f"{name}={value}" for name, value in given.items() if name in known)
    return policy + (f":{parameters}" if parameters else "") + (f"@{kv_dtype}" if kv_dtype else "")


ALL = [case(entry.name) for entry in names("policy")]
# One that looks, one that does not, one with unequal heads, one whose heads share a pool.
KINDS = [case(policy) for policy in ("linear", "full", "ssd", "adakv")]
NARROW = [case(policy, kv_dtype) for policy in ("linear", "ssd") for kv_dtype in EIGHT_BITS]
EVERYTHING = [case(entry.name, kv) for entry in names("policy") for kv in (None, *EIGHT_BITS)]


def written(family: str, cases: list[str]) -> list[dict[str, Any]]:
    """What `cuda_code.py` says of the cases."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), family, *cases],
        env=os.environ | {"PYTHONPATH": str(HELPERS), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def faults(family: str, row: dict[str, Any]) -> list[str]:
    """What is wrong with the code of one function."""
    if "failed" in row:
        return [f"{row['case']}: no code was written: {row['failed']}"]
    function, found = row["function"], []
    evicts = function.startswith("recycle")
    policy = row["case"].partition(":")[0]
    known = set() if not evicts else {TOP_K} if policy in FEW_SIZES else {TOP_K, SORT}
    if unknown := set(row["eager"]) - known:
        found.append(f"falls back to {sorted(unknown)}")
    if row["largest"] >= row["leaf"]:
        found.append(f"allocates {row['largest_is']}, as much as the keys of a layer")
    if function == "enter_" and row["largest"] >= row["statistic"] and family != "janus-window":
        found.append(f"allocates {row['largest_is']}, as much as all positions")
    usual = {"step_block": LAUNCHES[family], "pass_block": LAUNCHES_OF_A_PASS}.get(function)
    launches = (row["triton"], row["products"], row["attention"])
    if usual is not None and any(one > most for one, most in zip(launches, usual, strict=True)):
        found.append(f"launches {launches} a layer: {usual} did")
    return [f"{row['case']}, {function}: {fault}" for fault in found]


def check(family: str, cases: list[str]) -> None:
    rows = written(family, cases)
    assert [fault for row in rows for fault in faults(family, row)] == []
    compiled = {one: {row["function"] for row in rows if row["case"] == one} for one in cases}
    expected = {"recycle_", "enter_", "step_block", "head"}
    expected |= {"pass_block", "finish_"} if family == "janus-window" else set()
    assert all(expected <= functions for functions in compiled.values())


@needs_cuda_build
@pytest.mark.parametrize(
    ("family", "cases"),
    [
        ("janus", ALL + NARROW),
        ("llamagen", KINDS),
        ("lumina", KINDS),
        ("emu3", KINDS[:1]),
        ("emu3.5", KINDS),
        ("janus-int4", KINDS[:1]),
        ("janus-window", KINDS),
    ],
    ids=LAUNCHES,
)
def test_code_for_cuda_copies_no_cache_and_launches_no_more(family: str, cases: list[str]) -> None:
    check(family, cases)


@needs_cuda_build
@pytest.mark.slow
@pytest.mark.parametrize("family", LAUNCHES)
def test_code_for_cuda_of_every_policy_and_storage(family: str) -> None:
    check(family, EVERYTHING)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"largest": 100}, "as much as the keys"),
        ({"function": "enter_", "largest": 10}, "as much as all positions"),
        ({"triton": 6}, "launches"),
        ({"function": "pass_block", "attention": 2}, "launches"),
        ({"eager": ["aten.sort.stable"]}, "falls back"),
        ({"case": "ssd:tau=1", "function": "recycle_", "eager": ["aten.sort.stable"]}, "falls back"),
        ({"failed": "no"}, "no code"),
    ],
)
def test_faults_are_seen(change: dict[str, Any], fault: str) -> None:
    good = {
        "case": "linear:ratio=1/6",
        "function": "step_block",
        "triton": 5,
        "products": 4,
        "attention": 1,
        "eager": [],
        "largest": 9,
        "largest_is": "[9] torch.int8",
        "leaf": 100,
        "statistic": 10,
    }
    assert faults("janus", good) == []
    assert fault in faults("janus", good | change)[0]
