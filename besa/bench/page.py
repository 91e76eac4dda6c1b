"""report.html of `besa bench`: one file that loads nothing, drawn from a run's results.

>>> from pathlib import Path
>>> from besa.bench.results import read_results
>>> render(read_results(Path("path/to/results.json"))).startswith("<!doctype html>")
True
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from besa.bench.formatting import FIGURE_NAMES, against, amount, change, conditions
from besa.bench.pictures import curves, distributions, quality, sizes
from besa.bench.results import ContenderRecord, Objective, Results
from besa.bench.statistics import NO_DIFFERENCE
from besa.report.formatting import NONE, size
from besa.report.layout import Headline, render_page
from besa.typed_json import to_json

Values = dict[str, Any]  # what a part of the template takes

# What the page opens with: the figures of the first load.
_HEADLINES = {
    "serving": ("output_tps", "itl_p50", "ttft_p50"),
    "offline": ("decode_tps", "prefill"),
}
_HEADLINED = 2  # contenders


def render(results: Results) -> str:
    """The page; whatever a name holds stays text."""
    names = [contender.name for contender in results.sound]
    values = {
        "title": _title(names),
        "lead": _lead(results),
        "headlines": _headlines(results),
        "broken": [(contender.name, contender.broken) for contender in results.broken],
        "notes": results.other_notes,
        "curves": curves(results),
        "distributions": distributions(results),
        "sizes": sizes(results),
        "quality": quality(results),
        "slo": _objective(results.slo) if results.slo else None,
        "table": _table(results),
        "contenders": _contenders(results),
        "conditions": conditions(results),
        "settings": _pairs(to_json(results.settings)),
        "machine": _pairs({**to_json(results.machine), "date": results.date}),
        "versions": list(results.versions.items()),
    }
    return render_page("bench.html.j2", values, results.versions["besa"])


def _title(names: list[str]) -> str:
    if not names:
        return "Nothing could be measured"
    if len(names) > 3:
        return f"{len(names) - 1} contenders against {names[0]}"
    return " against ".join(reversed(names))


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as a table of two columns takes them."""

    def shown(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or NONE
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items()) or NONE
        return NONE if value is None else str(value)

    return [
        (key.replace("_", " "), size(value) if key == "memory" else shown(value))
        for key, value in values.items()
    ]


def _lead(results: Results) -> str:
    """The gains in tokens per second, in a sentence."""
    if results.reference is None:
        return "No contender could be measured; below is why."
    figure = "output_tps" if results.kind == "serving" else "decode_tps"
    parts = []
    for name, loads in results.comparisons.items():
        gains = [gains[figure] for gains in loads.values() if figure in gains]
        better = [gain.median for gain in gains if gain.verdict == "better"]
        same = [gain for gain in gains if gain.verdict == NO_DIFFERENCE]
        worse = [gain for gain in gains if gain.verdict == "worse"]
        found = []
        if better:
            low, high = f"{min(better):.2f}", f"{max(better):.2f}"
            span = f"{low}×" if low == high else f"{low} to {high}×"
            found.append((f"{span} the tokens per second", len(better)))
        if same:
            found.append(("no difference", len(same)))
        if worse:
            found.append(("fewer tokens per second", len(worse)))
        if found:
            parts.append(f"{name}: {', '.join(_at_loads(*one, len(gains)) for one in found)}")
    if not parts:
        return "What was measured, under which load, and how much it varied."
    return f"Against {against(results)}. {'; '.join(parts)}."


def _at_loads(what: str, count: int, loads: int) -> str:
    if loads == 1:
        return what
    return f"{what} at {'each' if count == loads else count} of the {loads} loads"


def _headlines(results: Results) -> list[Headline]:
    """The first contenders' gains at the first load, and what their weights take on disk."""
    found: list[Headline] = []
    disk = {contender.name: contender.disk_bytes for contender in results.contenders}
    for name, loads in list(results.comparisons.items())[:_HEADLINED]:
        load, gains = next(iter(loads.items()))
        for figure in _HEADLINES[results.kind]:
            if figure in gains:
                gain = gains[figure]
                same = gain.verdict == NO_DIFFERENCE
                found.append(
                    Headline(
                        f"{name}: {FIGURE_NAMES[figure]}",
                        NO_DIFFERENCE if same else f"{gain.median:.2f}×",
                        f"{load}; {gain.low:.2f}–{gain.high:.2f} times better",
                        key=gain.verdict == "better",
                    )
                )
        assert results.reference is not None
        if disk[name] and disk[results.reference]:
            found.append(
                Headline(
                    f"{name}: weights on disk",
                    size(disk[name]),
                    f"{results.reference} {size(disk[results.reference])}",
                )
            )
    return found


def _objective(slo: Objective) -> Values:
    rows = []
    for name, held in slo.rates.items():
        rows.append(
            [
                name,
                f"{held.rate:.3g}" if held.rate else "none",
                NONE if held.above is None else f"{held.above:.3g}",
                NONE if held.gain is None else change(held.gain),
            ]
        )
    limits = ", ".join(f"{k} at most {v * 1000:g} ms" for k, v in slo.limits.items())
    return {
        "caption": f"The highest rate of requests at which {slo.share:.0%} of them are good: "
        f"{limits}. Found by bisection, contenders in turns.",
        "heads": ["Contender", "Held at, requests/s", "No longer at", "Gain"],
        "rows": rows,
    }


def _table(results: Results) -> Values:
    """All figures: a row for each measurement, with the gain under the figure."""
    figures = list(dict.fromkeys(name for m in results.measurements for name in m.summary))
    rows = []
    for measurement, gains in results.by_load():
        cells = []
        for name in figures:
            gain = gains.get(name)
            cells.append(
                {
                    "value": amount(name, measurement.summary.get(name)),
                    "gain": change(gain) if gain else "",
                    "kind": (gain.verdict or "") if gain else "",
                }
            )
        rows.append({"load": measurement.load, "name": measurement.contender, "cells": cells})
    return {"heads": [FIGURE_NAMES[name] for name in figures], "rows": rows}


def _contenders(results: Results) -> Values:
    heads = ["Contender", "Engine", "Packed", "On disk", "Memory at rest", "At most", "Start"]
    return {
        "heads": [*heads, "Perplexity", "Same answers"],
        "rows": [_contender(contender) for contender in results.contenders],
    }


def _contender(one: ContenderRecord) -> list[str]:
    engine = " ".join(filter(None, (one.engine, one.engine_version)))
    perplexity = one.perplexity.perplexity if one.perplexity else None
    return [
        one.name + (" (random weights)" if one.random_weights else ""),
        engine or one.url or NONE,
        f"{one.packing.values}, {one.packing.pattern}" if one.packing else NONE,
        size(one.disk_bytes),
        size(one.memory.steady),
        size(one.memory.peak),
        NONE if one.start_seconds is None else f"{one.start_seconds:.1f} s",
        NONE if perplexity is None else f"{perplexity:.3f}",
        NONE if one.same_answers is None else f"{one.same_answers:.0%}",
    ]
