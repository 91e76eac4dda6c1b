"""The page of a pruning run: one self-contained HTML file from its record (besa.json).

import json, pathlib
from besa.report.page import render

record = json.loads(pathlib.Path("pruned/besa.json").read_text())
pathlib.Path("pruned/report.html").write_text(render(record), encoding="utf-8")

The words and tables are made here, the pictures in heat.py, spread.py and charts.py, and the
templates lay them out.
"""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from besa.report import charts, heat, spread
from besa.report.figures import (
    NONE,
    Cell,
    Record,
    Summary,
    command,
    duration,
    finite,
    grid,
    merge,
    percent,
    public,
    quantile,
    rate,
    short_names,
    signed,
    size,
    small,
    summarise,
    unrouted,
)
from besa.report.layout import both, fill

EVEN = 5e-4  # rates closer than this are one rate to the eye


def render(record: Record) -> str:
    """The page of a pruning run, from its besa.json; without the folders that it names."""
    record = public(record)
    summary = summarise(record)
    blocks = record["blocks"]
    cells = grid(blocks)
    cells = dict(zip(short_names(list(cells)), cells.values(), strict=True))
    labels = [str(block["index"]) for block in blocks]
    values = {
        "name": record["model"],
        "target": rate(summary.target),
        "lead": _lead(record, summary),
        "headlines": _headlines(record, summary),
        "notes": [str(note) for note in record.get("notes") or []],
        "heat": _heat(blocks, cells, labels, summary) if cells else None,
        "rows": _rows(cells, labels, summary.target),
        "errors": _errors(blocks, labels, summary),
        "learning": _learning(blocks, labels),
        "command": command(record),
        "settings": [(key, plain(value)) for key, value in record["settings"].items()],
        "versions": [
            ("architecture", record.get("architecture", NONE)),
            ("device, dtype", f"{record['device']}, {record['dtype']}"),
            ("threads", record.get("threads", NONE)),
            *record["versions"].items(),
        ],
        "unrouted": [tuple(line.split(": ", 1)) for line in unrouted(blocks)],
        "digests": list((record.get("digests") or {}).items()),
    }
    return fill("page.html.j2", values, record)


def plain(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or NONE
    return str(value)


def describe(record: Record) -> str:
    """`unstructured, a learned rate for each row`, `2:4 pattern`: the kind of zeros, in words."""
    settings = record["settings"]
    pattern = str(settings.get("pattern", "unstructured"))
    words = f"{pattern} pattern" if ":" in pattern else pattern
    if settings.get("method") == "besa" and settings.get("granularity") and ":" not in pattern:
        each = {"layer": "linear"}.get(settings["granularity"], settings["granularity"])
        words += f", with a learned rate for each {each}"
    return words


def _lead(record: Record, summary: Summary) -> str:
    words = (
        f"{summary.method} set {summary.zeros:,} of {summary.weights:,} weights to zero "
        f"({describe(record)})."
    )
    if summary.change is not None:
        words += (
            f" The mean squared error of a block's output is {percent(abs(summary.change))} "
            f"{'lower' if summary.change < 0 else 'higher'} than with Wanda's mask at the same "
            "rate."
        )
    return words


def _headlines(record: Record, summary: Summary) -> list[Record]:
    blocks = len(record["blocks"])
    device = record.get("peak_device_memory_bytes")
    error: Record
    if summary.change is None:
        error = {
            "label": "Block error",
            "value": small(summary.error),
            "more": "of the dense output's squared size",
        }
    else:
        error = {
            "label": "Error vs Wanda",
            "value": signed(summary.change),
            "more": f"mean of the blocks: {small(summary.error)} against "
            f"{small(summary.error_wanda)}; lower in {summary.better} of {summary.compared}",
            "key": summary.change < 0,
        }
    memory = record.get("peak_memory_bytes")
    return [
        {"label": "Method", "value": summary.method, "more": describe(record)},
        {"label": "Target", "value": rate(summary.target), "more": "of the pruned linears"},
        {
            "label": "Achieved",
            "value": percent(summary.achieved, 2),
            "more": f"{summary.zeros:,} zeros",
        },
        error,
        {
            "label": "Time",
            "value": duration(record["seconds"]),
            "more": f"{blocks} block{'s' if blocks != 1 else ''} on {record['device']}, "
            f"{record['dtype']}",
        },
        {
            "label": "Peak memory",
            "value": size(memory),
            "more": f"and {size(device)} on the device" if device else "of the process",
        },
    ]


def _heat(
    blocks: list[Record], cells: dict[str, list[Cell | None]], labels: list[str], summary: Summary
) -> Record:
    rows = {name: [c.sparsity if c else None for c in line] for name, line in cells.items()}
    means = [merge(line).sparsity for line in cells.values()]
    tips = {
        (name, label): f"block {label} · {name}\n{percent(c.sparsity)} of {c.weights:,} zero"
        + (f"\nrows from {percent(c.low)} to {percent(c.high)}" if c.rows else "")
        for name, line in cells.items()
        for label, c in zip(labels, line, strict=True)
        if c
    }
    known = [value for line in rows.values() for value in line if value is not None]
    reach = heat.extent(known, summary.target)
    target = summary.target
    if max(known) - min(known) < EVEN:
        caption = (
            f"One cell for each linear of each block. All have the same rate, "
            f"{percent(known[0])}, as this method asks: the map is even."
        )
    else:
        caption = (
            "One cell for each linear of each block. Blue: fewer of its weights were pruned "
            "than the target asks, because it matters more. Orange: more of them were. Strong "
            "colours are far from the target."
        )
    heads = ["block", *rows, "whole block"]
    table = [
        [
            label,
            *(NONE if (v := line[i]) is None else percent(v, 2) for line in rows.values()),
            percent(block["sparsity"], 2),
        ]
        for i, (label, block) in enumerate(zip(labels, blocks, strict=True))
    ]
    table.append(["mean", *(percent(m, 2) for m in means), percent(summary.achieved, 2)])
    return {
        "caption": caption,
        "legend": Markup(heat.scale_bar(target, reach)),
        "chart": both(
            lambda w: heat.heatmap(rows, labels, target=target, width=w, means=means, tips=tips)
        ),
        "table": {"heads": heads, "rows": table},
    }


def _rows(cells: dict[str, list[Cell | None]], labels: list[str], target: float) -> Record | None:
    groups = {n: c for n, c in ((n, merge(line)) for n, line in cells.items()) if c.rows}
    by_block = [
        (label, merge(present))
        for label, column in zip(labels, zip(*cells.values(), strict=True), strict=True)
        if any(present := [c for c in column if c and c.rows])
    ]
    if not groups:
        return None
    names, merged = [b for b, _ in by_block], [c for _, c in by_block]
    low, high = min(c.low for c in groups.values()), max(c.high for c in groups.values())
    total = sum(c.rows for c in groups.values())
    if high - low < EVEN:
        caption = (
            f"A row is one output of a linear. All {total:,} rows have the same rate, "
            f"{percent(high)}: nothing was allocated between them."
        )
    else:
        caption = (
            f"A row is one output of a linear. The {total:,} rows range from {percent(low)} "
            f"to {percent(high)}: what one row keeps, another gives."
        )
    return {
        "caption": caption,
        "ridges": both(lambda w: spread.ridges(groups, target=target, width=w)),
        "ranges": both(lambda w: spread.ranges(merged, names, target=target, width=w))
        if len(merged) > 1
        else None,
        "table": _spread("linear", list(groups.items())),
        "by_block": _spread("block", by_block),
    }


def _spread(head: str, entries: list[tuple[str, Cell]]) -> Record:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        "heads": [head, "rows", "lowest", "5%", "25%", "median", "75%", "95%", "highest", "mean"],
        "rows": [
            [
                name,
                f"{c.rows:,}",
                percent(c.low),
                *(percent(quantile(c, share)) for share in shares),
                percent(c.high),
                percent(c.sparsity),
            ]
            for name, c in entries
        ],
    }


def _errors(blocks: list[Record], labels: list[str], summary: Summary) -> Record | None:
    own = [finite(block.get("error")) for block in blocks]
    wanda = [finite(block.get("error_wanda")) for block in blocks]
    if all(e is None for e in own):
        return None
    if not summary.compared:
        wanda = [None] * len(blocks)
    words = (
        "How far each block's output is from the dense block's on the same input: squared error "
        "over the output's squared size, so 0.01 is 1%. "
    )
    if summary.compared:
        words += (
            f"Filled dots are {summary.method}, open ones Wanda's mask at the same rate; the bars "
            "below are the difference between the two in percent (blue: lower than Wanda's)."
        )
    else:
        words += "Each block reads what the pruned blocks before it put out."
    method = summary.method
    changes = [None if e is None or not w else e / w - 1 for e, w in zip(own, wanda, strict=True)]
    return {
        "title": "Against Wanda, block by block" if summary.compared else "Error, block by block",
        "caption": words,
        "chart": both(lambda w: charts.errors(own, wanda, labels, method=method, width=w)),
        "table": {
            "heads": ["block", "name", method, "Wanda", "difference", "time"],
            "rows": [
                [
                    label,
                    block.get("name", ""),
                    small(e),
                    small(w),
                    NONE if change is None else signed(change),
                    duration(block.get("seconds") or 0.0),
                ]
                for label, block, e, w, change in zip(
                    labels, blocks, own, wanda, changes, strict=True
                )
            ],
        },
    }


def _learning(blocks: list[Record], labels: list[str]) -> Record | None:
    losses = {
        label: values
        for label, block in zip(labels, blocks, strict=True)
        if len(values := [v for v in map(finite, block.get("loss") or []) if v is not None]) > 1
        and values[0]
    }
    if not losses:
        return None
    return {
        "caption": (
            "The loss while the rates were learned, as a share of its first value: a thin line for "
            "each block, the strong one their median. A line that still falls at the end would "
            "gain from more epochs."
        ),
        "chart": both(lambda w: charts.curves(losses, width=w)),
        "table": {
            "heads": ["block", "first", "last", "change", "points"],
            "rows": [
                [label, small(v[0]), small(v[-1]), signed(v[-1] / v[0] - 1), str(len(v))]
                for label, v in losses.items()
            ],
        },
    }
