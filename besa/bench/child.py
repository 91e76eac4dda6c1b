"""A child process that answers questions, a line of JSON each.

>>> program = '''
... from besa.bench.child import answer_questions, redirect_output
... redirect_output()  # what libraries print is no answer
... answer_questions(lambda question: {"sum": sum(question["numbers"])})
... '''
>>> with AnsweringChild([sys.executable, "-c", program]) as child:
...     child.ask({"numbers": [1, 2, 3]}, limit=60)
{'sum': 6}
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from besa.processes.child import ChildError, ChildProcess, last_line


class AnsweringChild(ChildProcess):
    """A running child.

    Args:
        command: a program that calls `answer_questions`.
        environment: what its environment has beyond this process's.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - as long as the child
        super().__init__(
            command,
            environment={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def ask(self, question: Mapping[str, Any], limit: float) -> dict[str, Any]:
        """The child's answer.

        Raises:
            ChildError: none within `limit` seconds, or none at all. The child is gone then.
        """
        assert self.popen.stdin is not None
        try:
            self.popen.stdin.write(json.dumps(question) + "\n")
            self.popen.stdin.flush()
        except OSError:
            self.kill()
            raise ChildError(self._last_error()) from None
        return self.answer(limit)

    def answer(self, limit: float) -> dict[str, Any]:
        """What the child says next; as `ask`, without a question."""
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.kill()
            raise ChildError(f"no answer within {limit:g} s") from None
        if line is None:
            self.popen.wait()
            raise ChildError(self._last_error())
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise ChildError(found["error"])
        return found

    def _last_error(self) -> str:
        self._errors.seek(0)
        return last_line(self._errors.read()) or f"ended with exit code {self.popen.returncode}"


def answer_questions(
    answer: Callable[[dict[str, Any]], Mapping[str, Any]], first: Mapping[str, Any] | None = None
) -> None:
    """In the child: answers until the parent asks no more.

    Args:
        answer: what to do with a question; an exception is an answer, too.
        first: what to say before any question, for instance that all is loaded.
    """
    out = redirect_output()
    if first is not None:
        print(json.dumps(first), file=out, flush=True)
    for line in sys.stdin:
        try:
            answered: Mapping[str, Any] = answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent tells the user
            traceback.print_exc()
            answered = {"error": _in_one_line(error)}
        print(json.dumps(answered), file=out, flush=True)


_output: TextIO | None = None


def redirect_output() -> TextIO:
    """In the child, before anything prints: what libraries print goes to standard error.

    Returns:
        Where answers go: what was standard output before.
    """
    global _output
    if _output is None:
        _output = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
    return _output


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
