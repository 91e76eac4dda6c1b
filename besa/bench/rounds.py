"""Rounds of measurements: in each of them every contender has a turn, while the others rest.

`Rounds.measure` measures all of them under one load, and `Rounds.measured` holds each one's rounds:

>>> requests = (Request(ttft=0.2, gaps=(0.1, 0.3), latency=0.6, output_tokens=3),)
>>> Measured(requests, duration=0.6).figures["output_tps"]
5.0

A contender that turns out to be broken is asked no more, and its earlier rounds do not count.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from besa.bench.client import BrokenError
from besa.bench.events import Broken, OnEvent, Step
from besa.bench.figures import Request, figures
from besa.bench.generator import Generator
from besa.bench.load import Load, Prompts
from besa.bench.server import Server
from besa.bench.settings import BenchConfig
from besa.machine import busy_seconds
from besa.processes.child import ChildError


@dataclass(frozen=True)
class Measured:
    """A contender's turn: its requests, and how long all of them took, in seconds."""

    requests: tuple[Request, ...]
    duration: float

    @property
    def figures(self) -> dict[str, float]:
        return figures(self.requests, self.duration)


class Rounds:
    """The order in which contenders are measured, and what came of it.

    Attributes:
        measured: by contender and load, a `Measured` for each round.
        other_cores: cores that other programs used, in each measurement.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        generator: Generator,
        prompts: Prompts,
        config: BenchConfig,
        on_event: OnEvent,
    ) -> None:
        self.servers, self.generator, self.prompts = servers, generator, prompts
        self.config, self.on_event = config, on_event
        self.measured: dict[tuple[str, Load], list[Measured]] = {}
        self.other_cores: list[float] = []
        self._turn = 0

    @property
    def sound(self) -> list[Server]:
        """The contenders that are not broken."""
        return [server for server in self.servers if server.broken is None]

    def measure(self, load: Load) -> None:
        """All rounds of a load."""
        for number in range(self.config.rounds):
            key = f"{load.kind} {load.value} {number}"
            prompts = self.prompts.take(load.requests(self.config.requests), key)
            warmup = self._warmup(load, key)
            for server in self.sound:
                what = f"{load.name}, round {number + 1} of {self.config.rounds}: {server.name}"
                self.on_event(Step(what))
                measured = self._turn_of(server, load, prompts, warmup, key)
                if measured is not None:
                    self.measured.setdefault((server.name, load), []).append(measured)

    def measure_rate(self, server: Server, rate: float, count: int) -> Measured | None:
        """One measurement at a rate, outside the rounds; None if the server is broken."""
        load = Load("rate", rate)
        self.on_event(Step(f"objective, {load.name}: {server.name}"))
        key = f"objective {rate}"
        prompts = self.prompts.take(count, key)
        return self._turn_of(server, load, prompts, self._warmup(load, key), key)

    def _warmup(self, load: Load, key: str) -> list[str]:
        at_once = int(load.value) if load.kind == "concurrency" else 1
        count = max(self.config.warmup, at_once) if self.config.warmup else 0
        return self.prompts.take(count, f"warm-up {key}")

    def _turn_of(
        self,
        server: Server,
        load: Load,
        prompts: Sequence[str],
        warmup: Sequence[str],
        key: str,
    ) -> Measured | None:
        """A contender's turn; None if it turns out to be broken.

        Args:
            key: what tells the turn from others; contenders with the same one get the same
                requests at the same times.
        """
        self._turn += 1
        try:
            server.check(self._turn)
            if warmup:
                self._make_load(server, warmup, load, key)
            with self._watching(server):
                measured = self._make_load(server, prompts, load, key)
        except BrokenError as error:
            server.broken = str(error)
            self.on_event(Broken(server.name, server.broken))
            server.end()
            return None
        server.footprint.update()
        return measured

    @contextmanager
    def _watching(self, server: Server) -> Iterator[None]:
        """Notes which cores are used by the contenders that should rest, and by other programs."""
        others = [one for one in self.sound if one is not server]
        before = [one.footprint.cpu() for one in others]
        own, busy, started = self._own_cpu(), busy_seconds(), time.perf_counter()
        yield
        seconds = time.perf_counter() - started
        for one, cpu in zip(others, before, strict=True):
            one.idle_cores = max(one.idle_cores, (one.footprint.cpu() - cpu) / seconds)
        used = busy_seconds() - busy - (self._own_cpu() - own)
        self.other_cores.append(max(0.0, used / seconds))

    def _own_cpu(self) -> float:
        """What everything that takes part has computed, in seconds: besa, generator, contenders."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        servers = sum(server.footprint.cpu() for server in self.servers)
        return own + servers + self.generator.cpu()

    def _make_load(self, server: Server, prompts: Sequence[str], load: Load, key: str) -> Measured:
        config = self.config
        seed = random.Random(f"{config.seed} {key}").randrange(2**31)
        assert server.target is not None
        try:
            answered = self.generator.measure(
                server.target, prompts, load, config.output_length, seed, config.timeout
            )
        except ChildError as error:
            raise BrokenError(server.explain(f"{self.generator.name}: {error}")) from None
        failed = [request for request in answered.requests if request.error]
        if failed:
            count = f"{len(failed)} of {len(answered.requests)} requests"
            raise BrokenError(server.explain(f"{count} failed: {failed[0].error}"))
        return Measured(answered.requests, answered.seconds)
