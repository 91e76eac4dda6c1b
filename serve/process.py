"""An engine that runs: started, watched, asked for its health, stopped, and gone.

>>> from pathlib import Path
>>> from besa.serve.command import command_for
>>> from besa.serve.launch import free_port
>>> port = free_port("127.0.0.1", 0)
>>> config = ServeConfig("path/to/sparse", engine="transformers", port=port)
>>> with RunningEngine(command_for(config, Path("path/to/sparse")), config) as engine:
...     engine.wait_until_ready()
...     engine.stop()
True
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import suppress

from besa.errors import BesaError
from besa.processes.child import ChildProcess, last_line
from besa.serve.command import EngineCommand
from besa.serve.log import reason_of
from besa.serve.settings import KEY_VARIABLES, ServeConfig

_KEPT_LINES = 2000
_POLL_SECONDS = 0.2
# Beyond --shutdown-timeout, for the engine to take itself apart.
_TEARDOWN_SECONDS = 20


class EngineError(BesaError):
    """An engine did not start.

    Attributes:
        engine: its name.
        reason: why, in the engine's words.
    """

    def __init__(self, engine: str, reason: str) -> None:
        super().__init__(f"{engine} did not start: {reason}")
        self.engine, self.reason = engine, reason


class RunningEngine(ChildProcess):
    """An engine's process; leaving the `with` block, in whatever way, leaves nothing of it behind.

    Attributes:
        log: the last lines that it wrote.
        shown: whether what it writes is shown.
    """

    def __init__(self, command: EngineCommand, config: ServeConfig) -> None:
        self.config = config
        self.command = command
        self.log: deque[str] = deque(maxlen=_KEPT_LINES)
        self.shown = config.verbose
        environment = {**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"}
        environment["BESA_SHUTDOWN_TIMEOUT"] = str(config.shutdown_timeout)
        for variable in KEY_VARIABLES:
            environment.pop(variable, None)
        if config.api_key is not None:
            environment[command.key_variable] = config.api_key
        super().__init__(
            command.arguments,
            environment=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            patience=config.shutdown_timeout + _TEARDOWN_SECONDS,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.log.append(line.rstrip("\n"))
            if self.shown:
                sys.stderr.write(line)
                sys.stderr.flush()

    def __exit__(self, *_: object) -> None:
        self.shown = self.config.verbose
        self.kill()

    def wait_until_ready(self) -> None:
        """Waits for the engine to answer a request; from then on its log is shown.

        Raises:
            EngineError: it ended, or cannot compute.
        """
        while not self._answers("GET", "/health"):
            if self.popen.poll() is not None:
                raise self._failure("it did not answer")
            time.sleep(_POLL_SECONDS)
        # A healthy engine may still be unable to compute: kernels that lack a shape fail with the
        # first call.
        body = {"model": self.config.name, "prompt": "a", "max_tokens": 1}
        status = self._ask("POST", "/v1/completions", body)
        if status is None or status >= 500:
            raise self._failure(f"its first answer was {f'HTTP {status}' if status else 'missing'}")
        self.shown = True

    def _failure(self, seen: str) -> EngineError:
        """Why it did not start: from its log or, where no line tells, from what was seen."""
        ended = self.has_ended()
        self._let_log_end()
        if ended:
            seen = f"it ended ({self.ending()})"
        last = last_line("\n".join(self.log))
        told = f"the last line of its log: {last}" if last else "its log is empty"
        return EngineError(self.command.engine, self.reason() or f"{seen}; {told}")

    def _let_log_end(self) -> None:
        """Waits for the last lines that the process wrote, which may still be on their way."""
        self._reader.join(timeout=2)

    def reason(self) -> str | None:
        """Why it ended, from the engine's log; None if no line tells."""
        return reason_of(list(self.log))

    def has_ended(self) -> bool:
        """Whether it has ended, with a moment for that to be seen."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(timeout=1)
        return self.popen.returncode is not None

    def ending(self) -> str:
        """How it ended, once it has: the signal's name, or its exit code."""
        code = self.popen.returncode
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def wait(self) -> int:
        """The engine's exit code, once it has ended."""
        code = self.popen.wait()
        self._let_log_end()
        return code

    def stop(self) -> bool:
        """Has the engine finish its requests and end.

        Returns:
            Whether it has ended; False if that takes too long.
        """
        self.shown = self.config.verbose
        self.popen.terminate()
        try:
            self.popen.wait(self.config.shutdown_timeout + _TEARDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Ends the engine and all that it started, at once."""
        super().kill()
        self._let_log_end()

    def _answers(self, method: str, path: str) -> bool:
        return self._ask(method, path) == 200

    def _ask(self, method: str, path: str, body: object = None) -> int | None:
        """The status of the engine's answer; None if it gave none."""
        host, port = self.config.address, self.config.port
        if self.config.encrypted:
            # Its certificate is for the name that clients know it by.
            unchecked = ssl._create_unverified_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, timeout=600, context=unchecked
            )
        else:
            connection = http.client.HTTPConnection(host, port, timeout=600)
        headers = {"Content-Type": "application/json"}
        if self.config.api_key is not None:
            headers["Authorization"] = f"Bearer {self.config.api_key}"
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
