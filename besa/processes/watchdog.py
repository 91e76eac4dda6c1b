"""Ends a process group whose owner is gone: the program of `besa.processes.child`'s watchdogs.

    python -I -S watchdog.py SECONDS     # started as the leader of its group

It reads the number of a process from its standard input, a pipe whose other end the owner holds.
That pipe closes when the owner ends, by whatever signal. The process then gets SIGTERM and SECONDS
to finish, and all of the group SIGKILL.

It is quick to start and small, because it imports nothing of besa.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_POLL_SECONDS = 0.1


def in_this_group(pid: int) -> bool:
    """Whether a process runs and belongs to this process's group: its number may be reused."""
    try:
        return os.getpgid(pid) == os.getpgrp()
    except ProcessLookupError:
        return False


def main(patience: float) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = int(sys.stdin.read() or 0)  # nothing where the owner was killed before it told
    if child and patience and in_this_group(child):
        os.kill(child, signal.SIGTERM)
        deadline = time.monotonic() + patience
        while in_this_group(child) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(float(sys.argv[1]))
