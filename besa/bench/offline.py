"""`besa bench --offline`: inside the engines, so that theirs and the server's time are told apart.

Every model in every engine that is installed, each in a process of its own, asked in turns. A step
is what an engine takes for one token of every sequence of a batch. An engine that is not asked is
stopped.
"""

from __future__ import annotations

import os
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from besa.bench.assemble import settings_of
from besa.bench.checkpoint import packing, weight_bytes
from besa.bench.child import AnsweringChild
from besa.bench.conditions import machine, now, versions
from besa.bench.events import Broken, OnEvent, Step, ignore
from besa.bench.figures import OFFLINE
from besa.bench.footprint import Footprint
from besa.bench.results import (
    ContenderRecord,
    LoadRecord,
    Measurement,
    Results,
    broken_note,
)
from besa.bench.settings import BenchConfig, Contender
from besa.bench.summary import comparisons, summary
from besa.errors import BesaError
from besa.model.files import is_onnx, model_directory
from besa.processes.child import ChildError
from besa.serve import engines as serving
from besa.serve.engines import engine_named

_CHECK = {"batch": 1, "prompt": 8, "steps": 8, "seed": "check"}
_SPARE_TOKENS = 32  # of the context, beyond prompt and answer


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


class OfflineContender:
    """A model in an engine; leaving the `with` block ends the engine.

    Attributes:
        name: the model's, with the engine's where there are several.
        start_seconds: what loading took; None until it is loaded.
        broken: what is wrong with it, or None.
    """

    def __init__(self, contender: Contender, engine: str, several: bool) -> None:
        assert contender.model is not None
        self.contender, self.engine = contender, engine
        self.name = f"{contender.name}, {engine}" if several else contender.name
        self.directory = model_directory(contender.model)
        self.start_seconds: float | None = None
        self.broken: str | None = None
        self.footprint = Footprint(None)
        self._process: EngineProcess | None = None
        self._first_answer: list[int] | None = None

    def __enter__(self) -> OfflineContender:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()

    def start(self, config: BenchConfig, batches: Sequence[int]) -> None:
        """Loads the model and takes its first answer; raises a ChildError if it cannot."""
        longest = config.input_length + config.output_length + _SPARE_TOKENS
        self._process = EngineProcess(
            self.engine, self.directory, max(batches), longest, config.start_timeout
        )
        self.footprint = Footprint(self._process.popen.pid)
        self.start_seconds = self._process.start_seconds
        self.check(config)

    def check(self, config: BenchConfig) -> None:
        """Raises a ChildError for an engine that is broken, or answers otherwise than before."""
        answer = self._ask(_CHECK, config.timeout)["tokens"]
        if self._first_answer not in (None, answer):
            raise ChildError("answers the same prompt otherwise than before")
        self._first_answer = answer

    def measure(self, config: BenchConfig, batch: int, seed: str) -> dict[str, float]:
        """The figures of one batch, after one that does not count."""
        question = {"batch": batch, "prompt": config.input_length, "steps": config.output_length}
        self._ask({**question, "steps": 2, "seed": f"warm-up {seed}"}, config.timeout)
        found = self._ask({**question, "seed": seed}, config.timeout)
        step = statistics.median(found["steps"])
        return {"prefill": found["prefill"], "step": step, "decode_tps": batch / step}

    def _ask(self, question: Mapping[str, Any], limit: float) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(question, limit)


def bench_offline(
    config: BenchConfig, batches: Sequence[int], on_event: OnEvent = ignore
) -> Results:
    """Measures the contenders inside the engines; as `besa.bench.run.bench` otherwise.

    Raises:
        BesaError: a model is not there, or no engine.
    """
    if any(contender.url is not None for contender in config.contenders):
        raise BesaError("--offline measures models, not a --url")
    engines = _engines(config.engine)
    contenders = [
        OfflineContender(contender, engine, len(engines) > 1)
        for engine in engines
        for contender in config.contenders
        if contender.model is not None
        and engine_named(engine).reads_onnx == is_onnx(Path(contender.model))
    ]
    rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
    loads = {batch: f"batch {batch}" for batch in batches}
    with ExitStack() as stack:
        for one in contenders:
            on_event(Step(f"starts: {one.name}"))
            stack.enter_context(one)
            with _noting_faults(one, on_event):
                one.start(config, batches)
        for batch, load in loads.items():
            for number in range(config.rounds):
                for one in (x for x in contenders if x.broken is None):
                    on_event(Step(f"{load}, round {number + 1} of {config.rounds}: {one.name}"))
                    with _noting_faults(one, on_event):
                        one.check(config)
                        figures = one.measure(config, batch, f"{config.seed} {batch} {number}")
                        rounds.setdefault((one.name, load), []).append(figures)
        for one in contenders:
            if one.broken is None:
                one.footprint.update()
    return _results(config, contenders, loads, rounds)


@contextmanager
def _noting_faults(contender: OfflineContender, on_event: OnEvent) -> Iterator[None]:
    """A contender that does not answer is broken, and ended."""
    try:
        yield
    except ChildError as error:
        contender.broken = str(error)
        on_event(Broken(contender.name, contender.broken))
        contender.end()


def _engines(asked: str | None) -> list[str]:
    there = [engine.name for engine in serving.engines() if engine.version() is not None]
    if asked is not None and asked not in there:
        raise BesaError(f"--engine {asked} is not here: {', '.join(there)} are")
    return there if asked is None else [asked]


def _results(
    config: BenchConfig,
    contenders: list[OfflineContender],
    loads: dict[int, str],
    rounds: dict[tuple[str, str], list[dict[str, float]]],
) -> Results:
    sound = {one.name: one for one in contenders if one.broken is None}
    measurements = tuple(
        Measurement(name, load, tuple(own), summary(own))
        for (name, load), own in rounds.items()
        if name in sound
    )
    # A model is compared with the first model in the same engine.
    first: dict[str, str] = {}
    for name, one in sound.items():
        first.setdefault(one.engine, name)
    references = {name: first[one.engine] for name, one in sound.items()}
    return Results(
        kind="offline",
        date=now(),
        settings=replace(settings_of(config), loads=tuple(loads.values())),
        machine=machine(),
        versions=versions(),
        reference=next(iter(sound), None),
        contenders=tuple(_contender(one) for one in contenders),
        loads=tuple(LoadRecord(name, "batch", batch) for batch, name in loads.items()),
        measurements=measurements,
        comparisons=comparisons(measurements, references, OFFLINE),
        quality={"skipped": "offline"},
        notes=tuple(_notes(contenders)),
    )


def _notes(contenders: Sequence[OfflineContender]) -> list[str]:
    notes = [broken_note(one.name, one.broken) for one in contenders if one.broken is not None]
    if any(one.contender.random_weights for one in contenders):
        notes.append("Random weights: the figures are about speed and memory only.")
    return notes


def _contender(one: OfflineContender) -> ContenderRecord:
    return ContenderRecord(
        name=one.name,
        model=one.directory.name,
        url=None,
        engine=one.engine,
        packing=packing(one.directory),
        random_weights=one.contender.random_weights,
        broken=one.broken,
        start_seconds=one.start_seconds,
        disk_bytes=weight_bytes(one.directory),
        memory=one.footprint.memory,
    )
