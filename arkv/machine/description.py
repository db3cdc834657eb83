"""What has to be known of a machine and a run to compare what was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from arkv.model import Model

BUILT_FROM = Path(__file__).parents[1] / "_commit.txt"
"""What the build notes (see setup.py)."""


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Date, versions and machine, ready for JSON."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arkv": version("arkv"),
        "commit": _commit(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    }


def describe_run(model: Model, seed: int, guidance: float | None) -> dict[str, Any]:
    """What has to be known to compare measurements: versions, machine and settings, ready for JSON."""
    return {
        **describe_machine(model.device),
        "model": model.spec.name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "guidance": model.spec.guidance if guidance is None else guidance,
        "seed": seed,
    }


def _commit() -> str | None:
    """Commit of the checkout that this file runs from, or of the build; "-dirty" behind it if changed.

    None where neither is known.
    """
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    try:
        # An installed copy may lie inside somebody else's repository.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True)
        describe = [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(describe, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return BUILT_FROM.read_text().strip() if BUILT_FROM.exists() else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
