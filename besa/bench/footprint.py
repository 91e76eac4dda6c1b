"""What a server's processes take of the machine: memory, and the cores' time.

>>> import os
>>> footprint = Footprint(os.getpid())
>>> footprint.update()
>>> footprint.memory.peak > 1_000_000     # bytes
True
"""

from __future__ import annotations

from besa.bench.results import Memory
from besa.processes.usage import cpu_seconds, family, memory_of


class Footprint:
    """Of a process and all that it starts.

    Args:
        pid: None where the process cannot be seen: then nothing is known, and no time is used.

    Attributes:
        memory: what `update` saw: the last steady value, and the highest of the others.
    """

    def __init__(self, pid: int | None) -> None:
        self.pid = pid
        self.memory = Memory()

    def update(self) -> None:
        """Looks at the memory again."""
        if self.pid is None:
            return
        now, before = Memory(**memory_of(family(self.pid))), self.memory
        self.memory = Memory(
            steady=now.steady,
            peak=_higher(now.peak, before.peak),
            gpu=_higher(now.gpu, before.gpu),
        )

    def cpu(self) -> float:
        """Seconds that the processes have computed."""
        return cpu_seconds(family(self.pid)) if self.pid is not None else 0.0


def _higher(a: int | None, b: int | None) -> int | None:
    return max((x for x in (a, b) if x is not None), default=None)
