"""The results as tables in the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from besa.bench.results import by_load
from besa.bench.statistics import NO_DIFFERENCE
from besa.bench.words import FIGURE_NAMES, amount, change, conditions
from besa.report.figures import size

SHOWN = ("ttft_p50", "itl_p50", "e2e_p50", "e2e_p99", "output_tps")
OFFLINE = ("prefill", "step", "decode_tps")


def print_results(results: dict[str, Any], console: Console) -> None:
    """Tables of what was measured; broken contenders first."""
    for contender in results["contenders"]:
        if contender["broken"] is not None:
            console.print(
                f"[bold red]{escape(contender['name'])} is broken[/]: "
                f"{escape(contender['broken'])}",
                soft_wrap=True,
            )
    if results["measurements"]:
        console.print(_figures(results))
    if results.get("slo"):
        console.print(_objective(results))
    console.print(_contenders(results))
    for note in results["notes"]:
        if "is broken and" not in note:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(conditions(results), markup=False, soft_wrap=True)


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(escape(head), justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _figures(results: dict[str, Any]) -> Table:
    """A row for each load and contender; what the gain over the reference is under the figure."""
    shown = SHOWN if results["kind"] == "serving" else OFFLINE
    names = [n for n in shown if any(n in m["summary"] for m in results["measurements"])]
    table = _table("load", "contender", *(FIGURE_NAMES[name] for name in names))
    last = None
    for one, gains in by_load(results):
        cells = []
        for name in names:
            cell = amount(name, one["summary"].get(name))
            if name in gains:
                cell += f"\n{_gain(gains[name])}"
            cells.append(cell)
        load = one["load"]
        table.add_row("" if load == last else load, escape(one["contender"]), *cells)
        last = load
    return table


def _gain(gain: dict[str, Any]) -> str:
    swallowed = gain["verdict"] == NO_DIFFERENCE
    words = NO_DIFFERENCE if swallowed else change(gain)  # its span is on the page
    style = {"better": "green", "worse": "red", NO_DIFFERENCE: "dim"}.get(gain["verdict"], "")
    return f"[{style}]{words}[/]" if style else words


def _objective(results: dict[str, Any]) -> Table:
    slo = results["slo"]
    limits = ", ".join(f"{k} ≤ {v * 1000:g} ms" for k, v in slo["limits"].items())
    head = f"requests/s with {limits} for {slo['share']:.0%}"
    table = _table("objective", "contender", head, "gain")
    for name, found in slo["rates"].items():
        above = found["above"]
        held = f"{found['rate']:.3g}" if found["rate"] else "none"
        if above is not None:
            held += f" (not {above:.3g})"
        gain = found.get("gain")
        table.add_row("", escape(name), held, _gain(gain) if gain else "")
    return table


def _contenders(results: dict[str, Any]) -> Table:
    table = _table("contender", "engine", "on disk", "memory", "peak", "start", "perplexity")
    for one in results["contenders"]:
        memory, perplexity = one["memory"], one["perplexity"]
        value = (perplexity or {}).get("perplexity")
        start = one["start_seconds"]
        engine = " ".join(filter(None, (one["engine"], one["engine_version"]))) or one["url"] or ""
        name = one["name"] + (" (random weights)" if one["random_weights"] else "")
        table.add_row(
            escape(name),
            escape(engine),
            size(one["disk_bytes"]),
            size(memory.get("gpu") or memory["steady"]),
            size(memory["peak"]),
            "–" if start is None else f"{start:.1f} s",
            "–" if value is None else f"{value:.3f}",
        )
    return table
