"""Free memory: of containers within containers, and where there is no Linux to ask."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from arkv.machine import memory
from arkv.machine.memory import available_memory

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 23 GB free and no limits."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", f"MemTotal: 30000000 kB\nMemAvailable: {23 * GB // 1024} kB\n")
    return tmp_path


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n")


def limit(system: Path, group: str, most: object, used: int, cache: int = 0, version: int = 2) -> None:
    folder = system / "cgroup" / ("memory" if version == 1 else "") / group
    names = ("memory.max", "memory.current", "inactive_file")
    if version == 1:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    write(folder / names[0], most)
    write(folder / names[1], used)
    write(folder / "memory.stat", f"anon 3\n{names[2]} {cache}")


def join(system: Path, group: str, version: int = 2) -> None:
    line = f"0::/{group}" if version == 2 else f"7:cpu,cpuacct:/\n5:memory:/{group}"
    write(system / "proc" / "self" / "cgroup", line)


def test_without_a_limit_it_is_what_the_machine_has(system: Path) -> None:
    assert available_memory(CPU) == 23 * GB // 1024 * 1024
    limit(system, "", "max", 5)
    join(system, "slurm/job_7")
    assert available_memory(CPU) == 23 * GB // 1024 * 1024


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("limited", ["", "slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_a_limit_of_any_group_above_counts(system: Path, version: int, limited: str) -> None:
    join(system, "slurm/job_7/step_0", version)
    for group in ("", "slurm", "slurm/job_7", "slurm/job_7/step_0"):
        limit(system, group, "max" if version == 2 else 2**63 - 4096, 10, version=version)
    limit(system, limited, 3 * GB // 2, GB // 2, version=version)
    assert available_memory(CPU) == GB
    limit(system, limited, 3 * GB // 2, GB, cache=GB // 4, version=version)
    assert available_memory(CPU) == GB // 2 + GB // 4, "pages of files are given back"
    limit(system, limited, GB, 2 * GB, version=version)
    assert available_memory(CPU) == 0


def test_a_container_that_sees_its_own_root_only_has_its_limit(system: Path) -> None:
    join(system, "docker/0123abc")  # as the host calls it, which is no folder here
    limit(system, "", 2 * GB, GB)
    assert available_memory(CPU) == GB


def test_a_group_outside_of_what_is_seen_is_no_way_out(system: Path) -> None:
    join(system, "../../../etc")
    limit(system, "", 2 * GB, GB)
    assert available_memory(CPU) == GB


def test_windows_has_neither_proc_nor_sysconf(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc" / "meminfo").unlink()
    for name in ("sysconf", "sysconf_names"):
        monkeypatch.delattr(os, name)
    assert available_memory(CPU) is None
    from tiny import Tiny

    from arkv import Decoder, load_policy

    model = Tiny()
    assert Decoder(model, load_policy("full")).generate(model.example_prompts(1, 0)).tokens.shape == (1, 20)


def test_a_mac_has_sysconf_only(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc" / "meminfo").unlink()
    monkeypatch.setattr(os, "sysconf_names", {"SC_AVPHYS_PAGES": 1, "SC_PAGE_SIZE": 2})
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_memory(CPU) == 4_096_000
    monkeypatch.setattr(os, "sysconf_names", {})
    assert available_memory(CPU) is None


def test_of_other_devices_nobody_can_say() -> None:
    assert available_memory(torch.device("mps")) is None
