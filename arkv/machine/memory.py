"""How much memory is free, for a process that may live in a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from arkv.errors import MemoryLimitError

AnyModule = TypeVar("AnyModule", bound=nn.Module)

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux tells of its processes and of its control groups."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where nobody can say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return max(0, min([int(fields["MemAvailable"].split()[0]) * 1024, *_left_in_groups()]))
    except (OSError, KeyError, ValueError):  # not Linux
        pass
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):  # Windows has no such table
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def allocated(module: AnyModule, device: torch.device) -> AnyModule:
    """A module on the meta device, moved to a device that has room for it; its weights are not set.

    Raises:
        MemoryLimitError: the device has not as much memory free. Found out later, the process is killed.
    """
    tensors = [*module.parameters(), *module.buffers()]
    needed, free = sum(tensor.nbytes for tensor in tensors), available_memory(device)
    if free is not None and needed > free:
        narrower = "a narrower dtype (bfloat16), " if tensors[0].element_size() > 2 else ""
        raise MemoryLimitError(
            f"the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB is free on {device}: take "
            f"{narrower}another device or a smaller model"
        )
    return module.to_empty(device=device)


def _left_in_groups() -> Iterator[int]:
    """Bytes that each control group has left which this process is in, directly or by way of another.

    A group may be limited by any of those above it, so all are asked, of both versions of control groups.
    """
    for folder, limit, used, cache in _groups():
        try:
            # Pages of files are given back as soon as somebody needs them.
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            reclaimable = int(statistics.get(cache, 0))
        except (OSError, ValueError):
            reclaimable = 0
        try:
            yield int((folder / limit).read_text()) - int((folder / used).read_text()) + reclaimable
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """Folders of the groups from this process's own to the root; names of limit, use and reclaimable part."""
    first = ("memory.max", "memory.current", "inactive_file")
    second = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    try:
        told = (PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        told = []
    # The root is there whatever the file says, which in a container may be a path outside of it.
    places = {(CGROUPS, first), (CGROUPS / "memory", second)}
    for line in told:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            root, names = CGROUPS, first
        elif "memory" in controllers.split(","):
            root, names = CGROUPS / "memory", second
        else:
            continue
        group = Path(os.path.normpath("/" + path.lstrip("/"))).relative_to("/")
        places |= {(root / each, names) for each in (group, *group.parents)}
    for folder, names in sorted(places):
        yield folder, *names
