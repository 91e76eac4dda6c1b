"""The page that compares methods: what `besa demo` ends with.

from besa.report.comparison import render_comparison

html = render_comparison(record)  # rows of perplexities by method and setting, beside the dense one
"""

from __future__ import annotations

from besa.report import charts
from besa.report.figures import (
    NONE,
    Record,
    duration,
    finite,
    method_name,
    short_name,
    signed,
    small,
)
from besa.report.layout import both, fill


def render_comparison(record: Record) -> str:
    """The page that `besa demo` ends with: perplexity by method at each setting."""
    rows, dense = record["rows"], record["dense"]
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    groups = {s: [_dot(row) for row in rows if row["setting"] == s] for s in settings}
    values = {
        "name": short_name(str(record["model"])),
        "lead": _comparison_lead(rows, settings),
        "headlines": [
            {
                "label": "Dense perplexity",
                "value": f"{dense['perplexity']:.2f}",
                "more": f"± {small(finite(dense.get('standard_error')))} standard error",
            },
            *(_closed(rows, setting) for setting in settings),
        ],
        "caption": (
            "Each dot is one pruned model: the further left, the less quality was lost. The "
            "dashed line is the dense model. Whiskers are ± one standard error of the perplexity "
            "over the text's windows; all methods read the same windows, so differences between "
            "methods are surer than the whiskers alone suggest (see the margins in the table)."
        ),
        "picture": both(lambda w: charts.dots(groups, dense=dense["perplexity"], width=w)),
        "table_caption": (
            "Recovered: the share of Wanda's loss over the dense model that a method wins back at "
            "the same setting (negative: it loses more). Margin: how much lower its loss is than "
            "Wanda's, in nats a token, ± the standard error of that difference."
        ),
        "table": {
            "heads": ["Method", "Setting", "Perplexity", "± SE", "Recovered", "Margin", "Time"],
            "rows": [_comparison_row(row, rows, index) for index, row in enumerate(rows)],
        },
        "versions": [
            ("text", record["text"]),
            ("tokens", f"{record['tokens']:,} in windows of {record['seqlen']:,}"),
            ("machine", record.get("machine", NONE)),
            *record["versions"].items(),
        ],
    }
    return fill("comparison.html.j2", values, record)


def _label(row: Record) -> str:
    granularity = row.get("granularity")
    return method_name(row["method"]) + (f", by {granularity}" if granularity else "")


def _dot(row: Record) -> charts.Dot:
    recovered = finite(row.get("recovered"))
    note = "" if recovered is None else f"{signed(recovered, 0).lstrip('+')} won back"
    if row["method"] == "wanda":
        note = ""
    error = finite(row.get("standard_error")) or 0.0
    return charts.Dot(_label(row), row["perplexity"], error, note, row["method"] == "besa")


def _best(rows: list[Record], setting: str) -> Record | None:
    known = [r for r in rows if r["setting"] == setting and r["method"] == "besa"]
    return min(known, key=lambda r: r["perplexity"], default=None)


def _closed(rows: list[Record], setting: str) -> Record:
    """The headline of one setting: what BESA wins back of Wanda's loss."""
    best = _best(rows, setting) or min(
        (r for r in rows if r["setting"] == setting), key=lambda r: r["perplexity"]
    )
    wanda = next((r for r in rows if r["setting"] == setting and r["method"] == "wanda"), None)
    recovered = finite(best.get("recovered"))
    more = f"{_label(best)}: {best['perplexity']:.2f}"
    if wanda:
        more += f" against {wanda['perplexity']:.2f}"
    if recovered is None:
        value = f"{best['perplexity']:.2f}"
        return {"label": f"{setting}: perplexity", "value": value, "more": more}
    return {
        "label": f"At {setting}",
        "value": signed(recovered, 0).lstrip("+"),
        "more": f"of Wanda's loss won back. {more}",
        "key": recovered > 0,
    }


def _comparison_lead(rows: list[Record], settings: list[str]) -> str:
    words = (
        "Perplexity says how unsure the model is about the next token: 1 would be certain, "
        "and pruning raises it."
    )
    lowest: dict[str, list[str]] = {}
    for setting in settings:
        members = [row for row in rows if row["setting"] == setting]
        lowest.setdefault(_label(min(members, key=lambda r: r["perplexity"])), []).append(setting)
    parts = [f"{label} at {', '.join(where)}" for label, where in lowest.items()]
    return f"{words} Lowest here: {'; '.join(parts)}."


def _comparison_row(row: Record, rows: list[Record], index: int) -> Record:
    margin, error = finite(row.get("margin")), finite(row.get("margin_se"))
    recovered = finite(row.get("recovered"))
    words = NONE
    if margin is not None:
        words = f"{margin:.4f}".replace("-", "\N{MINUS SIGN}") + (
            f" ± {error:.4f}" if error is not None else ""
        )
    kind = "own" if row["method"] == "besa" else ""
    if index and rows[index - 1]["setting"] != row["setting"]:
        kind += " first"
    return {
        "kind": kind.strip(),
        "entries": [
            _label(row),
            row["setting"],
            f"{row['perplexity']:,.2f}",
            small(finite(row.get("standard_error"))),
            NONE if recovered is None else signed(recovered).lstrip("+"),
            words,
            duration(row.get("seconds") or 0.0),
        ],
    }
