"""What is read of the system: on made-up machines, that this one is not."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from besa import machine

HUGE = 2**63 - 4096  # version 1's way to say that there is no limit
GIB = 2**30


class System:
    """A /proc and a /sys to be filled in."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        monkeypatch.setattr(machine, "_PROC", root / "proc")
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"))
        monkeypatch.setattr(machine, "_CGROUPS", root / "cgroup")
        monkeypatch.setattr(machine, "_CPUS", root / "cpu")

    def write(self, path: str, text: object) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


def test_this_machine():
    assert machine.machine().startswith(f"{machine.cores()} cores, {machine.cpu_name()}, ")
    assert machine.cores() == len(os.sched_getaffinity(0))
    memory = machine.memory()
    assert (
        0
        < memory.available
        <= memory.total
        == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    assert any("libgomp" in path for path in machine.openmp_runtimes())
    capability = torch.backends.cpu.get_cpu_capability()
    features = machine.cpu_features()
    if capability == "AVX512":
        assert features["avx512f"]
        assert features["avx2"]


@pytest.mark.usefixtures("system")
def test_a_system_that_tells_nothing():
    assert machine.cpu_name()
    assert machine.core_share() is None
    assert machine.cache_size() is None
    assert not any(machine.cpu_features().values())
    assert machine.openmp_runtimes() == []


@pytest.mark.parametrize(
    ("architecture", "line", "expected"),
    [
        ("x86_64", "flags\t\t: fpu avx2 avx512f amx_tile", {"avx2", "avx512f", "amx_tile"}),
        ("aarch64", "Features\t: fp asimd i8mm", {"asimd", "i8mm"}),
        ("riscv64", "isa\t: rv64", set()),
    ],
)
def test_cpu_features(
    system: System,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    line: str,
    expected: set[str],
):
    monkeypatch.setattr(machine.platform, "machine", lambda: architecture)
    system.write("proc/cpuinfo", f"processor\t: 0\n{line}\n\nprocessor\t: 1\n")
    features = machine.cpu_features()
    assert {name for name, there in features.items() if there} == expected


def test_last_level_caches_are_added_up(system: System):
    for cpu in range(4):
        pair = "0-1" if cpu < 2 else "2-3"
        caches = [(1, "32K", cpu), (2, "1024K", cpu), (3, "98304K", pair)]
        for index, (level, size, shared) in enumerate(caches):
            folder = f"cpu/cpu{cpu}/cache/index{index}"
            system.write(f"{folder}/level", level)
            system.write(f"{folder}/size", size)
            system.write(f"{folder}/shared_cpu_list", shared)
    assert machine.cache_size() == 2 * 96 * 2**20


def meminfo(system: System) -> None:
    sizes = {"MemTotal": 64 << 20, "MemFree": 16 << 20, "MemAvailable": 32 << 20}
    sizes |= dict.fromkeys(("Buffers", "Cached", "Shmem", "Active", "Inactive"), 1 << 20)
    sizes |= {"SwapTotal": 1024, "SwapFree": 24}
    system.write("proc/meminfo", "\n".join(f"{name}: {kib} kB" for name, kib in sizes.items()))
    system.write("proc/vmstat", "pswpin 0\npswpout 0")


def test_memory_without_a_limit(system: System):
    meminfo(system)
    system.write("proc/self/cgroup", "4:memory:/a/b\n0::/")
    system.write("cgroup/memory/a/b/memory.limit_in_bytes", HUGE)
    assert machine.memory() == machine.Memory(64 * GIB, 32 * GIB, None, 1_024_000)


@pytest.mark.parametrize(
    ("groups", "file"),
    [
        ("0::/", "cgroup/memory.max"),
        ("0::/user/session", "cgroup/user/memory.max"),
        ("0::/of/the/host", "cgroup/memory.max"),
        ("5:cpu:/\n4:memory:/docker/abc", "cgroup/memory/memory.limit_in_bytes"),
    ],
)
def test_memory_in_a_container(system: System, groups: str, file: str):
    meminfo(system)
    system.write("proc/self/cgroup", groups)
    system.write(file, 8 * GIB)
    assert machine.memory().limit == machine.memory().available == 8 * GIB


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a", {"cpu.max": "150000 100000", "a/cpu.max": "max 100000"}, 1.5),
        ("0::/a", {"cpu.max": "150000 100000", "a/cpu.max": "50000 100000"}, 0.5),
        ("0::/", {"cpu.max": "max 100000"}, None),
        (
            "3:cpu,cpuacct:/x",
            {
                "cpu,cpuacct/cpu.cfs_quota_us": "400000",
                "cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            4,
        ),
        ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_core_share(system: System, groups: str, files: dict[str, str], expected: float | None):
    system.write("proc/self/cgroup", groups)
    for name, text in files.items():
        system.write(f"cgroup/{name}", text)
    assert machine.core_share() == expected


def test_busy_seconds(system: System):
    system.write("proc/stat", "cpu  100 20 30 9000 800 5 7 38 100 0\ncpu0 1 2 3 4 5 6 7 8 9 0")
    assert machine.busy_seconds() == pytest.approx(200 / os.sysconf("SC_CLK_TCK"))


def test_openmp_runtimes(system: System):
    names = ("libgomp.so.1", "libgomp-a34b3233.so.1.0.0", "libiomp5.so", "libomp.so", "libompi.so")
    lines = [f"7f00-7f01 r-xp 00000000 00:1f 12 {' ' * 20}/opt/my libs/{name}" for name in names]
    system.write("proc/self/maps", "\n".join([*lines, lines[0], "7f02-7f03 rw-p 0 00:00 0"]))
    found = [Path(path).name for path in machine.openmp_runtimes()]
    assert found == sorted(names[:4])


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build",
    ],
)
def test_driver(system: System, line: str):
    system.write("proc/driver/nvidia/version", line)
    assert machine._driver() == "535.104.05"
