"""A helper process that answers questions, a line of JSON each, and does not outlive its parent.

The parent, with a limit in seconds to each answer:

    with Child([sys.executable, "-m", "besa.bench.vllm_client"]) as child:
        answer = child.ask({"url": "http://127.0.0.1:8000"}, limit=60)

The child's program ends with

    answer_questions(lambda question: {"echo": question})
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Self

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, from linux/prctl.h


class ChildError(Exception):
    """The child ended, or did not answer in time, or could not do what it was asked."""


class Child:
    """A running child; whoever leaves the `with` block leaves nothing behind."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the child
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {}), "BESA_BENCH_PARENT": str(os.getpid())},
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, question: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The child's answer.

        Raises:
            ChildError: none within `limit` seconds, or none at all. The child is gone then.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except OSError:
            self.end()
            raise ChildError(self._last_words()) from None
        return self.answer(limit)

    def answer(self, limit: float) -> dict[str, Any]:
        """What the child says next; as `ask`, without a question."""
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.end()
            raise ChildError(f"no answer within {limit:g} s") from None
        if line is None:
            self.process.wait()
            raise ChildError(self._last_words())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ChildError(found["error"])
        return found

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = [
            x for x in self._errors.read().decode("utf-8", "replace").splitlines() if x.strip()
        ]
        return lines[-1].strip() if lines else f"ended with exit code {self.process.returncode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends the child and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def answer_questions(
    answer: Callable[[dict[str, Any]], Mapping[str, Any]], first: Mapping[str, Any] | None = None
) -> None:
    """In the child: answers until the parent asks no more.

    Args:
        answer: what to do with a question; an exception is an answer, too.
        first: what to say before any question, for instance that all is loaded.
    """
    out = _own_output()
    if first is not None:
        print(json.dumps(first), file=out, flush=True)
    for line in sys.stdin:
        try:
            answered: Mapping[str, Any] = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells the user
            traceback.print_exc()
            answered = {"error": _in_one_line(error)}
        print(json.dumps(answered), file=out, flush=True)


_output: Any = None


def _own_output() -> Any:
    """Where answers go. Libraries print: what they print goes to standard error."""
    global _output
    if _output is None:
        _output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    return _output


def start_child() -> None:
    """First thing in the child: it ends with its parent, and what is printed is no answer."""
    _own_output()
    die_with_parent()
    if os.getppid() != int(os.environ.get("BESA_BENCH_PARENT", os.getppid())):
        sys.exit(1)  # it ended in the meantime


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def run_to_end(command: Sequence[str], limit: float, environment: Mapping[str, str]) -> str:
    """Runs a program to its end; gives its standard output.

    Raises:
        ChildError: it failed, or took longer than `limit` seconds. Nothing of it is left.
    """
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            raise ChildError(f"no answer within {limit:g} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if process.returncode:
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            raise ChildError(lines[-1].strip() if lines else f"exit code {process.returncode}")
        output.seek(0)
        return output.read()


def die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however that comes about."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
