"""`besa bench`, read from top to bottom: start all, measure in turns, end all, compare, write.

results = bench(BenchConfig(contenders=(Contender("dense", "DENSE"), Contender("sparse", "S"))))
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import Any

from besa.bench.contenders import BrokenError, Server
from besa.bench.figures import FIGURES
from besa.bench.generator import Generator, generator_for
from besa.bench.load import Load, Prompts, read_prompts
from besa.bench.quality import perplexities, title_of
from besa.bench.results import (
    SCHEMA_VERSION,
    Results,
    bracket_gain,
    finite,
    gains,
    machine,
    quantiles,
    stamp,
    summary,
    versions,
)
from besa.bench.settings import BenchConfig
from besa.bench.slo import RateSearch, within
from besa.bench.statistics import ENOUGH_ROUNDS
from besa.bench.turns import Turns
from besa.errors import BesaError

# Shares of the rate at which the fastest contender saturates, for --rate auto.
_AUTO_RATES = (0.25, 0.5, 0.75, 0.9, 1.1)
# What is worth a word: cores used by who should be idle, and by other programs.
_IDLE_CORES, _OTHER_CORES = 0.05, 0.2


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
    return finite(_results(config, turns, loads, objective, quality, generator))


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


def _objective(turns: Turns, config: BenchConfig) -> dict[str, Any]:
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
    rates = {
        server.name: {"rate": searches[server.name].low, "above": searches[server.name].high}
        for server in turns.whole
    }
    return {"limits": dict(config.slo), "share": config.slo_share, "rates": rates}


def _quality(
    servers: list[Server], config: BenchConfig, tell: Callable[[str], None]
) -> dict[str, Any]:
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
        return perplexities(chosen, config.text, config.windows, limit=24 * 3600)
    except BesaError as error:
        return {"skipped": str(error)}


def _results(
    config: BenchConfig,
    turns: Turns,
    loads: list[Load],
    objective: dict[str, Any] | None,
    quality: dict[str, Any],
    generator: Generator,
) -> Results:
    names = [server.name for server in turns.whole]
    measurements = []
    for (name, load), measured in turns.measured.items():
        if name not in names:
            continue
        requests = [request for one in measured for request in one.requests]
        rounds = [one.figures for one in measured]
        measurements.append(
            {
                "contender": name,
                "load": load.name,
                "rounds": rounds,
                "summary": summary(rounds),
                "requests": len(requests),
                "input_tokens": _range(request.input_tokens for request in requests),
                "output_tokens": _range(request.output_tokens for request in requests),
                "quantiles": {
                    "ttft": quantiles([request.ttft for request in requests]),
                    "itl": quantiles([gap for request in requests for gap in request.gaps]),
                    "e2e": quantiles([request.latency for request in requests]),
                },
            }
        )
    reference = names[0] if names else None
    paced = [load.name for load in loads if load.kind == "rate"]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "serving",
        "date": stamp(),
        "settings": settings_of(config),
        "generator": {"name": generator.name, "version": generator.version},
        "machine": machine(),
        "versions": versions(),
        "reference": reference,
        "contenders": [_contender(server, quality, turns.servers[0]) for server in turns.servers],
        "loads": [{"name": x.name, "kind": x.kind, "value": x.value} for x in loads],
        "measurements": measurements,
        "comparisons": comparisons(measurements, reference, FIGURES, paced),
        "slo": _with_gains(objective, reference),
        "quality": quality,
        "notes": _notes(turns, measurements, config),
    }


def comparisons(
    measurements: list[dict[str, Any]],
    reference: str | None,
    figures: dict[str, tuple[str, str, bool]],
    paced: Collection[str] = (),
) -> dict[str, Any]:
    """The gains of every contender over the reference, by contender, load and figure.

    Args:
        paced: the loads whose throughput is what was asked for, so that it is no gain.
    """
    better = {name: higher for name, (_, _, higher) in figures.items()}
    rounds = {(m["contender"], m["load"]): m["rounds"] for m in measurements}
    found: dict[str, Any] = {}
    for (name, load), own in rounds.items():
        if name != reference and (reference, load) in rounds:
            chosen = better
            if load in paced:
                chosen = {k: v for k, v in better.items() if k not in ("rps", "output_tps")}
            found.setdefault(name, {})[load] = gains(own, rounds[reference, load], chosen)
    return found


def settings_of(config: BenchConfig) -> dict[str, Any]:
    """What was asked for, without this machine's folders."""
    return {
        "loads": [load.name for load in config.loads],
        "auto_rates": config.auto_rates,
        "slo": dict(config.slo),
        "slo_share": config.slo_share,
        "input_length": config.input_length,
        "output_length": config.output_length,
        "prompts": config.prompts.name if config.prompts else "synthetic",
        "requests": config.requests,
        "rounds": config.rounds,
        "warmup": config.warmup,
        "seed": config.seed,
        "engine": config.engine,
        "engine_args": list(config.engine_args),
        "timeout": config.timeout,
        "text": title_of(config.text) if config.quality else None,
    }


def _contender(server: Server, quality: dict[str, Any], first: Server) -> dict[str, Any]:
    command = server.command
    alike = None
    if server is not first and server.answers and first.answers:
        pairs = zip(server.answers, first.answers, strict=True)
        alike = sum(a == b for a, b in pairs) / len(first.answers)
    return {
        "name": server.name,
        "model": server.directory.name if server.directory else server.contender.model,
        "url": server.contender.url,
        "engine": command.engine if command else None,
        "engine_version": command.version if command else None,
        "environment": dict(command.environment) if command else None,
        "flags": list(server.config.engine_args) if command and not server.is_graph else None,
        "packing": server.packing,
        "random_weights": server.contender.random_weights,
        "broken": server.broken,
        "start_seconds": server.start_seconds,
        "disk_bytes": server.disk_bytes(),
        "memory": server.memory,
        "idle_cores": server.idle_cpu,
        "same_answers": alike,
        "perplexity": quality.get(server.name),
    }


def _with_gains(objective: dict[str, Any] | None, reference: str | None) -> dict[str, Any] | None:
    if objective is None:
        return None
    rates = objective["rates"]
    for name, found in rates.items():
        if name != reference and reference in rates:
            other = rates[reference]
            found["gain"] = bracket_gain(
                (found["rate"], found["above"]), (other["rate"], other["above"])
            )
    return objective


def _range(values: Any) -> list[int]:
    known = list(values)
    return [min(known), max(known)]


def _notes(turns: Turns, measurements: list[dict[str, Any]], config: BenchConfig) -> list[str]:
    """What a reader has to know before believing a figure."""
    notes = []
    for server in turns.servers:
        if server.broken is not None:
            notes.append(f"{server.name} is broken and not in any figure: {server.broken}.")
        elif server.idle_cpu > _IDLE_CORES:
            notes.append(
                f"{server.name} used up to {server.idle_cpu:.2f} cores while another one was "
                "measured, which slows that one down."
            )
    if any(server.contender.random_weights for server in turns.servers):
        notes.append(
            "Random weights: the figures are about speed and memory, the answers mean nothing."
        )
    busy = statistics.median(turns.elsewhere) if turns.elsewhere else 0.0
    if busy > _OTHER_CORES and all(server.pid is not None for server in turns.whole):
        notes.append(
            f"Other programs used {busy:.1f} cores meanwhile: on an idle machine the figures "
            "would be others."
        )
    if config.rounds < ENOUGH_ROUNDS and len(turns.whole) > 1:
        notes.append(
            f"{config.rounds} rounds are too few to tell a difference from chance: "
            f"{ENOUGH_ROUNDS} are enough."
        )
    for one in measurements:
        least, most = one["output_tokens"]
        if least != config.output_length or most != config.output_length:
            notes.append(
                f"{one['contender']}, {one['load']}: answers of {least} to {most} tokens, not "
                f"{config.output_length}."
            )
    return notes
