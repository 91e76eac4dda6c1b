"""Results of runs that never were, put together by the code that puts real ones together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from besa.bench.assemble import measurement
from besa.bench.figures import OFFLINE, SERVING, Request
from besa.bench.load import Load
from besa.bench.results import (
    ContenderRecord,
    HeldRate,
    LoadGenerator,
    LoadRecord,
    Machine,
    Measurement,
    Memory,
    Objective,
    Packing,
    Perplexity,
    Results,
    Settings,
)
from besa.bench.rounds import Measured
from besa.bench.summary import comparisons, summary

MIB = 1 << 20


def requests(source: random.Random, ttft: float, gap: float, count: int = 8) -> list[Request]:
    """Answers of 16 tokens whose times vary a little."""
    found = []
    for _ in range(count):
        first = ttft * source.uniform(0.95, 1.1)
        gaps = tuple(gap * source.uniform(0.9, 1.2) for _ in range(15))
        latency = first + sum(gaps)
        found.append(Request("", first, gaps, latency, 64, 16, "text"))
    return found


def contender(name: str, **other: Any) -> ContenderRecord:
    usual = ContenderRecord(
        name=name,
        model="model",
        url=None,
        engine="vllm",
        engine_version="0.32.0+cpu",
        flags=(),
        start_seconds=31.4,
        disk_bytes=2200 * MIB,
        memory=Memory(steady=3400 * MIB, peak=3900 * MIB),
        idle_cores=0.0,
        perplexity=Perplexity("builtin:test", 11.76, 0.1, tokens=8192, seqlen=256),
    )
    return replace(usual, **other)


def serving(
    speeds: dict[str, float],
    loads: Sequence[tuple[str, float]] = (("concurrency", 1.0),),
    **other: Any,
) -> Results:
    """A run over HTTP: contenders by how many times faster than the first they are."""
    source = random.Random(0)
    chosen = [Load(kind, value) for kind, value in loads]
    measurements = []
    for load in chosen:
        for name, speed in speeds.items():
            slower = 1 + load.value / 10
            made = [requests(source, 0.4 * slower / speed, 0.1 * slower / speed) for _ in range(5)]
            rounds = [Measured(tuple(one), one[0].latency * 8 / load.value) for one in made]
            measurements.append(measurement(name, load.name, rounds))
    first = next(iter(speeds))
    results = Results(
        **_frame("serving", first),
        generator=LoadGenerator("vllm bench serve", "0.32.0+cpu"),
        contenders=tuple(contender(name) for name in speeds),
        loads=tuple(LoadRecord(x.name, x.kind, x.value) for x in chosen),
        measurements=tuple(measurements),
        comparisons=comparisons(measurements, dict.fromkeys(speeds, first), SERVING),
    )
    return replace(results, **other)


def offline() -> Results:
    """A run inside the engines."""
    rounds = {
        name: tuple(
            {"prefill": 0.5 / speed, "step": 0.1 / speed + i / 1e4, "decode_tps": 10.0 * speed}
            for i in range(5)
        )
        for name, speed in (("dense", 1.0), ("50%", 1.5))
    }
    measurements = tuple(Measurement(n, "batch 1", own, summary(own)) for n, own in rounds.items())
    return Results(
        **_frame("offline", "dense"),
        contenders=tuple(
            contender(name, perplexity=None, random_weights=True, idle_cores=None)
            for name in rounds
        ),
        loads=(LoadRecord("batch 1", "batch", 1),),
        measurements=measurements,
        comparisons=comparisons(measurements, dict.fromkeys(rounds, "dense"), OFFLINE),
    )


def _frame(kind: str, reference: str | None) -> dict[str, Any]:
    settings = Settings(
        loads=("1 at a time",),
        auto_rates=False,
        slo={},
        slo_share=0.9,
        input_length=64,
        output_length=16,
        prompts="synthetic",
        requests=8,
        rounds=5,
        warmup=1,
        seed=0,
        engine=None,
        engine_args=(),
        timeout=600,
        text="builtin:test",
    )
    machine = Machine("A Processor", 2, None, ("avx2",), 24 << 30, (), "Linux 6.18", None)
    return {
        "kind": kind,
        "date": "2026-11-25T11:00:00Z",
        "settings": settings,
        "machine": machine,
        "versions": {"besa": "0.1", "python": "3.11.7"},
        "reference": reference,
    }


HOSTILE = "</title><script>alert(1)</script>\"'&<img src=x>\x00" + "x" * 120


def everything() -> dict[str, Results]:
    """A run of every kind, by name."""
    rates = [("concurrency", 1.0), ("concurrency", 4.0), ("concurrency", 16.0), ("rate", 0.5)]
    two = serving({"dense": 1.0, "50%": 1.45}, [*rates, ("rate", 1.5)])
    held = {
        "dense": HeldRate(0.5, 0.55),
        "50%": HeldRate(0.8, 0.85, two.comparisons["50%"]["1 at a time"]["rps"]),
    }
    packed = contender(
        "50%",
        disk_bytes=1300 * MIB,
        packing=Packing("bfloat16", "unstructured"),
        perplexity=Perplexity("builtin:test", 13.29, 0.1, tokens=8192, seqlen=256),
        same_answers=0.25,
    )
    two = replace(
        two,
        contenders=(two.contenders[0], packed),
        slo=Objective({"ttft": 0.5, "itl": 0.05}, 0.9, held),
        notes=("Other programs used 0.7 cores: on an idle machine the figures would be others.",),
    )
    names = (
        "dense",
        "50%",
        "2:4",
        "50% int8",
        "llama.cpp Q4_0",
        "ONNX int8",
        "one with a long name",
    )
    many = serving({name: 1 + i / 4 for i, name in enumerate(names)}, rates[:3])
    one = serving({"only": 1.0})
    unknown = {"disk_bytes": None, "perplexity": None, "engine": None, "engine_version": None}
    unknown |= {"memory": Memory(), "start_seconds": None}
    bare = serving({"dense": 1.0, HOSTILE: 1.01})
    bare = replace(bare, contenders=tuple(replace(x, **unknown) for x in bare.contenders))
    broken = serving({"dense": 1.0, "50%": 1.4})
    dying = contender("dying", broken="its server ended: out of memory")
    broken = replace(broken, contenders=(*broken.contenders, dying))
    none = replace(
        serving({"dense": 1.0}),
        measurements=(),
        comparisons={},
        reference=None,
        contenders=(contender("dense", broken="cannot be reached: Connection refused"),),
    )
    return {
        "two": two,
        "many": many,
        "one": one,
        "hostile": bare,
        "broken": broken,
        "none": none,
        "offline": offline(),
    }
