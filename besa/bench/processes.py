"""The processes of a server: which they are, their memory, and what they compute.

processes = family(pid)
memory_of(processes)["steady"]      # bytes

Read from /proc; nothing is sampled while a measurement runs.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    """A process, its descendants, and whoever is in its session."""
    parents, sessions = {}, {}
    for entry in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            parents[int(entry.name)], sessions[int(entry.name)] = int(fields[1]), int(fields[3])
    found = {pid} | {one for one, session in sessions.items() if session == pid}
    while more := {one for one, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found & set(parents))


def memory_of(pids: Iterable[int]) -> dict[str, int | None]:
    """Bytes: what the processes hold now (shared pages once), the most they held, and GPU memory.

    The peak is the sum of each process's own, which the kernel keeps: pages that several share
    are in it several times.
    """
    chosen = list(pids)
    steady = [_field(pid, "smaps_rollup", "Pss:") for pid in chosen]
    peak = [_field(pid, "status", "VmHWM:") for pid in chosen]
    return {
        "steady": sum(x or 0 for x in steady) if any(steady) else None,
        "peak": sum(x or 0 for x in peak) if any(peak) else None,
        "gpu": _gpu_memory(set(chosen)),
    }


def _field(pid: int, file: str, name: str) -> int | None:
    with suppress(OSError):
        for line in (_PROC / str(pid) / file).read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return None


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
    total = 0
    for pid in pids:
        with suppress(OSError, ValueError, IndexError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def listener(url: str) -> int | None:
    """The process on this machine that listens where the URL points; None if none is seen."""
    parts = urlsplit(url)
    if parts.hostname not in ("127.0.0.1", "localhost", "::1"):
        return None
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    sockets = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    sockets.add(f"socket:[{fields[9]}]")
    for entry in _PROC.glob("[0-9]*"):
        with suppress(OSError):
            if any(str(link.readlink()) in sockets for link in (entry / "fd").iterdir()):
                return int(entry.name)
    return None
