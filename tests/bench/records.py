"""Results of runs that never were, put together by the code that puts real ones together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from besa.bench.figures import FIGURES, Request, figures
from besa.bench.offline_figures import OFFLINE_FIGURES
from besa.bench.results import SCHEMA_VERSION, finite, gains, quantiles, summary
from besa.bench.run import comparisons

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


def contender(name: str, **other: Any) -> dict[str, Any]:
    return {
        "name": name,
        "model": "model",
        "url": None,
        "engine": "vllm",
        "engine_version": "0.32.0+cpu",
        "flags": [],
        "packing": None,
        "random_weights": False,
        "broken": None,
        "start_seconds": 31.4,
        "disk_bytes": 2200 * MIB,
        "memory": {"steady": 3400 * MIB, "peak": 3900 * MIB, "gpu": None},
        "idle_cores": 0.0,
        "same_answers": None,
        "perplexity": {
            "text": "builtin:test",
            "perplexity": 11.76,
            "standard_error": 0.1,
            "tokens": 8192,
            "seqlen": 256,
        },
        **other,
    }


def serving(
    speeds: dict[str, float],
    loads: Sequence[tuple[str, float]] = (("concurrency", 1.0),),
    **other: Any,
) -> dict[str, Any]:
    """A run over HTTP: contenders by how many times faster than the first they are."""
    from besa.bench.load import Load

    source = random.Random(0)
    chosen = [Load(kind, value) for kind, value in loads]
    measurements = []
    for load in chosen:
        for name, speed in speeds.items():
            slower = 1 + load.value / 10
            made = [requests(source, 0.4 * slower / speed, 0.1 * slower / speed) for _ in range(5)]
            rounds = [figures(one, one[0].latency * 8 / load.value) for one in made]
            flat = [request for one in made for request in one]
            measurements.append(
                {
                    "contender": name,
                    "load": load.name,
                    "rounds": rounds,
                    "summary": summary(rounds),
                    "requests": len(flat),
                    "input_tokens": [64, 64],
                    "output_tokens": [16, 16],
                    "quantiles": {
                        "ttft": quantiles([one.ttft for one in flat]),
                        "itl": quantiles([gap for one in flat for gap in one.gaps]),
                        "e2e": quantiles([one.latency for one in flat]),
                    },
                }
            )
    first = next(iter(speeds))
    return {
        **_frame("serving", first),
        "generator": {"name": "vllm bench serve", "version": "0.32.0+cpu"},
        "contenders": [contender(name) for name in speeds],
        "loads": [{"name": x.name, "kind": x.kind, "value": x.value} for x in chosen],
        "measurements": measurements,
        "comparisons": comparisons(measurements, first, FIGURES),
        **other,
    }


def offline() -> dict[str, Any]:
    """A run inside the engines."""
    better = {name: higher for name, (_, _, higher) in OFFLINE_FIGURES.items()}
    rounds = {
        name: [
            {"prefill": 0.5 / speed, "step": 0.1 / speed + i / 1e4, "decode_tps": 10.0 * speed}
            for i in range(5)
        ]
        for name, speed in (("dense", 1.0), ("50%", 1.5))
    }
    return {
        **_frame("offline", "dense"),
        "contenders": [contender(name, perplexity=None, random_weights=True) for name in rounds],
        "loads": [{"name": "batch 1", "kind": "batch", "value": 1}],
        "measurements": [
            {"contender": name, "load": "batch 1", "rounds": own, "summary": summary(own)}
            for name, own in rounds.items()
        ],
        "comparisons": {"50%": {"batch 1": gains(rounds["50%"], rounds["dense"], better)}},
    }


def _frame(kind: str, reference: str | None) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "date": "2026-11-25T11:00:00Z",
        "settings": {
            "loads": ["1 at a time"],
            "input_length": 64,
            "output_length": 16,
            "prompts": "synthetic",
            "rounds": 5,
            "engine_args": [],
            "slo": {},
        },
        "machine": {"cpu": "A Processor", "cores": 2, "memory": 24 << 30, "gpus": []},
        "versions": {"besa": "0.1", "python": "3.11.7"},
        "reference": reference,
        "slo": None,
        "quality": {},
        "notes": [],
    }


HOSTILE = "</title><script>alert(1)</script>\"'&<img src=x>\x00" + "x" * 120


def everything() -> dict[str, dict[str, Any]]:
    """A run of every kind, by name."""
    rates = [("concurrency", 1.0), ("concurrency", 4.0), ("concurrency", 16.0), ("rate", 0.5)]
    two = serving({"dense": 1.0, "50%": 1.45}, [*rates, ("rate", 1.5)])
    two["slo"] = {
        "limits": {"ttft": 0.5, "itl": 0.05},
        "share": 0.9,
        "rates": {
            "dense": {"rate": 0.5, "above": 0.55},
            "50%": {
                "rate": 0.8,
                "above": 0.85,
                "gain": two["comparisons"]["50%"]["1 at a time"]["rps"],
            },
        },
    }
    two["contenders"][1] |= {
        "disk_bytes": 1300 * MIB,
        "packing": {"values": "bfloat16", "pattern": "unstructured"},
        "perplexity": {**two["contenders"][0]["perplexity"], "perplexity": 13.29},
        "same_answers": 0.25,
    }
    two["notes"] = [
        "Other programs used 0.7 cores meanwhile: on an idle machine they would be others."
    ]
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
    bare = serving({"dense": 1.0, HOSTILE: 1.01})
    for each in bare["contenders"]:
        each |= {"disk_bytes": None, "perplexity": None, "engine": None, "engine_version": None}
        each |= {"memory": {"steady": None, "peak": None, "gpu": None}, "start_seconds": None}
    broken = serving({"dense": 1.0, "50%": 1.4})
    broken["contenders"].append(contender("dying", broken="its server ended: out of memory"))
    none = {**serving({"dense": 1.0}), "measurements": [], "comparisons": {}, "reference": None}
    none["contenders"] = [contender("dense", broken="cannot be reached: Connection refused")]
    found = {"two": two, "many": many, "one": one, "hostile": bare, "broken": broken, "none": none}
    return {name: finite(each) for name, each in {**found, "offline": offline()}.items()}
