"""The page that compares methods: what `besa demo` ends with.

>>> from pathlib import Path
>>> from besa.report.comparison import read_comparison
>>> comparison = read_comparison(Path("path/to/comparison.json"))
>>> render_comparison(comparison).startswith("<!doctype html>")
True
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from besa.report import charts
from besa.report.comparison import ComparedRun, Comparison
from besa.report.figures import finite
from besa.report.formatting import NONE, duration, signed, significant
from besa.report.layout import Chart, Headline, render_page
from besa.report.names import short_name

HEADS = ("Method", "Setting", "Perplexity", "± SE", "Recovered", "Margin", "Time")


@dataclass(frozen=True)
class Row:
    """A line of the table; `kind` is its class in the style sheet."""

    kind: str
    entries: Sequence[str]


def render_comparison(comparison: Comparison) -> str:
    """The page that `besa demo` ends with: perplexity by method at each setting."""
    rows, dense = comparison.rows, comparison.dense
    settings = list(dict.fromkeys(row.setting for row in rows))
    groups = {s: [_dot(row) for row in rows if row.setting == s] for s in settings}
    values = {
        "name": short_name(comparison.model),
        "lead": _lead(rows, settings),
        "headlines": [
            Headline(
                "Dense perplexity",
                f"{dense.perplexity:.2f}",
                f"± {significant(finite(dense.standard_error))} standard error",
            ),
            *(_headline(rows, setting) for setting in settings),
        ],
        "caption": (
            "Each dot is one pruned model: the further left, the less quality was lost. The "
            "dashed line is the dense model. Whiskers are ± one standard error of the perplexity "
            "over the text's windows; all methods read the same windows, so differences between "
            "methods are surer than the whiskers alone suggest (see the margins in the table)."
        ),
        "picture": Chart.drawn(lambda w: charts.dots(groups, dense=dense.perplexity, width=w)),
        "table_caption": (
            "Recovered: the share of Wanda's loss over the dense model that a method wins back at "
            "the same setting (negative: it loses more). Margin: how much lower its loss is than "
            "Wanda's, in nats a token, ± the standard error of that difference."
        ),
        "heads": HEADS,
        "rows": [_row(row, rows, index) for index, row in enumerate(rows)],
        "versions": [
            ("text", comparison.text),
            ("tokens", f"{comparison.tokens:,} {comparison.windows}"),
            ("machine", comparison.machine or NONE),
            *comparison.versions.items(),
        ],
    }
    return render_page("comparison.html.j2", values, comparison.versions.get("besa", ""))


def _dot(row: ComparedRun) -> charts.Dot:
    recovered = finite(row.recovered)
    note = "" if recovered is None else f"{signed(recovered, 0).lstrip('+')} won back"
    error = finite(row.standard_error) or 0.0
    return charts.Dot(row.recipe, row.perplexity, error, note, row.method == "besa")


def _best(rows: Sequence[ComparedRun]) -> ComparedRun:
    return min(rows, key=lambda row: row.perplexity)


def _headline(rows: Sequence[ComparedRun], setting: str) -> Headline:
    """What BESA wins back of Wanda's loss at one setting; of other methods if it was not run."""
    members = [row for row in rows if row.setting == setting]
    best = _best([row for row in members if row.method == "besa"] or members)
    wanda = next((row for row in members if row.method == "wanda"), None)
    recovered = finite(best.recovered)
    more = f"{best.recipe}: {best.perplexity:.2f}"
    if wanda:
        more += f" against {wanda.perplexity:.2f}"
    if recovered is None:
        return Headline(f"{setting}: perplexity", f"{best.perplexity:.2f}", more)
    return Headline(
        f"At {setting}",
        signed(recovered, 0).lstrip("+"),
        f"of Wanda's loss won back. {more}",
        key=recovered > 0,
    )


def _lead(rows: Sequence[ComparedRun], settings: Sequence[str]) -> str:
    lowest: dict[str, list[str]] = {}
    for setting in settings:
        label = _best([row for row in rows if row.setting == setting]).recipe
        lowest.setdefault(label, []).append(setting)
    parts = [f"{label} at {', '.join(where)}" for label, where in lowest.items()]
    return (
        "Perplexity says how unsure the model is about the next token: 1 would be certain, "
        f"and pruning raises it. Lowest here: {'; '.join(parts)}."
    )


def _row(row: ComparedRun, rows: Sequence[ComparedRun], index: int) -> Row:
    margin, error = finite(row.margin), finite(row.margin_se)
    recovered = finite(row.recovered)
    margin_text = NONE
    if margin is not None:
        margin_text = f"{margin:.4f}".replace("-", "\N{MINUS SIGN}") + (
            f" ± {error:.4f}" if error is not None else ""
        )
    kind = "own" if row.method == "besa" else ""
    if index and rows[index - 1].setting != row.setting:
        kind += " first"
    return Row(
        kind.strip(),
        [
            row.recipe,
            row.setting,
            f"{row.perplexity:,.2f}",
            significant(finite(row.standard_error)),
            NONE if recovered is None else signed(recovered).lstrip("+"),
            margin_text,
            duration(row.seconds),
        ],
    )
