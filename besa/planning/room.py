"""What a run may take of this machine: memory, the device's memory, and the disk.

>>> room = room_for(torch.device("cpu"), Path("."))
>>> room.host > 0, room.device is None, room.disk > 0
(True, True, True)
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from besa.machine import memory, peak_memory


@dataclass(frozen=True)
class Room:
    """Bytes that a run may take.

    Attributes:
        host: of memory: what is available, and what this process has already.
        process: what this process has: Python, torch and transformers without a model.
        device: of the device's memory; None where that is the host's.
        disk: free where the output goes.
    """

    host: int
    process: int
    device: int | None
    disk: int

    def lacking(self, needed: Mapping[str, int]) -> dict[str, int]:
        """Bytes that are missing, of what there is too little: "memory", "device", "disk".

        Args:
            needed: bytes, by the same names.
        """
        there = {"memory": self.host, "device": self.device or needed.get("device", 0)}
        there["disk"] = self.disk
        missing = {name: count - there[name] for name, count in needed.items()}
        return {name: count for name, count in missing.items() if count > 0}


def room_for(device: torch.device, out: Path) -> Room:
    """The room there is now for an output at a path, which need not exist."""
    process = peak_memory()  # more than it has now, where the system took pages of code away
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    place = out.absolute()
    while not place.exists():
        place = place.parent
    available = memory().available + psutil.Process().memory_info().rss
    return Room(available, process, free, shutil.disk_usage(place).free)
