"""A child process that is never left behind, nor anything that it starts.

>>> hello = [sys.executable, "-c", "print('hello')"]
>>> with ChildProcess(hello, stdout=subprocess.PIPE) as child:
...     child.popen.communicate()
('hello\\n', None)
>>> run_to_end(hello, limit=60)
'hello\\n'

After the `with` block nothing of the child runs any more.

Each child is in a process group of its own. So Ctrl-C on a terminal reaches the parent alone, which
decides what comes of its children, and a group can be ended as a whole. The group's leader is a
watchdog (besa.processes.watchdog), which ends the group if the parent is gone before it could do so
itself, even by SIGKILL.

Two other ways for a child to end with its parent are not enough. Linux's parent-death signal
reaches only the child and not what that has started, and comes when the *thread* ends that started
it. A pipe that the child itself watches takes a thread in every program, and a child that is
stopped (SIGSTOP, as `besa bench --offline` does with those that it does not ask) sees nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from besa import telemetry

_WATCHDOG = Path(__file__).with_name("watchdog.py")


class ChildError(Exception):
    """A child ended, or did not answer in time, or could not do what it was asked."""


class ChildProcess:
    """A running child; leaving the `with` block ends it and all that it started.

    So does the end of this object, or of this process.

    Args:
        command: the program and its arguments.
        environment: the child's whole environment; None for this process's. Telemetry is off in it,
            unless it says otherwise.
        stdin, stdout, stderr: as `subprocess.Popen` takes them, with text instead of bytes.
        patience: seconds from SIGTERM to SIGKILL, if this process is gone before the child.

    Attributes:
        popen: the child.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        patience: float = 0,
    ) -> None:
        self._watchdog = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_WATCHDOG), str(patience)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            self.popen = subprocess.Popen(
                list(command),
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                text=True,
                errors="replace",
                env={
                    **telemetry.switches(),
                    **(os.environ if environment is None else environment),
                },
                process_group=self._watchdog.pid,
            )
            assert self._watchdog.stdin is not None
            self._watchdog.stdin.write(b"%d\n" % self.popen.pid)
            self._watchdog.stdin.flush()
        except BaseException:
            self._kill_group()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Ends the child and all that it started, at once."""
        self._kill_group()
        self.popen.kill()  # if it has left its group
        self.popen.wait()

    def _kill_group(self) -> None:
        if self._watchdog.returncode is None:  # else the group's number may be another's by now
            with suppress(ProcessLookupError):
                os.killpg(self._watchdog.pid, signal.SIGKILL)
            self._watchdog.communicate()  # waits, and closes the pipe


def run_to_end(command: Sequence[str], limit: float) -> str:
    """Runs a program to its end; gives its standard output.

    Args:
        limit: seconds.

    Raises:
        ChildError: it failed, or took longer. Nothing of it is left.
    """
    with _text_file() as errors, _text_file() as output:
        with ChildProcess(command, stdout=output, stderr=errors) as child:
            try:
                code = child.popen.wait(limit)
            except subprocess.TimeoutExpired:
                raise ChildError(f"no answer within {limit:g} s") from None
        if code:
            errors.seek(0)
            raise ChildError(last_line(errors.read()) or f"exit code {code}")
        output.seek(0)
        return output.read()


def _text_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", errors="replace")


def last_line(text: str) -> str:
    """The last line that is not blank: of a traceback, the one that says what went wrong."""
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
