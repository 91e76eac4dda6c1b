"""What the processes of a server use: which they are, their memory, and what they compute.

>>> import os
>>> processes = family(os.getpid())
>>> os.getpid() in processes
True
>>> bytes_held = memory_of(processes)["steady"]
>>> seconds = cpu_seconds(processes)

Nothing is sampled while a measurement runs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import psutil


def family(pid: int) -> list[int]:
    """A process and its descendants; empty if it has ended."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        return sorted(each.pid for each in [first, *first.children(recursive=True)])
    return []


def memory_of(pids: Iterable[int]) -> dict[str, int | None]:
    """Bytes: what the processes hold now (shared pages once), the most they held, and GPU memory.

    The peak is the sum of each process's own, which the kernel keeps: pages that several share
    are in it several times.
    """
    chosen = list(pids)
    return {
        "steady": sum(map(_proportional_set_size, chosen)) or None,
        "peak": sum(map(_peak, chosen)) or None,
        "gpu": _gpu_memory(set(chosen)),
    }


def _proportional_set_size(pid: int) -> int:
    """Bytes in memory, each shared page divided by those that share it; 0 if it has ended."""
    with suppress(psutil.Error, OSError):
        return int(psutil.Process(pid).memory_full_info().pss)
    return 0


def _peak(pid: int) -> int:
    """The most bytes that were in memory at a time, which psutil does not tell on Linux."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _gpu_memory(pids: set[int]) -> int | None:
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    used = 0
    for line in answer.stdout.splitlines():
        pid, _, mebibytes = line.partition(",")
        if pid.strip().isdigit() and mebibytes.strip().isdigit() and int(pid) in pids:
            used += int(mebibytes) << 20
    return used or None


def cpu_seconds(pids: Iterable[int]) -> float:
    """The time that the processes have computed since they started."""
    total = 0.0
    for pid in pids:
        with suppress(psutil.Error):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system
    return total


def listener(url: str) -> int | None:
    """The process on this machine that listens where the URL points; None if none is seen."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    with suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            listens = connection.status == psutil.CONN_LISTEN
            if listens and connection.laddr and connection.laddr.port == port:
                return connection.pid
    return None
