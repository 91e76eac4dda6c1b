"""Which pictures a run's results are worth: throughput, distributions, sizes, quality.

Here numbers are chosen from the results; `besa.bench.charts` draws them. A contender keeps its
number, and with it its colour, in all of them.
"""

from __future__ import annotations

from dataclasses import dataclass

from besa.bench import charts
from besa.bench.formatting import FIGURE_NAMES
from besa.bench.results import QUANTILES, Measurement, Results
from besa.report.formatting import size
from besa.report.layout import Chart

_MARKS = [QUANTILES.index(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)]
_LATENCIES = {"ttft": "Time to first token", "itl": "Between tokens", "e2e": "End to end"}
_KINDS = {"concurrency": "Requests at a time", "rate": "Requests that come at a rate"}


@dataclass(frozen=True)
class Picture:
    """A chart with what stands above it, or below."""

    chart: Chart
    title: str = ""
    text: str = ""


def curves(results: Results) -> list[Picture]:
    """Throughput against latency, where a contender has more than one load of a kind."""
    if results.kind != "serving":
        return []
    found = []
    for kind, title in _KINDS.items():
        for latency in ("e2e_p50", "ttft_p50"):
            lines = [
                charts.Curve(one.name, _points(results, one.name, kind, latency))
                for one in results.sound
            ]
            if any(len(line.points) > 1 for line in lines):
                up = FIGURE_NAMES[latency]
                found.append(Picture(_curves(lines, up), f"{title}: {up}"))
    return found


def _curves(lines: list[charts.Curve], up: str) -> Chart:
    return Chart.drawn(lambda width: charts.curves(lines, width=width, up=up))


def _points(
    results: Results, name: str, kind: str, latency: str
) -> tuple[tuple[float, float, str], ...]:
    """A contender's throughput and latency at each load of a kind."""
    own = {m.load: m for m in results.measurements if m.contender == name}
    loads = [load.name for load in results.loads if load.kind == kind and load.name in own]
    return tuple((_median(own[x], "output_tps"), _median(own[x], latency), x) for x in loads)


def _median(measurement: Measurement, figure: str) -> float:
    return measurement.summary[figure].median


def distributions(results: Results) -> list[Picture]:
    """The quantiles of each latency, load by load."""
    found = []
    number = _numbers(results)
    for latency, title in _LATENCIES.items():
        groups: dict[str, list[charts.Range]] = {}
        for m, _ in results.by_load():
            if quantiles := (m.quantiles or {}).get(latency):
                p5, p25, p50, p75, p95, p99 = (quantiles[i] for i in _MARKS)
                one = charts.Range(m.contender, number[m.contender], (p5, p25, p50, p75, p95, p99))
                groups.setdefault(m.load, []).append(one)
        if groups:
            found.append(Picture(_ranges(groups, title), title))
    return found


def _ranges(groups: dict[str, list[charts.Range]], title: str) -> Chart:
    return Chart.drawn(lambda width: charts.ranges(groups, title=title, width=width))


def sizes(results: Results) -> Chart | None:
    """Bytes on disk and in memory."""
    groups: dict[str, list[tuple[str, int, float]]] = {}
    for index, one in enumerate(results.sound):
        for group, value in (
            ("Weights on disk", one.disk_bytes),
            ("Memory of the server, at rest", one.memory.steady),
            ("Memory of the server, at most", one.memory.peak),
            ("GPU memory", one.memory.gpu),
        ):
            if value:
                groups.setdefault(group, []).append((one.name, index, float(value)))
    if not groups:
        return None
    return Chart.drawn(lambda w: charts.bars(groups, title="Memory and size", show=size, width=w))


def quality(results: Results) -> Picture | None:
    """Perplexity against the speed at the first load, where both were measured."""
    if not results.measurements:
        return None
    figure = "output_tps" if results.kind == "serving" else "decode_tps"
    load = results.loads[0].name
    speeds = {
        m.contender: _median(m, figure)
        for m in results.measurements
        if m.load == load and figure in m.summary
    }
    number = _numbers(results)
    measured = [(one.name, one.perplexity) for one in results.contenders if one.perplexity]
    points = [
        (name, number[name], speeds[name], found.perplexity, found.standard_error or 0.0)
        for name, found in measured
        if name in speeds and found.perplexity is not None
    ]
    if not points:
        return None
    _, first = measured[0]
    return Picture(
        Chart.drawn(lambda w: charts.quality(points, across=f"output tokens/s, {load}", width=w)),
        text=first.read,
    )


def _numbers(results: Results) -> dict[str, int]:
    """Each sound contender's number."""
    return {contender.name: index for index, contender in enumerate(results.sound)}
