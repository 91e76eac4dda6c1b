"""How vLLM's processes wait for each other on a CPU.

The engine's core hands a step to its workers and waits for what they give, and the workers wait for
the next step, by a ring in shared memory. For a second after each message a reader of vLLM 0.32
looks into the ring without a pause. Beside a GPU there are cores to spare for it. On a CPU all of
them compute: a core that waits takes its time from a worker's threads, and because it takes and
releases Python's lock all the while, the thread that receives its requests hardly gets a turn. A
request that came during an answer then waited for the end of that answer.

So a reader sleeps until the writer wakes it, as vLLM's do when they have been idle for a second.
ZeroMQ drops a wake-up that follows another too soon, hence it also looks every millisecond.
"""

from __future__ import annotations

import time
from typing import Any

# Seconds after a message in which more are expected, and milliseconds that a reader then sleeps at
# most.
BUSY = 1.0
NAP = 1


def wait_asleep() -> None:
    """Has this process's readers of vLLM's shared memory sleep while they wait."""
    try:
        from vllm.distributed.device_communicators import shm_broadcast

        looks = shm_broadcast.SpinCondition
    except (ImportError, AttributeError):
        return  # a vLLM that waits in some other way
    if looks.__module__ == __name__:
        return  # plugins are loaded more than once

    class SleepCondition(looks):  # type: ignore[misc, valid-type]
        """As vLLM's, but a reader never looks without a pause."""

        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            self.busy_loop_s = -1

        def wait(self, timeout_ms: int | None = None) -> None:
            if time.monotonic() <= self.last_read + BUSY:
                timeout_ms = NAP if timeout_ms is None else min(timeout_ms, NAP)
            super().wait(timeout_ms)

    shm_broadcast.SpinCondition = SleepCondition
