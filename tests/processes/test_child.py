"""Children that are never left behind: whoever is killed, and however."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from besa.processes.child import ChildError, ChildProcess, run_to_end
from tests.helpers import PATIENCE

SLEEPS = "import time; time.sleep(3600)"
# Has a child of its own, ignores what it can, and says when it is there.
STUBBORN = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen([sys.executable, "-c", {SLEEPS!r}])
open(sys.argv[1], "w").close()
time.sleep(3600)
"""
# Has something to finish when it is told to end.
FINISHES = """
import pathlib, signal, sys, time
def finish(*_):
    time.sleep(0.5)
    pathlib.Path(sys.argv[1], "finished").touch()
    sys.exit()
signal.signal(signal.SIGTERM, finish)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(3600)
"""
PARENT = """
import signal, sys, time
signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's background jobs ignore it
from besa.processes.child import ChildProcess
from tests.helpers import PATIENCE
child = ChildProcess([sys.executable, "-c", *sys.argv[2:]], patience=float(sys.argv[1]))
print(child.popen.pid, flush=True)
time.sleep(3600)
"""


def until(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def parent(patience: float, program: str, *arguments: object) -> subprocess.Popen[str]:
    words = [str(patience), program, *map(str, arguments)]
    return subprocess.Popen(
        [sys.executable, "-c", PARENT, *words], stdout=subprocess.PIPE, text=True
    )


def python(program: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", program, *map(str, arguments)]


def all_gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, PATIENCE)[1]


def test_what_a_child_started_ends_with_it(tmp_path: Path):
    with ChildProcess(python(STUBBORN, tmp_path / "ready")) as child:
        until((tmp_path / "ready").exists)
        started = psutil.Process(child.popen.pid).children()
        assert len(started) == 1
    assert child.popen.returncode == -signal.SIGKILL
    assert all_gone(started)


def test_a_child_that_was_killed_leaves_nothing(tmp_path: Path):
    with ChildProcess(python(STUBBORN, tmp_path / "ready")) as child:
        until((tmp_path / "ready").exists)
        started = psutil.Process(child.popen.pid).children()
        child.popen.kill()
        child.popen.wait()
    assert all_gone(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGQUIT])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_parent_that_was_killed_leaves_nothing(
    tmp_path: Path, number: signal.Signals, stopped: bool
):
    with parent(0, STUBBORN, tmp_path / "ready") as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        until((tmp_path / "ready").exists)
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) == 3  # a watchdog, the child, and its child
        if stopped:
            os.kill(child, signal.SIGSTOP)
        process.send_signal(number)
    assert all_gone(family)


def test_a_child_may_finish_when_its_parent_is_gone(tmp_path: Path):
    with parent(600, FINISHES, tmp_path) as process:
        until((tmp_path / "ready").exists)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert all_gone(family)
    assert (tmp_path / "finished").exists()


def test_patience_ends(tmp_path: Path):
    with parent(0.5, STUBBORN, tmp_path / "ready") as process:
        until((tmp_path / "ready").exists)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert all_gone(family)


def test_a_child_without_its_watchdog_ends_all_the_same(tmp_path: Path):
    with ChildProcess(python(STUBBORN, tmp_path / "ready")) as child:
        until((tmp_path / "ready").exists)
        started = psutil.Process(child.popen.pid).children()
        os.kill(os.getpgid(child.popen.pid), signal.SIGKILL)
    assert all_gone(started)


def test_a_child_outlives_the_thread_that_started_it():
    children = []
    thread = threading.Thread(target=lambda: children.append(ChildProcess(python(SLEEPS))))
    thread.start()
    thread.join()
    with children[0] as child, pytest.raises(subprocess.TimeoutExpired):
        child.popen.wait(0.2)


def test_a_program_that_is_not_there():
    before = set(psutil.Process().children())
    with pytest.raises(FileNotFoundError):
        ChildProcess(["no-such-program"])
    assert set(psutil.Process().children()) <= before


def test_to_the_end():
    assert run_to_end(python("print('hello')"), PATIENCE) == "hello\n"
    with pytest.raises(ChildError, match=r"^ValueError: no$"):
        run_to_end(python("raise ValueError('no')"), PATIENCE)
    with pytest.raises(ChildError, match=r"^exit code 3$"):
        run_to_end(python("raise SystemExit(3)"), PATIENCE)
    with pytest.raises(ChildError, match=r"^no answer within 0\.1 s$"):
        run_to_end(python(SLEEPS), 0.1)
