"""report.html of `besa bench`: one file that loads nothing, drawn from results.json.

import json, pathlib
from besa.bench.page import render

results = json.loads(pathlib.Path("besa-bench/results.json").read_text())
pathlib.Path("report.html").write_text(render(results), encoding="utf-8")
"""

from __future__ import annotations

from typing import Any

from besa.bench import charts
from besa.bench.results import QUANTILES, Results, by_load
from besa.bench.statistics import NO_DIFFERENCE
from besa.bench.words import FIGURE_NAMES, against, amount, change, conditions
from besa.report.figures import NONE, size
from besa.report.layout import both, fill

_MARKS = [QUANTILES.index(share) for share in (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)]
_DISTRIBUTIONS = {
    "ttft": "Time to first token",
    "itl": "Between tokens",
    "e2e": "End to end",
}
_HEADLINES = ("output_tps", "itl_p50", "ttft_p50")
_OFFLINE_HEADLINES = ("decode_tps", "prefill")


def render(results: Results) -> str:
    """The page; whatever a name holds stays text."""
    broken = [one for one in results["contenders"] if one["broken"] is not None]
    whole = [one["name"] for one in results["contenders"] if one["broken"] is None]
    values = {
        "title": _title(whole),
        "lead": _lead(results),
        "headlines": _headlines(results),
        "broken": [(one["name"], one["broken"]) for one in broken],
        "notes": [note for note in results["notes"] if "is broken and" not in note],
        "curves": _curves(results, whole),
        "distributions": _distributions(results, whole),
        "sizes": _sizes(results, whole),
        "quality": _quality(results, whole),
        "slo": _objective(results),
        "table": _table(results),
        "contenders": _contenders(results),
        "conditions": conditions(results),
        "settings": _pairs(results["settings"]),
        "machine": _pairs({**results["machine"], "date": results["date"]}),
        "versions": list(results["versions"].items()),
    }
    return fill("bench.html.j2", values, results)


def _title(whole: list[str]) -> str:
    if not whole:
        return "Nothing could be measured"
    if len(whole) > 3:
        return f"{len(whole) - 1} contenders against {whole[0]}"
    return " against ".join(reversed(whole))


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    def words(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value)) or NONE
        if isinstance(value, dict):
            return ", ".join(f"{k} {v}" for k, v in value.items()) or NONE
        return NONE if value is None else str(value)

    return [
        (key.replace("_", " "), size(value) if key == "memory" else words(value))
        for key, value in values.items()
    ]


def _lead(results: Results) -> str:
    if results["reference"] is None:
        return "No contender could be measured; below is why."
    parts = []
    for name, loads in results["comparisons"].items():
        figure = "output_tps" if results["kind"] == "serving" else "decode_tps"
        gains = [gains[figure] for gains in loads.values() if figure in gains]
        better = [g["median"] for g in gains if g["verdict"] == "better"]
        worse = [g for g in gains if g["verdict"] == "worse"]
        same = [g for g in gains if g["verdict"] == NO_DIFFERENCE]
        found = []
        if better:
            low, high = min(better), max(better)
            span = f"{low:.2f}×" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}×"
            found.append((f"{span} the tokens per second", len(better)))
        if same:
            found.append(("no difference", len(same)))
        if worse:
            found.append(("fewer tokens per second", len(worse)))
        if found:
            parts.append(f"{name}: {', '.join(_at(*one, len(gains)) for one in found)}")
    if not parts:
        return "What was measured, under which load, and how much it varied."
    return f"Against {against(results)}. {'; '.join(parts)}."


def _at(words: str, count: int, loads: int) -> str:
    if loads == 1:
        return words
    return f"{words} at {'each' if count == loads else count} of the {loads} loads"


def _headlines(results: Results) -> list[dict[str, Any]]:
    """The gains at the first load, and memory."""
    found = []
    figures = _HEADLINES if results["kind"] == "serving" else _OFFLINE_HEADLINES
    by_name = {one["name"]: one for one in results["contenders"]}
    for name, loads in list(results["comparisons"].items())[:2]:
        load, gains = next(iter(loads.items()))
        for figure in figures:
            if figure in gains:
                gain = gains[figure]
                swallowed = gain["verdict"] == NO_DIFFERENCE
                found.append(
                    {
                        "label": f"{name}: {FIGURE_NAMES[figure]}",
                        "value": "no difference" if swallowed else f"{gain['median']:.2f}×",
                        "more": f"{load}; {gain['low']:.2f}–{gain['high']:.2f} times better",
                        "key": gain["verdict"] == "better",
                    }
                )
        own, other = by_name[name], by_name[results["reference"]]
        if own["disk_bytes"] and other["disk_bytes"]:
            found.append(
                {
                    "label": f"{name}: weights on disk",
                    "value": size(own["disk_bytes"]),
                    "more": f"{results['reference']} {size(other['disk_bytes'])}",
                }
            )
    return found


def _measurements(results: Results, name: str, kind: str) -> list[dict[str, Any]]:
    order = [load["name"] for load in results["loads"] if load["kind"] == kind]
    own = {m["load"]: m for m in results["measurements"] if m["contender"] == name}
    return [own[load] for load in order if load in own]


def _curves(results: Results, whole: list[str]) -> list[dict[str, Any]]:
    if results["kind"] != "serving":
        return []
    found = []
    for kind, title in (
        ("concurrency", "Requests at a time"),
        ("rate", "Requests that come at a rate"),
    ):
        for up in ("e2e_p50", "ttft_p50"):
            lines = [
                charts.Curve(
                    name,
                    tuple(
                        (
                            m["summary"]["output_tps"]["median"],
                            m["summary"][up]["median"],
                            m["load"],
                        )
                        for m in _measurements(results, name, kind)
                    ),
                )
                for name in whole
            ]
            if any(len(line.points) > 1 for line in lines):
                words = FIGURE_NAMES[up]
                found.append(
                    {
                        "title": f"{title}: {words}",
                        "chart": both(
                            lambda width, lines=lines, words=words: charts.curves(  # type: ignore[misc]
                                lines, width=width, up=words
                            )
                        ),
                    }
                )
    return found


def _distributions(results: Results, whole: list[str]) -> list[dict[str, Any]]:
    found = []
    for key, title in _DISTRIBUTIONS.items():
        groups: dict[str, list[charts.Range]] = {}
        for m, _ in by_load(results):
            if marks := m.get("quantiles", {}).get(key):
                one = charts.Range(
                    m["contender"],
                    whole.index(m["contender"]),
                    tuple(marks[i] for i in _MARKS),
                )
                groups.setdefault(m["load"], []).append(one)
        if groups:
            found.append(
                {
                    "title": title,
                    "chart": both(
                        lambda width, groups=groups, title=title: charts.ranges(  # type: ignore[misc]
                            groups, title=title, width=width
                        )
                    ),
                }
            )
    return found


def _sizes(results: Results, whole: list[str]) -> dict[str, Any] | None:
    groups: dict[str, list[tuple[str, int, float]]] = {}
    for one in results["contenders"]:
        if one["broken"] is not None:
            continue
        index, memory = whole.index(one["name"]), one["memory"]
        for group, value in (
            ("Weights on disk", one["disk_bytes"]),
            ("Memory of the server, at rest", memory["steady"]),
            ("Memory of the server, at most", memory["peak"]),
            ("GPU memory", memory.get("gpu")),
        ):
            if value:
                groups.setdefault(group, []).append((one["name"], index, float(value)))
    if not groups:
        return None
    return both(lambda w: charts.bars(groups, title="Memory and size", words=size, width=w))


def _quality(results: Results, whole: list[str]) -> dict[str, Any] | None:
    figure = "output_tps" if results["kind"] == "serving" else "decode_tps"
    if not results["measurements"]:
        return None
    load = results["loads"][0]["name"]
    speeds = {
        m["contender"]: m["summary"][figure]["median"]
        for m in results["measurements"]
        if m["load"] == load and figure in m["summary"]
    }
    points = []
    for one in results["contenders"]:
        found = one["perplexity"] or {}
        if one["name"] in speeds and found.get("perplexity") is not None:
            error = found.get("standard_error") or 0.0
            index = whole.index(one["name"])
            points.append((one["name"], index, speeds[one["name"]], found["perplexity"], error))
    if not points:
        return None
    first = next(one["perplexity"] for one in results["contenders"] if one["perplexity"])
    return {
        "chart": both(lambda w: charts.quality(points, across=f"output tokens/s, {load}", width=w)),
        "text": f"{first['text']}, {first['tokens']:,} tokens in windows of {first['seqlen']:,}",
    }


def _objective(results: Results) -> dict[str, Any] | None:
    slo = results.get("slo")
    if not slo:
        return None
    rows = []
    for name, found in slo["rates"].items():
        above = NONE if found["above"] is None else f"{found['above']:.3g}"
        gain = change(found["gain"]) if found.get("gain") else NONE
        held = f"{found['rate']:.3g}" if found["rate"] else "none"
        rows.append([name, held, above, gain])
    limits = ", ".join(f"{k} at most {v * 1000:g} ms" for k, v in slo["limits"].items())
    return {
        "caption": f"The highest rate of requests at which {slo['share']:.0%} of them are good: "
        f"{limits}. Found by bisection, contenders in turns.",
        "heads": ["Contender", "Held at, requests/s", "No longer at", "Gain"],
        "rows": rows,
    }


def _table(results: Results) -> dict[str, Any]:
    figures = list(dict.fromkeys(n for m in results["measurements"] for n in m["summary"]))
    rows = []
    for m, gains in by_load(results):
        cells = []
        for name in figures:
            gain = gains.get(name)
            cells.append(
                {
                    "value": amount(name, m["summary"].get(name)),
                    "gain": change(gain) if gain else "",
                    "kind": (gain or {}).get("verdict") or "",
                }
            )
        rows.append({"load": m["load"], "name": m["contender"], "cells": cells})
    return {"heads": [FIGURE_NAMES[name] for name in figures], "rows": rows}


def _contenders(results: Results) -> dict[str, Any]:
    rows = []
    for one in results["contenders"]:
        engine = " ".join(filter(None, (one["engine"], one["engine_version"])))
        packing = one.get("packing")
        same = one.get("same_answers")
        perplexity = (one["perplexity"] or {}).get("perplexity")
        start = one["start_seconds"]
        rows.append(
            [
                one["name"] + (" (random weights)" if one["random_weights"] else ""),
                engine or one["url"] or NONE,
                f"{packing['values']}, {packing['pattern']}" if packing else NONE,
                size(one["disk_bytes"]),
                size(one["memory"]["steady"]),
                size(one["memory"]["peak"]),
                NONE if start is None else f"{start:.1f} s",
                NONE if perplexity is None else f"{perplexity:.3f}",
                NONE if same is None else f"{same:.0%}",
            ]
        )
    heads = ["Contender", "Engine", "Packed", "On disk", "Memory at rest", "At most", "Start"]
    return {"heads": [*heads, "Perplexity", "Same answers"], "rows": rows}
