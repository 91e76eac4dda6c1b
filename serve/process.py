"""An engine as a process group: started, watched, asked for its health, stopped, and gone.

with Engine(command, config) as engine:
    engine.wait_until_ready()
    engine.wait()
                              # here nothing of it runs any more
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
from besa.serve.command import KEY_VARIABLES, EngineCommand
from besa.serve.engine import TEARDOWN_SECONDS
from besa.serve.log import reason_of
from besa.serve.settings import ServeConfig

_KEPT_LINES = 2000
_POLL_SECONDS = 0.2


class Engine:
    """A running engine.

    Whoever leaves the `with` block, by whatever way, leaves nothing behind.
    """

    def __init__(self, command: EngineCommand, config: ServeConfig) -> None:
        self.config = config
        self.command = command
        self.log: deque[str] = deque(maxlen=_KEPT_LINES)
        self.shown = config.verbose
        environment = {**os.environ, **command.environment, "PYTHONUNBUFFERED": "1"}
        environment["BESA_SHUTDOWN_TIMEOUT"] = str(config.shutdown_timeout)
        for variable in KEY_VARIABLES.values():
            environment.pop(variable, None)
        if config.api_key is not None:
            environment[KEY_VARIABLES[command.engine]] = config.api_key
        self.process = subprocess.Popen(
            command.arguments,
            env=environment,
            # It closes when besa ends, however: see besa.serve.engine.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip("\n"))
            if self.shown:
                sys.stderr.write(line)
                sys.stderr.flush()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.shown = self.config.verbose
        self.kill()

    def wait_until_ready(self) -> None:
        """Waits for the engine to answer a request; from then on its log is shown.

        Raises:
            BesaError: it ended, or cannot compute. Says why, in the engine's words.
        """
        while not self._answers("GET", "/health"):
            if self.process.poll() is not None:
                raise self._failure()
            time.sleep(_POLL_SECONDS)
        # Healthy is not yet able: kernels that lack a shape say so when they are first called.
        body = {"model": self.config.name, "prompt": "a", "max_tokens": 1}
        if (status := self._ask("POST", "/v1/completions", body)) is None or status >= 500:
            raise self._failure()
        self.shown = True

    def _failure(self) -> BesaError:
        self._let_log_end()
        reason = self.reason() or "its log does not say why"
        hint = "" if self.config.verbose else " (--verbose shows its log)"
        return BesaError(f"{self.command.engine} did not start: {reason}{hint}")

    def _let_log_end(self) -> None:
        """What a process wrote last may still be on its way."""
        self._reader.join(timeout=2)

    def reason(self) -> str | None:
        """What the engine's log says of its end."""
        return reason_of(list(self.log))

    def wait(self) -> int:
        """The engine's exit code, once it has ended."""
        code = self.process.wait()
        self._let_log_end()
        return code

    def stop(self) -> bool:
        """Has the engine finish what it does and end; False if it took too long and was killed."""
        self.shown = self.config.verbose
        self.process.terminate()
        try:
            self.process.wait(self.config.shutdown_timeout + TEARDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """Ends whatever of the process group is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
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
