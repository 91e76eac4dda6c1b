"""The engine's command line and environment for a `ServeConfig`: no more than what has to be there.

>>> config = ServeConfig("path/to/sparse", engine="transformers", port=8001)
>>> command = command_for(config, Path("path/to/sparse"))
>>> command.arguments[1:7]
('-P', '-m', 'besa.serve.engine', 'transformers', 'serve', 'path/to/sparse')
>>> "DO_NOT_TRACK" in command.environment  # it is set on top of besa's own environment
True

What is an engine's own, it says itself (besa.serve.engines). Flags of the user's come last, so that
they win.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from besa import telemetry
from besa.errors import BesaError
from besa.model.files import is_onnx
from besa.serve.engines import Engine, engines
from besa.serve.settings import ServeConfig


@dataclass(frozen=True)
class EngineCommand:
    """How an engine is started.

    Attributes:
        engine: its name, one of `besa.serve.engines.ENGINES`.
        version: its version.
        key_variable: where it reads its API key from.
        arguments: the command line.
        environment: what its environment has beyond besa's own, without the key.
    """

    engine: str
    version: str
    key_variable: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def command_for(config: ServeConfig, directory: Path) -> EngineCommand:
    """How to start the engine that the configuration asks for, or that is there.

    Raises:
        BesaError: the engine is not installed, or not for such a model.
    """
    engine = engine_for(config, directory)
    engine.check()
    launch = engine.launch(config, directory)
    arguments = [
        *(sys.executable, "-P", "-m", "besa.serve.engine", engine.name, "serve", str(directory)),
        *("--host", config.host, "--port", str(config.port)),
        *("--served-model-name", config.name),
        *launch.flags,
        *config.engine_args,
    ]
    return EngineCommand(
        engine.name,
        engine.version() or "",
        engine.key_variable,
        tuple(arguments),
        {**telemetry.switches(), **launch.environment},
    )


def engine_for(config: ServeConfig, directory: Path) -> Engine:
    """The engine that was asked for; else the first for such a model that is installed.

    Raises:
        BesaError: it is not for such a model.
    """
    graph = is_onnx(directory)
    suitable = [engine for engine in engines() if engine.reads_onnx == graph]
    if config.engine is None:
        return next((engine for engine in suitable if engine.version()), suitable[-1])
    if asked := [engine for engine in suitable if engine.name == config.engine]:
        return asked[0]
    if graph:
        names = " or ".join(engine.name for engine in suitable)
        raise BesaError(f"{directory} is an ONNX model: serve it with --engine {names}")
    raise BesaError(
        f"{directory} is no ONNX model: `besa export --format onnx` makes one, or leave "
        "--engine out"
    )
