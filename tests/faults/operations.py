"""What a process does to files, counted from within; it may kill itself at any of them.

Moments are drawn over a run's own progress, so that they are the same on any machine:

    total = count of an undisturbed run (`report`)
    kill_at = 1 … total

An operation is whatever Python tells its audit hooks of that names a path within a folder: to open,
rename, remove, make a directory. A moment may also be some microseconds after one of them, in the
midst of what native code writes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile")
_CLONE_NEWNS = 0x00020000


def watch(
    within: str, kill_at: int | None = None, after: float = 0.0, report: str | None = None
) -> None:
    """Counts operations from now on.

    Args:
        within: a part of the paths that count.
        kill_at: the number of the one at which the process kills itself.
        after: seconds from there until it does.
        report: a file that has one byte for each operation.
    """
    count = 0
    reported = None if report is None else os.open(report, os.O_WRONLY | os.O_CREAT)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in _EVENTS or within not in str(arguments[0]):
            return
        count += 1
        if reported is not None:
            os.write(reported, b".")
        if count == kill_at and after:
            signal.setitimer(signal.ITIMER_REAL, after)  # nobody handles it: the process ends
        elif count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def hide(folder: str) -> None:
    """Has this process alone find a folder empty, and closed to it; for root."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=4k,mode=000", "tmpfs", folder]
    subprocess.run(mount, check=True)
    assert not any(Path(folder).iterdir())
