"""`besa bench --offline`: inside the engines, so that theirs and the server's time are told apart.

Every model in every engine that is installed, each in a process of its own, asked in turns. A step
is what an engine takes for one token of every sequence of a batch; whoever is not asked waits.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa.bench.assemble import settings_of
from besa.bench.child import AnsweringChild
from besa.bench.conditions import machine, now, versions
from besa.bench.contenders import packing, weight_bytes
from besa.bench.figures import OFFLINE
from besa.bench.results import (
    ContenderRecord,
    LoadRecord,
    Measurement,
    Memory,
    Results,
    broken_note,
)
from besa.bench.settings import BenchConfig, Contender
from besa.bench.summary import comparisons, summary
from besa.errors import BesaError
from besa.model.files import is_onnx, model_directory
from besa.processes.child import ChildError
from besa.processes.usage import family, memory_of
from besa.serve.engines import engine_named, engines

_CHECK = {"batch": 1, "prompt": 8, "steps": 8, "seed": "check"}


class EngineProcess(AnsweringChild):
    """An engine with a model, which runs only while it is asked: its threads spin for nobody.

    Args:
        engine: one of `besa.serve.engines.ENGINES`.
        most, longest: sequences at a time, and tokens of each.
        limit: seconds to load the model in.

    Attributes:
        start_seconds: what loading took.

    Raises:
        ChildError: the model could not be loaded, or not in time.
    """

    def __init__(self, engine: str, directory: Path, most: int, longest: int, limit: float) -> None:
        arguments = [engine, str(directory), str(most), str(longest)]
        environment = engine_named(engine).offline_environment()
        super().__init__(
            [sys.executable, "-P", "-m", "besa.bench.offline_engine", *arguments],
            {name: value for name, value in environment.items() if name not in os.environ},
        )
        try:
            self.start_seconds: float = self.answer(limit)["start"]
        except BaseException:
            self.kill()
            raise
        self.popen.send_signal(signal.SIGSTOP)

    def ask(self, question: Mapping[str, Any], limit: float) -> dict[str, Any]:
        self.popen.send_signal(signal.SIGCONT)
        answer = super().ask(question, limit)
        self.popen.send_signal(signal.SIGSTOP)
        return answer


class _Inside:
    """A model in an engine."""

    def __init__(self, contender: Contender, engine: str, several: bool) -> None:
        assert contender.model is not None
        self.contender, self.engine = contender, engine
        self.model = contender.name
        self.name = f"{contender.name}, {engine}" if several else contender.name
        self.directory = model_directory(contender.model)
        self.child: EngineProcess | None = None
        self.broken: str | None = None
        self.start_seconds: float | None = None
        self.memory = Memory()
        self.said: list[int] | None = None

    def start(self, config: BenchConfig, batches: Sequence[int], stack: ExitStack) -> None:
        longest = config.input_length + config.output_length + 32
        self.child = stack.enter_context(
            EngineProcess(self.engine, self.directory, max(batches), longest, config.start_timeout)
        )
        self.start_seconds = self.child.start_seconds
        self.check(config)

    def _ask(self, question: Mapping[str, Any], limit: float) -> dict[str, Any]:
        assert self.child is not None
        return self.child.ask(question, limit)

    def check(self, config: BenchConfig) -> None:
        """Raises ChildError for an engine that is broken, or answers otherwise than before."""
        said = self._ask(_CHECK, config.timeout)["tokens"]
        if self.said is not None and said != self.said:
            raise ChildError("answers the same prompt otherwise than before")
        self.said = said

    def measure(self, config: BenchConfig, batch: int, seed: str) -> dict[str, float]:
        question = {"batch": batch, "prompt": config.input_length, "steps": config.output_length}
        self._ask({**question, "steps": 2, "seed": f"warm-up {seed}"}, config.timeout)
        found = self._ask({**question, "seed": seed}, config.timeout)
        step = statistics.median(found["steps"])
        return {"prefill": found["prefill"], "step": step, "decode_tps": batch / step}

    def weigh(self) -> None:
        assert self.child is not None
        self.memory = Memory(**memory_of(family(self.child.popen.pid)))

    def fail(self, error: ChildError) -> None:
        self.broken = str(error)
        if self.child is not None:
            self.child.kill()


def bench_offline(
    config: BenchConfig, batches: Sequence[int], tell: Callable[[str], None] = lambda _: None
) -> Results:
    """Measures the contenders inside the engines; as `besa.bench.run.bench` otherwise.

    Raises:
        BesaError: a model is not there, or no engine.
    """
    if any(contender.url is not None for contender in config.contenders):
        raise BesaError("--offline measures models, not a --url")
    chosen = _engines(config.engine)
    insides = [
        _Inside(contender, engine, len(chosen) > 1)
        for engine in chosen
        for contender in config.contenders
        if contender.model is not None
        and engine_named(engine).reads_onnx == is_onnx(Path(contender.model))
    ]
    rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
    loads = {batch: f"batch {batch}" for batch in batches}
    with ExitStack() as stack:
        for inside in insides:
            tell(f"starts: {inside.name}")
            try:
                inside.start(config, batches, stack)
            except ChildError as error:
                inside.fail(error)
                tell(f"{inside.name} is broken: {error}")
        for batch, load in loads.items():
            for turn in range(config.rounds):
                for inside in (one for one in insides if one.broken is None):
                    tell(f"{load}, round {turn + 1} of {config.rounds}: {inside.name}")
                    try:
                        inside.check(config)
                        figures = inside.measure(config, batch, f"{config.seed} {batch} {turn}")
                        rounds.setdefault((inside.name, load), []).append(figures)
                    except ChildError as error:
                        inside.fail(error)
                        tell(f"{inside.name} is broken: {error}")
        for inside in insides:
            if inside.broken is None:
                inside.weigh()
    return _results(config, insides, loads, rounds)


def _engines(asked: str | None) -> list[str]:
    there = [engine.name for engine in engines() if engine.version() is not None]
    if asked is not None and asked not in there:
        raise BesaError(f"--engine {asked} is not here: {', '.join(there)} are")
    return there if asked is None else [asked]


def _results(
    config: BenchConfig,
    insides: list[_Inside],
    loads: dict[int, str],
    rounds: dict[tuple[str, str], list[dict[str, float]]],
) -> Results:
    whole = {inside.name: inside for inside in insides if inside.broken is None}
    measurements = tuple(
        Measurement(name, load, tuple(own), summary(own))
        for (name, load), own in rounds.items()
        if name in whole
    )
    # A model is compared with the first model in the same engine.
    first: dict[str, str] = {}
    for name, inside in whole.items():
        first.setdefault(inside.engine, name)
    references = {name: first[inside.engine] for name, inside in whole.items()}
    return Results(
        kind="offline",
        date=now(),
        settings=replace(settings_of(config), loads=tuple(loads.values())),
        machine=machine(),
        versions=versions(),
        reference=next(iter(whole), None),
        contenders=tuple(_contender(inside) for inside in insides),
        loads=tuple(LoadRecord(name, "batch", batch) for batch, name in loads.items()),
        measurements=measurements,
        comparisons=comparisons(measurements, references, OFFLINE),
        quality={"skipped": "offline"},
        notes=tuple(_notes(insides)),
    )


def _notes(insides: Sequence[_Inside]) -> list[str]:
    notes = [broken_note(one.name, one.broken) for one in insides if one.broken is not None]
    if any(one.contender.random_weights for one in insides):
        notes.append("Random weights: the figures are about speed and memory only.")
    return notes


def _contender(inside: _Inside) -> ContenderRecord:
    return ContenderRecord(
        name=inside.name,
        model=inside.directory.name,
        url=None,
        engine=inside.engine,
        packing=packing(inside.directory),
        random_weights=inside.contender.random_weights,
        broken=inside.broken,
        start_seconds=inside.start_seconds,
        disk_bytes=weight_bytes(inside.directory),
        memory=inside.memory,
    )
