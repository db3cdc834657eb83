"""How much memory is free, for a process that may live in a container."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
"""Limit and use of memory of this process's container, under both versions of control groups."""


def available_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device, or None where nobody can say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return min([int(fields["MemAvailable"].split()[0]) * 1024, *_container_memory()])
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _container_memory() -> list[int]:
    """Bytes that the control group of this process has left, for each limit that it has."""
    left = []
    for limit, used in CGROUP_FILES:
        try:
            left.append(int(limit.read_text()) - int(used.read_text()))
        except (OSError, ValueError):  # no such file, or no limit ("max")
            continue
    return left
