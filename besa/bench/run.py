"""`besa bench`, read from top to bottom: start all, measure in turns, end all, compare.

besa bench SPARSE --against DENSE --out OUT     # `bench`, and its results written to OUT
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from typing import Any

from besa.bench.assemble import assemble, held_rates
from besa.bench.client import BrokenError
from besa.bench.events import Broken, OnEvent, Step, ignore
from besa.bench.generator import generator_for
from besa.bench.launcher import Launcher
from besa.bench.load import Load, Prompts, read_prompts
from besa.bench.quality import perplexities
from besa.bench.results import Objective, Perplexity, Results
from besa.bench.rounds import Rounds
from besa.bench.server import Server
from besa.bench.settings import BenchConfig
from besa.bench.slo import RateSearch, within
from besa.errors import BesaError

# Shares of the rate at which the fastest contender saturates, for --rate auto.
_AUTO_RATES = (0.25, 0.5, 0.75, 0.9, 1.1)


def bench(config: BenchConfig, on_event: OnEvent = ignore) -> Results:
    """Measures the contenders; nothing that it started runs any more when it returns.

    Args:
        on_event: is called with every step, and with every contender that is broken.

    Raises:
        BesaError: a model or the load generator is not there.
    """
    texts = read_prompts(config.prompts) if config.prompts else ()
    servers = [Server(contender, config) for contender in config.contenders]
    prompts = Prompts(_tokenizer(config, servers), config.input_length, config.seed, texts)
    with ExitStack() as stack:
        on_event(Step("load generator: loads"))
        generator = stack.enter_context(generator_for(config.generator))
        _start(servers, Launcher(config), stack, on_event)
        rounds = Rounds(servers, generator, prompts, config, on_event)
        loads = list(config.loads)
        for load in loads:
            rounds.measure(load)
        if config.auto_rates:
            for load in _auto_rates(rounds):
                loads.append(load)
                rounds.measure(load)
        objective = _objective(rounds, config) if config.slo else None
        for server in rounds.sound:
            server.footprint.update()
    quality = _quality(servers, config, on_event)
    return assemble(config, rounds, loads, objective, quality, generator)


def _tokenizer(config: BenchConfig, servers: list[Server]) -> Any:
    from besa.model.files import resolve
    from besa.model.loading import load_tokenizer

    if config.tokenizer is not None:
        return load_tokenizer(resolve(config.tokenizer))
    directory = next((s.directory for s in servers if s.directory is not None), None)
    return None if directory is None or config.prompts else load_tokenizer(directory)


def _start(servers: list[Server], launcher: Launcher, stack: ExitStack, on_event: OnEvent) -> None:
    """One server after the other; those that do not start are broken."""
    for server in servers:
        runs_already = server.contender.url is not None
        on_event(Step(f"{'asks' if runs_already else 'starts'}: {server.name}"))
        stack.enter_context(server)
        try:
            server.start(launcher)
            server.footprint.update()
        except BrokenError as error:
            server.broken = str(error)
            on_event(Broken(server.name, server.broken))
            server.end()


def _auto_rates(rounds: Rounds) -> list[Load]:
    """Rates up to and beyond what the fastest contender can do in a closed loop."""
    fastest = max(
        (
            statistics.median(one.figures["rps"] for one in measured)
            for (name, load), measured in rounds.measured.items()
            if load.kind == "concurrency" and name in {s.name for s in rounds.sound}
        ),
        default=0.0,
    )
    return [Load("rate", float(f"{share * fastest:.3g}")) for share in _AUTO_RATES if fastest]


def _objective(rounds: Rounds, config: BenchConfig) -> Objective:
    """Every contender's highest rate within the objective, one step of each at a time."""
    count = max(16, config.requests)
    searches: dict[str, RateSearch] = {}
    for server in rounds.sound:
        own = [m for (name, _), ms in rounds.measured.items() if name == server.name for m in ms]
        start = max((one.figures["rps"] for one in own), default=1.0)
        searches[server.name] = RateSearch(float(f"{start:.3g}"))
    while waiting := [s for s in rounds.sound if searches[s.name].next() is not None]:
        for server in waiting:
            rate = searches[server.name].next()
            assert rate is not None
            measured = rounds.measure_rate(server, rate, count)
            if measured is not None:
                held = within(measured.requests, config.slo, config.slo_share)
                searches[server.name].learn(rate, held)
    brackets = {s.name: (searches[s.name].low, searches[s.name].high) for s in rounds.sound}
    return Objective(dict(config.slo), config.slo_share, held_rates(brackets))


def _quality(
    servers: list[Server], config: BenchConfig, on_event: OnEvent
) -> dict[str, Perplexity | str]:
    """Perplexity of the models that besa served; {"skipped": why} where there is none."""
    if not config.quality:
        return {"skipped": "not asked for"}
    chosen = {
        server.name: server.directory
        for server in servers
        if server.directory is not None and server.broken is None and not server.is_graph
    }
    if not chosen:
        return {"skipped": "no model here to measure"}
    if any(server.contender.random_weights for server in servers):
        return {"skipped": "random weights have no quality"}
    on_event(Step("perplexity: " + ", ".join(chosen)))
    try:
        return {**perplexities(chosen, config.text, config.windows, limit=24 * 3600)}
    except BesaError as error:
        return {"skipped": str(error)}
