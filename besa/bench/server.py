"""A contender at work: a server that besa starts or that runs already, watched for faults.

`Server.start` starts it, `target` is where the load goes, and `check` raises a `BrokenError` where
it is not what it was.

A contender that dies, hangs, answers errors, or answers a prompt otherwise than it did before is
broken: it says so here, once, and is not asked again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from besa.bench.checkpoint import packing
from besa.bench.client import BrokenError, Client, NoAnswerError, Target
from besa.bench.footprint import Footprint
from besa.bench.launcher import Launch, Launcher
from besa.bench.probe import TOKENS, Probe
from besa.bench.results import Packing
from besa.bench.settings import BenchConfig, Contender
from besa.model.files import is_onnx, model_directory
from besa.processes.usage import listener
from besa.serve.process import RunningEngine


class Server:
    """A contender's server; leaving the `with` block ends what besa started of it.

    Attributes:
        directory: its model; None for a server that runs already.
        packing: how that is packed; None if it is not.
        launch: how besa starts it; None for one that runs already.
        start_seconds: from its start to its first answer; None for one that ran already.
        target: where the load goes; None until it has started.
        probe: its answers to fixed prompts; None until it has started.
        footprint: of its processes.
        idle_cores: cores that it used while another one was measured, at most.
        broken: what is wrong with it, or None.

    Raises:
        BesaError: there is no such model, or it is packed in an unknown version.
    """

    def __init__(self, contender: Contender, config: BenchConfig) -> None:
        self.contender, self.config = contender, config
        self.directory: Path | None = None
        self.packing: Packing | None = None
        if contender.url is None:
            assert contender.model is not None
            self.directory = model_directory(contender.model)
            self.packing = packing(self.directory)
        self.launch: Launch | None = None
        self.start_seconds: float | None = None
        self.target: Target | None = None
        self.probe: Probe | None = None
        self.footprint = Footprint(None)
        self.idle_cores = 0.0
        self.broken: str | None = None
        self._engine: RunningEngine | None = None

    @property
    def name(self) -> str:
        return self.contender.name

    @property
    def is_graph(self) -> bool:
        """Whether it is for ONNX Runtime, whatever the others' engine is."""
        return self.directory is not None and is_onnx(self.directory)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Ends what besa started of it."""
        if self._engine is not None:
            self._engine.shown = False
            self._engine.kill()

    def start(self, launcher: Launcher) -> None:
        """Starts the server, or looks for the one that runs, and takes its first answers.

        Raises:
            BesaError: its engine is not installed.
            BrokenError: it cannot be started, or does not answer.
        """
        if self.directory is not None:
            self.launch = launcher.prepare(self.name, self.directory)
            started = time.perf_counter()
            self._engine = launcher.start(self.launch)
            self.start_seconds = time.perf_counter() - started
            self.footprint = Footprint(self._engine.popen.pid)
            target = self.launch.target
        else:
            assert self.contender.url is not None
            target = self._found(self.contender.url)
            self.footprint = Footprint(listener(self.contender.url))
        client = Client(target, self.config.timeout)
        with self._explained():
            self.target = replace(target, ignores_eos=client.ignores_eos())
            self.probe = Probe(lambda prompt: client.complete(prompt, TOKENS))

    def _found(self, url: str) -> Target:
        """The server that runs already, with the model that was asked for, or its first one."""
        target = Target(url, self.contender.model or "", os.environ.get("OPENAI_API_KEY") or None)
        names = Client(target, self.config.timeout).models()
        wanted = self.contender.model or names[0]
        if wanted not in names:
            raise BrokenError(f"it serves no {wanted}, but {', '.join(names)}")
        return replace(target, model=wanted)

    def check(self, turn: int) -> None:
        """Asks one of the fixed prompts again, another one every turn.

        Raises:
            BrokenError: it is dead, does not answer, or answers otherwise.
        """
        assert self.probe is not None
        with self._explained():
            self.probe.check(turn)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """A missing answer is explained by a process that has ended."""
        try:
            yield
        except NoAnswerError as error:
            raise BrokenError(self.explain(str(error))) from None

    def explain(self, fault: str) -> str:
        """The fault, or that the server has ended, which explains it."""
        if self._engine is None:
            return fault
        if not self._engine.has_ended():
            return fault
        reason = self._engine.reason()
        return f"its server ended{': ' + reason if reason else ''}"
