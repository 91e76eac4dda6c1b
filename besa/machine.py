"""What machine this is: in a few words for people, and fact by fact for `besa doctor`.

>>> machine()                 # '2 cores, Intel(R) Xeon(R) Processor, 2 threads'
'... cores, ...'
>>> memory().total > memory().available
True

psutil tells what every system knows. The rest is read from where Linux tells it: what a system does
not tell is None, or not there.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_CPUS = Path("/sys/devices/system/cpu")

# Those that make a difference to the kernels, besa's or torch's, by the system's own names.
_FEATURES = {
    "x86_64": (
        *("avx2", "avx_vnni", "avx512f", "avx512_vbmi2", "avx512_bf16", "avx512_vnni"),
        *("amx_tile", "amx_bf16", "amx_int8"),
    ),
    "aarch64": ("asimd", "asimddp", "asimdfhm", "sve", "bf16", "i8mm"),
}

_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)\b[^/]*\.so[.\d]*$")


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def machine() -> str:
    """Cores, processor, threads in use, and the GPU if there is one."""
    import torch  # takes a second, which those who ask for memory or cores alone need not wait

    words = [f"{cores()} cores", cpu_name(), f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_share() -> float | None:
    """How many cores' time a container grants; None without such a limit."""
    shares = []
    for words in _limits("cpu", "cpu.max"):
        quota, period = words.split()
        if quota != "max":
            shares.append(int(quota) / int(period))
    for quota, period in zip(
        _limits("cpu", "cpu.cfs_quota_us"), _limits("cpu", "cpu.cfs_period_us"), strict=False
    ):
        if int(quota) > 0:
            shares.append(int(quota) / int(period))
    return min(shares, default=None)


def busy_seconds() -> float:
    """The time that the cores have worked since the system started, for whatever program."""
    times = psutil.cpu_times()
    busy = ("user", "nice", "system", "irq", "softirq", "steal")  # the last: other virtual machines
    return float(sum(getattr(times, name, 0.0) for name in busy))


def cpu_features() -> dict[str, bool]:
    """Which of the instruction sets that matter the processor has."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features") or "").split()
    return {name: name in flags for name in _FEATURES.get(platform.machine(), ())}


def cache_size() -> int | None:
    """Bytes of all last-level caches together: a processor may have one for every few cores."""
    sizes: dict[int, dict[str, int]] = {}
    for cache in _CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        level, shared, size = (_text(cache / x) for x in ("level", "shared_cpu_list", "size"))
        if level and size:
            kib = size.strip().removesuffix("K")
            sizes.setdefault(int(level), {})[shared] = int(kib) * 1024
    return sum(sizes[max(sizes)].values()) if sizes else None


@dataclass(frozen=True)
class Memory:
    """Bytes of memory in all, available now, granted by a container, and of swap in use."""

    total: int
    available: int
    limit: int | None
    swap_used: int


def memory() -> Memory:
    """The memory of this machine, or of the container that this process is in."""
    system = psutil.virtual_memory()
    limits = [
        int(words)
        for name in ("memory.max", "memory.limit_in_bytes")
        for words in _limits("memory", name)
        if words != "max"
    ]
    # Where there is no limit, an older kernel names a number beyond all memory.
    limit = min((x for x in limits if x < system.total), default=None)
    available = system.available if limit is None else min(system.available, limit)
    return Memory(system.total, available, limit, psutil.swap_memory().used)


def peak_memory() -> int:
    """The most memory that this process had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def openmp_runtimes() -> list[str]:
    """The OpenMP libraries that this process has loaded: with more than one, threads fight."""
    mapped = (line.split(maxsplit=5)[-1] for line in _text(_PROC / "self/maps").splitlines())
    return sorted({str(Path(path).resolve()) for path in mapped if _OPENMP.search(path)})


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch can use; its memory is in bytes."""

    name: str
    memory: int
    compute_capability: str
    driver: str | None


def gpus() -> list[Gpu]:
    """The GPUs that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    driver = _driver()
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        Gpu(each.name, each.total_memory, f"{each.major}.{each.minor}", driver) for each in found
    ]


def has_nvidia_gpu() -> bool:
    """Whether the system has one, be it that torch can use it or not."""
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    told = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", _text(_PROC / "driver/nvidia/version"))
    if told:
        return told[1]
    if (command := shutil.which("nvidia-smi")) is None:
        return None
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
    return answer.stdout.split("\n")[0].strip() or None


def _cpuinfo(name: str) -> str | None:
    """What /proc/cpuinfo says of the first core under a name."""
    told = re.search(rf"^{name}\s*:\s*(.*)$", _text(_PROC / "cpuinfo"), re.MULTILINE)
    return told[1].strip() if told else None


def _limits(controller: str, name: str) -> Iterator[str]:
    """What the control groups around this process say in their files `name`, innermost first."""
    for line in _text(_PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2: one hierarchy
            root = _CGROUPS
        elif controller in controllers.split(","):
            root = _CGROUPS / controllers
        else:
            continue
        # In a container the path may be the host's; then only the root is there.
        folder = root / path.lstrip("/")
        while True:
            if words := _text(folder / name).strip():
                yield words
            if folder == root:
                break
            folder = folder.parent


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def give_memory_back() -> None:
    """Hands what is freed back to the system, where the C library keeps it (glibc).

    Block after block of tensors too small for a mapping of their own leave holes in glibc's
    heaps: without this, the resident memory of a run grows with the number of blocks (12% from
    8 to 32 blocks of 6 MB; see benchmarks/memory.py).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
