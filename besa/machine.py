"""What machine this is, in a few words for people."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

import torch


def cpu_name() -> str:
    """The processor's name, as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> str:
    """Cores, processor, threads in use, and the GPU if there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    words = [f"{cores} cores", cpu_name(), f"{torch.get_num_threads()} threads"]
    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def give_memory_back() -> None:
    """Hands what is freed back to the system, where the C library keeps it (glibc).

    Block after block of tensors too small for a mapping of their own leave holes in glibc's
    heaps: without this, the resident memory of a run grows with the number of blocks (12% from
    8 to 32 blocks of 6 MB; see benchmarks/memory.py).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
