"""The results as tables in the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from besa.bench.formatting import FIGURE_NAMES, amount, change, conditions
from besa.bench.results import Objective, Results
from besa.bench.statistics import NO_DIFFERENCE, Gain
from besa.report.formatting import NONE, size

SERVING = ("ttft_p50", "itl_p50", "e2e_p50", "e2e_p99", "output_tps")
OFFLINE = ("prefill", "step", "decode_tps")


def print_results(results: Results, console: Console) -> None:
    """Tables of what was measured; broken contenders first."""
    for contender in results.broken:
        console.print(
            f"[bold red]{escape(contender.name)} is broken[/]: {escape(contender.broken or '')}",
            soft_wrap=True,
        )
    if results.measurements:
        console.print(_figures(results))
    if results.slo:
        console.print(_objective(results.slo))
    console.print(_contenders(results))
    for note in results.other_notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    console.print(conditions(results), markup=False, soft_wrap=True)


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(heads):
        table.add_column(escape(head), justify="left" if index < 2 else "right", no_wrap=True)
    return table


def _figures(results: Results) -> Table:
    """A row for each load and contender; the gain over the reference is under the figure."""
    shown = SERVING if results.kind == "serving" else OFFLINE
    names = [name for name in shown if any(name in m.summary for m in results.measurements)]
    table = _table("load", "contender", *(FIGURE_NAMES[name] for name in names))
    last = None
    for one, gains in results.by_load():
        cells = []
        for name in names:
            cell = amount(name, one.summary.get(name))
            if name in gains:
                cell += f"\n{_gain(gains[name])}"
            cells.append(cell)
        table.add_row("" if one.load == last else one.load, escape(one.contender), *cells)
        last = one.load
    return table


def _gain(gain: Gain) -> str:
    same = gain.verdict == NO_DIFFERENCE
    shown = NO_DIFFERENCE if same else change(gain)  # its interval is on the page
    style = {"better": "green", "worse": "red", NO_DIFFERENCE: "dim"}.get(gain.verdict or "", "")
    return f"[{style}]{shown}[/]" if style else shown


def _objective(slo: Objective) -> Table:
    limits = ", ".join(f"{k} ≤ {v * 1000:g} ms" for k, v in slo.limits.items())
    head = f"requests/s with {limits} for {slo.share:.0%}"
    table = _table("objective", "contender", head, "gain")
    for name, found in slo.rates.items():
        held = f"{found.rate:.3g}" if found.rate else "none"
        if found.above is not None:
            held += f" (not {found.above:.3g})"
        table.add_row("", escape(name), held, _gain(found.gain) if found.gain else "")
    return table


def _contenders(results: Results) -> Table:
    table = _table("contender", "engine", "on disk", "memory", "peak", "start", "perplexity")
    for one in results.contenders:
        perplexity = one.perplexity.perplexity if one.perplexity else None
        engine = " ".join(filter(None, (one.engine, one.engine_version))) or one.url or ""
        table.add_row(
            escape(one.name + (" (random weights)" if one.random_weights else "")),
            escape(engine),
            size(one.disk_bytes),
            size(one.memory.gpu or one.memory.steady),
            size(one.memory.peak),
            NONE if one.start_seconds is None else f"{one.start_seconds:.1f} s",
            NONE if perplexity is None else f"{perplexity:.3f}",
        )
    return table
