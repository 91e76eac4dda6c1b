"""Starts the servers of a comparison: the same engine and flags, and alike shares of the memory.

>>> from besa.bench.settings import Contender
>>> config = BenchConfig((Contender("sparse", "path/to/sparse"),), engine="transformers")
>>> launch = Launcher(config).prepare("sparse", Path("path/to/sparse"))
>>> launch.target
Target(url='http://127.0.0.1:...', model='sparse'...)

`Launcher.start` starts it and waits until it answers.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from besa.bench.client import BrokenError, Target
from besa.bench.settings import BenchConfig
from besa.model.files import is_onnx
from besa.serve.command import EngineCommand, command_for
from besa.serve.launch import free_port
from besa.serve.process import EngineError, RunningEngine
from besa.serve.settings import ServeConfig

_CACHE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class Launch:
    """How a contender's server is started, and where it will answer."""

    command: EngineCommand
    config: ServeConfig

    @property
    def target(self) -> Target:
        return Target(self.config.url, self.config.name)


class Launcher:
    """Prepares and starts servers, one after the other."""

    def __init__(self, config: BenchConfig) -> None:
        self._config = config
        self._cache: str | None = None  # GiB of each server's

    def prepare(self, name: str, directory: Path) -> Launch:
        """The command line and the environment of a server, on a port that is free.

        Raises:
            BesaError: the engine is not installed, or not for such a model.
        """
        graph = is_onnx(directory)  # which has an engine of its own, whatever the others' is
        served = ServeConfig(
            model=str(directory),
            engine=None if graph else self._config.engine,
            port=free_port("127.0.0.1", 0),
            served_model_name=name,
            shutdown_timeout=0,
            engine_args=() if graph else self._config.engine_args,
        )
        command = command_for(served, directory)
        environment = dict(command.environment)
        if _CACHE in environment and _CACHE not in os.environ:
            environment[_CACHE] = self._share_of_cache(environment[_CACHE])
        return Launch(replace(command, environment=environment), served)

    def _share_of_cache(self, gib: str) -> str:
        """An equal part of the cache that the first server would take if it were alone."""
        if self._cache is None:
            servers = sum(contender.url is None for contender in self._config.contenders)
            self._cache = str(max(1, int(gib) // servers))
        return self._cache

    def start(self, launch: Launch) -> RunningEngine:
        """Starts a server and waits until it answers.

        Raises:
            BrokenError: it does not. Nothing of it runs any more.
        """
        engine = RunningEngine(launch.command, launch.config)
        late = threading.Timer(self._config.start_timeout, engine.kill)
        late.daemon = True
        late.start()
        try:
            engine.wait_until_ready()
        except EngineError as error:
            engine.kill()
            if late.is_alive():
                raise BrokenError(str(error)) from None
            limit = f"{self._config.start_timeout:g} s"
            raise BrokenError(f"did not start within {limit}") from None
        except BaseException:
            engine.kill()
            raise
        finally:
            late.cancel()
            engine.shown = False  # its log, which would be in the way of besa's own lines
        return engine
