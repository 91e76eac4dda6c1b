"""Contenders in turns: every round asks each of them, with a warm-up, while the others rest.

    turns = Turns(servers, generator, prompts, config, tell)
    turns.measure(Load("concurrency", 4))
    turns.measured[("dense", load)]      # a Measured for every round

One that turns out to be broken is asked no more, and what it said before does not count.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from besa.bench.contenders import BrokenError, Server
from besa.bench.figures import Request, figures
from besa.bench.generator import Generator
from besa.bench.load import Load, Prompts
from besa.bench.settings import BenchConfig
from besa.machine import busy_seconds
from besa.processes.child import ChildError

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Measured:
    """A contender's turn: its requests, and how long all of them took, in seconds."""

    requests: tuple[Request, ...]
    duration: float

    @property
    def figures(self) -> dict[str, float]:
        return figures(self.requests, self.duration)


class Turns:
    """The order in which contenders are measured, and what came of it.

    Attributes:
        measured: by contender and load, a `Measured` for each round.
        elsewhere: cores that programs which are no part of this used, in each measurement.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        generator: Generator,
        prompts: Prompts,
        config: BenchConfig,
        tell: Tell,
    ) -> None:
        self.servers, self.generator, self.prompts = servers, generator, prompts
        self.config, self.tell = config, tell
        self.measured: dict[tuple[str, Load], list[Measured]] = {}
        self.elsewhere: list[float] = []
        self._turn = 0

    @property
    def whole(self) -> list[Server]:
        """The contenders that are not broken."""
        return [server for server in self.servers if server.broken is None]

    def measure(self, load: Load) -> None:
        """All rounds of a load."""
        for turn in range(self.config.rounds):
            key = f"{load.kind} {load.value} {turn}"
            count = load.requests(self.config.requests)
            chosen = self.prompts.take(count, key)
            warmup = self._warmup(load, key)
            for server in self.whole:
                self.tell(f"{load.name}, round {turn + 1} of {self.config.rounds}: {server.name}")
                measured = self.turn(server, load, chosen, warmup, key)
                if measured is not None:
                    self.measured.setdefault((server.name, load), []).append(measured)

    def probe(self, server: Server, rate: float, count: int) -> Measured | None:
        """One measurement at a rate, outside the rounds."""
        load = Load("rate", rate)
        self.tell(f"objective, {load.name}: {server.name}")
        key = f"objective {rate}"
        chosen = self.prompts.take(count, key)
        return self.turn(server, load, chosen, self._warmup(load, key), key)

    def _warmup(self, load: Load, key: str) -> list[str]:
        at_once = int(load.value) if load.kind == "concurrency" else 1
        count = max(self.config.warmup, at_once) if self.config.warmup else 0
        return self.prompts.take(count, f"warm-up {key}")

    def turn(
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
        others = [one for one in self.whole if one is not server]
        try:
            server.check(self._turn)
            if warmup:
                self._run(server, warmup, load, key)
            before = [one.cpu() for one in others]
            own, busy, started = self._own_cpu(), busy_seconds(), time.perf_counter()
            measured = self._run(server, prompts, load, key)
            seconds = time.perf_counter() - started
            for one, cpu in zip(others, before, strict=True):
                one.idle_cpu = max(one.idle_cpu, (one.cpu() - cpu) / seconds)
            used = busy_seconds() - busy - (self._own_cpu() - own)
            self.elsewhere.append(max(0.0, used / seconds))
        except BrokenError as error:
            server.broken = str(error)
            self.tell(f"{server.name} is broken: {error}")
            server.end()
            return None
        server.weigh()
        return measured

    def _own_cpu(self) -> float:
        """What everything that takes part has computed, in seconds: besa, generator, contenders."""
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        return own + sum(server.cpu() for server in self.servers) + self.generator.cpu()

    def _run(self, server: Server, prompts: Sequence[str], load: Load, key: str) -> Measured:
        config = self.config
        seed = random.Random(f"{config.seed} {key}").randrange(2**31)
        assert server.target is not None
        try:
            answered = self.generator.measure(
                server.target, prompts, load, config.output_length, seed, config.timeout
            )
        except ChildError as error:
            raise BrokenError(server.why(f"{self.generator.name}: {error}")) from None
        failed = [request for request in answered.requests if request.error]
        if failed:
            count = f"{len(failed)} of {len(answered.requests)} requests"
            raise BrokenError(server.why(f"{count} failed: {failed[0].error}"))
        return Measured(answered.requests, answered.seconds)
