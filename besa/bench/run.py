"""`besa bench`, read from top to bottom: start all, measure in turns, end all, compare, write.

results = bench(BenchConfig(contenders=(Contender("dense", "DENSE"), Contender("sparse", "S"))))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from besa.bench.assemble import assemble, held_rates
from besa.bench.contenders import BrokenError, Server
from besa.bench.generator import generator_for
from besa.bench.load import Load, Prompts, read_prompts
from besa.bench.quality import perplexities
from besa.bench.results import Objective, Perplexity, Results
from besa.bench.settings import BenchConfig
from besa.bench.slo import RateSearch, within
from besa.bench.turns import Turns
from besa.errors import BesaError

# Shares of the rate at which the fastest contender saturates, for --rate auto.
_AUTO_RATES = (0.25, 0.5, 0.75, 0.9, 1.1)


def bench(config: BenchConfig, tell: Callable[[str], None] = lambda _: None) -> Results:
    """Measures the contenders; nothing that it started runs any more when it returns.

    Args:
        tell: is told, in a few words, what is being done.

    Raises:
        BesaError: a model or the load generator is not there.
    """
    texts = read_prompts(config.prompts) if config.prompts else ()
    servers = [Server(contender, config) for contender in config.contenders]
    prompts = Prompts(_tokenizer(config, servers), config.input_length, config.seed, texts)
    with ExitStack() as stack:
        tell("load generator: loads")
        generator = stack.enter_context(generator_for(config.generator))
        _start(servers, stack, tell)
        turns = Turns(servers, generator, prompts, config, tell)
        loads = list(config.loads)
        for load in loads:
            turns.measure(load)
        if config.auto_rates:
            for load in _auto_rates(turns):
                loads.append(load)
                turns.measure(load)
        objective = _objective(turns, config) if config.slo else None
        for server in turns.whole:
            server.weigh()
    quality = _quality(servers, config, tell)
    return assemble(config, turns, loads, objective, quality, generator)


def _tokenizer(config: BenchConfig, servers: list[Server]) -> Any:
    from besa.model.files import resolve
    from besa.model.loading import load_tokenizer

    if config.tokenizer is not None:
        return load_tokenizer(resolve(config.tokenizer))
    directory = next((s.directory for s in servers if s.directory is not None), None)
    return None if directory is None or config.prompts else load_tokenizer(directory)


def _start(servers: list[Server], stack: ExitStack, tell: Callable[[str], None]) -> None:
    shared: dict[str, str] = {}
    for server in servers:
        tell(f"starts: {server.name}" if server.contender.url is None else f"asks: {server.name}")
        stack.enter_context(server)
        try:
            server.start(shared)
            server.weigh()
        except BrokenError as error:
            server.broken = str(error)
            tell(f"{server.name} is broken: {error}")
            server.end()


def _auto_rates(turns: Turns) -> list[Load]:
    """Rates up to and beyond what the fastest contender can do in a closed loop."""
    fastest = max(
        (
            statistics.median(one.figures["rps"] for one in measured)
            for (name, load), measured in turns.measured.items()
            if load.kind == "concurrency" and name in {s.name for s in turns.whole}
        ),
        default=0.0,
    )
    return [Load("rate", float(f"{share * fastest:.3g}")) for share in _AUTO_RATES if fastest]


def _objective(turns: Turns, config: BenchConfig) -> Objective:
    """Every contender's highest rate within the objective, one step of each at a time."""
    count = max(16, config.requests)
    searches: dict[str, RateSearch] = {}
    for server in turns.whole:
        own = [m for (name, _), ms in turns.measured.items() if name == server.name for m in ms]
        start = max((one.figures["rps"] for one in own), default=1.0)
        searches[server.name] = RateSearch(float(f"{start:.3g}"))
    while waiting := [s for s in turns.whole if searches[s.name].next() is not None]:
        for server in waiting:
            rate = searches[server.name].next()
            assert rate is not None
            measured = turns.probe(server, rate, count)
            if measured is not None:
                held = within(measured.requests, config.slo, config.slo_share)
                searches[server.name].learn(rate, held)
    brackets = {s.name: (searches[s.name].low, searches[s.name].high) for s in turns.whole}
    return Objective(dict(config.slo), config.slo_share, held_rates(brackets))


def _quality(
    servers: list[Server], config: BenchConfig, tell: Callable[[str], None]
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
    tell("perplexity: " + ", ".join(chosen))
    try:
        return {**perplexities(chosen, config.text, config.windows, limit=24 * 3600)}
    except BesaError as error:
        return {"skipped": str(error)}
