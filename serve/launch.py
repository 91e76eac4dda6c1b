"""`besa serve`: starts an engine, waits until it answers, and ends with it.

>>> config = ServeConfig("path/to/sparse", engine="transformers", port=8001)
>>> print(dry_run(config))
VLLM_NO_USAGE_STATS=... -m besa.serve.engine transformers serve ... --port 8001 ...

`serve(config)` starts what that prints, and returns an exit code after Ctrl-C or SIGTERM.

besa tells the engine to stop, which refuses what is new and finishes what it has begun, and after
--shutdown-timeout, or on a second Ctrl-C, ends whatever is left. Until the engine answers, its log
is kept back; if it never does, the line that says why is shown. From then on what it writes is
shown, and without --verbose that is only what went wrong.
"""

from __future__ import annotations

import errno
import json
import shlex
import signal
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import FrameType

from rich.console import Console

from besa.errors import BesaError, BesaWarning
from besa.formats import QUANT_METHOD, PackedConfig
from besa.model.digests import check_digests
from besa.model.files import is_onnx, model_directory
from besa.model.json_files import read_object
from besa.serve.command import EngineCommand, command_for
from besa.serve.engines import engine_named
from besa.serve.process import EngineError, RunningEngine
from besa.serve.settings import ServeConfig

_HINT = "(--verbose shows its log)"


def dry_run(config: ServeConfig) -> str:
    """The environment and the command line of the engine, as a shell takes them, without the key.

    Raises:
        BesaError: as `serve` does before it starts anything.
    """
    directory = model_directory(config.model)
    packing_of(directory)
    return str(command_for(config, directory))


def serve(config: ServeConfig) -> int:
    """Serves until it is told to stop.

    Returns:
        The exit code: 0 when it was told to stop, 1 when the engine ended by itself.

    Raises:
        BesaError: no model, no engine, no such address, a file that --verify finds changed, or
            the engine did not start.
    """
    directory = model_directory(config.model)
    packing = packing_of(directory)
    if config.verify:
        check_digests(directory)
    config = replace(config, port=free_port(config.host, config.port))
    command = command_for(config, directory)
    if packing is None and not is_onnx(directory):
        _say(f"nothing is packed in {config.model}: it is served as it is; see `besa export`")
    warning = engine_named(command.engine).version_warning(command.version)
    if packing is not None and warning is not None:  # the engine's own log is not shown yet
        warnings.warn(warning, BesaWarning, stacklevel=2)
    if config.api_key is None and not config.is_local:
        warnings.warn(
            f"whoever reaches {config.host}:{config.port} can use the model: give an --api-key",
            BesaWarning,
            stacklevel=2,
        )
    if config.verbose:
        _say(f"runs {command}")
    else:
        _say(f"{command.engine} {command.version} loads {config.name} {_HINT}")
    with _stop_signals() as stops:
        try:
            with ExitStack() as running:
                with ExitStack() as starting:
                    with stops.held():
                        engine = running.enter_context(RunningEngine(command, config))
                        starting.enter_context(_spinner(config))
                    engine.wait_until_ready()
                print(announcement(config), flush=True)
                try:
                    return _wait_for_end(engine, command)
                except _StopSignal:
                    stops.rearm()
                    _drain(engine, config)
        except EngineError as error:
            raise error if config.verbose else BesaError(f"{error} {_HINT}") from None
        except _StopSignal:  # while it started, or for the second time
            _say("stopped at once")
    return 0


def _spinner(config: ServeConfig) -> AbstractContextManager[object]:
    """Something that moves on a terminal, unless the engine's log does."""
    return nullcontext() if config.verbose else Console(stderr=True).status("starting")


def _wait_for_end(engine: RunningEngine, command: EngineCommand) -> int:
    """Waits for an engine that nobody told to stop."""
    engine.wait()
    reason = engine.reason()
    _say(f"{command.engine} ended by itself ({engine.ending()}){': ' + reason if reason else ''}")
    return 1


def _drain(engine: RunningEngine, config: ServeConfig) -> None:
    _say("finishes what it has begun (Ctrl-C stops it at once)")
    if not engine.stop():
        _say(f"what was not finished after {config.shutdown_timeout} s is cut off")


def packing_of(directory: Path) -> PackedConfig | None:
    """How a model is packed; None if it is not.

    Raises:
        BesaError: in a version of the format that this besa does not know.
    """
    if is_onnx(directory):  # its graph says it
        return None
    path = directory / "config.json"
    found = read_object(path).get("quantization_config") or {}
    if not isinstance(found, dict):
        raise BesaError(
            f"{path} is damaged (its quantization_config is no object): download the model again"
        )
    if found.get("quant_method") != QUANT_METHOD:
        return None
    return PackedConfig.from_dict(found)


def free_port(host: str, port: int) -> int:
    """The port, or any that is free for 0.

    Raises:
        BesaError: it is taken, or the address is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise BesaError(f"--host {host} cannot be resolved: {error.strerror}") from None
    with socket.socket(family, kind, protocol) as listener:
        # As servers do: connections that have just ended do not keep a port taken.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()  # two may bind one port, until one of them listens
        except PermissionError:
            raise BesaError(f"--port {port} is not yours to use: take one above 1023") from None
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BesaError(f"port {port} of {host} is in use: give another --port") from None
            raise BesaError(f"cannot listen on {host}:{port}: {error.strerror}") from None
        return int(listener.getsockname()[1])


def announcement(config: ServeConfig) -> str:
    """Where the server is, and a line that tries it."""
    body = {"model": config.name, "prompt": "Once upon a time", "max_tokens": 32}
    command = ["curl", f"{config.url}/v1/completions", "-H", "Content-Type: application/json"]
    line = shlex.join([*command, "-d", json.dumps(body)])
    if config.api_key is not None:  # which one, its owner knows
        line += ' -H "Authorization: Bearer $BESA_API_KEY"'
    return f"{config.url}/v1 serves {config.name}\n{line}"


def _say(message: str) -> None:
    print(f"besa serve: {message}", file=sys.stderr, flush=True)


class _StopSignal(Exception):
    """SIGINT, SIGTERM or SIGHUP came."""


class _SignalHandler:
    """Raises `_StopSignal` for the first signal, and after `rearm` for one more."""

    def __init__(self) -> None:
        self.armed = True
        self._is_held = self._has_come = False

    def rearm(self) -> None:
        self.armed = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises at its end what comes meanwhile: a thread that begins would not stand it."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if self._has_come:
            raise _StopSignal

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        if not self.armed:
            return
        self.armed = False
        if self._is_held:
            self._has_come = True
        else:
            raise _StopSignal


@contextmanager
def _stop_signals() -> Iterator[_SignalHandler]:
    stops = _SignalHandler()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stops) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
