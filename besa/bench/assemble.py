"""The results of a run over HTTP, put together from what its parts have measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from besa.bench.checkpoint import weight_bytes
from besa.bench.conditions import machine, now, versions
from besa.bench.figures import SERVING
from besa.bench.generator import Generator
from besa.bench.load import Load
from besa.bench.quality import title_of
from besa.bench.results import (
    ContenderRecord,
    HeldRate,
    LoadGenerator,
    LoadRecord,
    Measurement,
    Objective,
    Perplexity,
    Results,
    Settings,
    broken_note,
)
from besa.bench.rounds import Measured, Rounds
from besa.bench.server import Server
from besa.bench.settings import BenchConfig
from besa.bench.statistics import ENOUGH_ROUNDS, bracket_gain
from besa.bench.summary import comparisons, quantiles, summary

# Cores that are worth a note, used by a contender that should be idle and by other programs.
_IDLE_CORES, _OTHER_CORES = 0.05, 0.2


def assemble(
    config: BenchConfig,
    rounds: Rounds,
    loads: list[Load],
    objective: Objective | None,
    quality: dict[str, Perplexity | str],
    generator: Generator,
) -> Results:
    """The results of a run over HTTP, from what its parts have measured."""
    names = [server.name for server in rounds.sound]
    reference, first = names[0] if names else None, rounds.servers[0]
    measurements = tuple(
        measurement(name, load.name, measured)
        for (name, load), measured in rounds.measured.items()
        if name in names
    )
    return Results(
        kind="serving",
        date=now(),
        settings=settings_of(config),
        generator=LoadGenerator(generator.name, generator.version),
        machine=machine(),
        versions=versions(),
        reference=reference,
        contenders=tuple(_contender(server, quality, first) for server in rounds.servers),
        loads=tuple(LoadRecord(load.name, load.kind, load.value) for load in loads),
        measurements=measurements,
        comparisons=comparisons(
            measurements,
            dict.fromkeys(names, reference or ""),
            SERVING,
            paced=[load.name for load in loads if load.kind == "rate"],
        ),
        slo=objective,
        quality=quality,
        notes=tuple(_notes(rounds, measurements, config)),
    )


def measurement(contender: str, load: str, measured: Sequence[Measured]) -> Measurement:
    """The record of a contender's rounds under a load."""
    requests = [request for one in measured for request in one.requests]
    rounds = tuple(one.figures for one in measured)
    input_tokens = [request.input_tokens for request in requests]
    output_tokens = [request.output_tokens for request in requests]
    return Measurement(
        contender=contender,
        load=load,
        rounds=rounds,
        summary=summary(rounds),
        requests=len(requests),
        input_tokens=(min(input_tokens), max(input_tokens)),
        output_tokens=(min(output_tokens), max(output_tokens)),
        quantiles={
            "ttft": quantiles([request.ttft for request in requests]),
            "itl": quantiles([gap for request in requests for gap in request.gaps]),
            "e2e": quantiles([request.latency for request in requests]),
        },
    )


def held_rates(brackets: dict[str, tuple[float, float]]) -> dict[str, HeldRate]:
    """What an objective held at, by contender; the gains are over the first one."""
    reference = next(iter(brackets), "")
    return {
        name: HeldRate(
            rate=bracket[0],
            above=bracket[1] if math.isfinite(bracket[1]) else None,
            gain=bracket_gain(bracket, brackets[reference]) if name != reference else None,
        )
        for name, bracket in brackets.items()
    }


def settings_of(config: BenchConfig) -> Settings:
    """What was asked for, without this machine's folders."""
    return Settings(
        loads=tuple(load.name for load in config.loads),
        auto_rates=config.auto_rates,
        slo=dict(config.slo),
        slo_share=config.slo_share,
        input_length=config.input_length,
        output_length=config.output_length,
        prompts=config.prompts.name if config.prompts else "synthetic",
        requests=config.requests,
        rounds=config.rounds,
        warmup=config.warmup,
        seed=config.seed,
        engine=config.engine,
        engine_args=config.engine_args,
        timeout=config.timeout,
        text=title_of(config.text) if config.quality else None,
    )


def _contender(
    server: Server, quality: dict[str, Perplexity | str], first: Server
) -> ContenderRecord:
    command = server.launch.command if server.launch else None
    alike = None
    if server is not first and server.probe and first.probe:
        alike = server.probe.agreement(first.probe)
    perplexity = quality.get(server.name)
    return ContenderRecord(
        name=server.name,
        model=server.directory.name if server.directory else server.contender.model,
        url=server.contender.url,
        engine=command.engine if command else None,
        engine_version=command.version if command else None,
        environment=dict(command.environment) if command else None,
        flags=server.config.engine_args if command and not server.is_graph else None,
        packing=server.packing,
        random_weights=server.contender.random_weights,
        broken=server.broken,
        start_seconds=server.start_seconds,
        disk_bytes=weight_bytes(server.directory) if server.directory else None,
        memory=server.footprint.memory,
        idle_cores=server.idle_cores,
        same_answers=alike,
        perplexity=perplexity if isinstance(perplexity, Perplexity) else None,
    )


def _notes(rounds: Rounds, measurements: Sequence[Measurement], config: BenchConfig) -> list[str]:
    """What a reader has to know before believing a figure."""
    notes = []
    for server in rounds.servers:
        if server.broken is not None:
            notes.append(broken_note(server.name, server.broken))
        elif server.idle_cores > _IDLE_CORES:
            notes.append(
                f"{server.name} used up to {server.idle_cores:.2f} cores while another one was "
                "measured, which slows that one down."
            )
    if any(server.contender.random_weights for server in rounds.servers):
        notes.append(
            "Random weights: the figures are about speed and memory, the answers mean nothing."
        )
    busy = statistics.median(rounds.other_cores) if rounds.other_cores else 0.0
    if busy > _OTHER_CORES and all(server.footprint.pid is not None for server in rounds.sound):
        notes.append(
            f"Other programs used {busy:.1f} cores meanwhile: on an idle machine the figures "
            "would be others."
        )
    if config.rounds < ENOUGH_ROUNDS and len(rounds.sound) > 1:
        notes.append(
            f"{config.rounds} rounds are too few to tell a difference from chance: "
            f"{ENOUGH_ROUNDS} are enough."
        )
    for one in measurements:
        assert one.output_tokens is not None
        least, most = one.output_tokens
        if least != config.output_length or most != config.output_length:
            notes.append(
                f"{one.contender}, {one.load}: answers of {least} to {most} tokens, not "
                f"{config.output_length}."
            )
    return notes
