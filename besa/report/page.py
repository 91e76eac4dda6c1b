"""The page of a pruning run: one self-contained HTML file from its record (besa.json).

>>> from pathlib import Path
>>> from besa.model.record import read_record
>>> page = render(read_record(Path("path/to/pruned")))
>>> page.startswith("<!doctype html>")
True

The sentences and tables are made here, the pictures in heat.py, spread.py and charts.py, and the
templates lay them out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from besa.methods import UPDATES
from besa.model.prune_record import BlockRecord, PruneRecord, TriedUpdate
from besa.report import charts, heat, spread
from besa.report.figures import (
    Cell,
    Summary,
    command,
    finite,
    grid,
    merge,
    public,
    quantile,
    sparsity_in_words,
    summarise,
    unrouted,
)
from besa.report.formatting import NONE, duration, percent, rate, signed, significant, size
from besa.report.layout import Chart, Headline, Table, render_page
from besa.report.names import method_name, short_names

# A linear's cells, one for each block; None where a block has no such linear.
Cells = Mapping[str, Sequence[Cell | None]]

EVEN = 5e-4  # rates closer than this are one rate to the eye


@dataclass(frozen=True)
class Section:
    """A chart with its caption, and the same as a table."""

    caption: str
    chart: Chart
    table: Table
    title: str = ""
    legend: Markup | None = None


@dataclass(frozen=True)
class RowsSection:
    """How rows differ: by linear, and by block where there is more than one."""

    caption: str
    ridges: Chart
    ranges: Chart | None
    table: Table
    by_block: Table


def render(record: PruneRecord) -> str:
    """The page of a pruning run, from its besa.json; without the folders that it names."""
    record = public(record)
    summary = summarise(record)
    blocks = record.blocks
    found = grid(blocks)
    cells = dict(zip(short_names(list(found)), found.values(), strict=True))
    labels = [str(block.index) for block in blocks]
    threads = NONE if record.threads is None else record.threads
    values = {
        "name": record.model,
        "target": rate(summary.target),
        "lead": _lead(record, summary),
        "headlines": _headlines(record, summary),
        "notes": record.notes,
        "heat": _heat(blocks, cells, labels, summary) if cells else None,
        "rows": _rows(cells, labels, summary.target),
        "errors": _errors(blocks, labels, summary),
        "updates": _updates(blocks, labels),
        "learning": _learning(blocks, labels),
        "command": command(record),
        "settings": [(key, setting_in_words(value)) for key, value in record.settings.items()],
        "versions": [
            ("architecture", record.architecture or NONE),
            ("device, dtype", f"{record.device}, {record.dtype}"),
            ("threads", threads),
            *([("processes", record.processes)] if record.processes > 1 else ()),
            *record.versions.items(),
        ],
        "unrouted": unrouted(blocks),
        "digests": list(record.digests.items()),
    }
    version = record.besa_version or record.versions.get("besa", "")
    return render_page("page.html.j2", values, version)


def setting_in_words(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or NONE
    return str(value)


def _lead(record: PruneRecord, summary: Summary) -> str:
    sentences = (
        f"{summary.method} set {summary.zeros:,} of {summary.weights:,} weights to zero "
        f"({sparsity_in_words(record)})."
    )
    if summary.change is not None:
        sentences += (
            f" The mean squared error of a block's output is {percent(abs(summary.change))} "
            f"{'lower' if summary.change < 0 else 'higher'} than with Wanda's mask at the same "
            "rate."
        )
    return sentences


def _headlines(record: PruneRecord, summary: Summary) -> list[Headline]:
    blocks = len(record.blocks)
    device = record.peak_device_memory_bytes
    if summary.change is None:
        error = Headline(
            "Block error", significant(summary.error), "of the dense output's squared size"
        )
    else:
        error = Headline(
            "Error vs Wanda",
            signed(summary.change),
            f"mean of the blocks: {significant(summary.error)} against "
            f"{significant(summary.error_wanda)}; lower in {summary.better} of {summary.compared}",
            key=summary.change < 0,
        )
    return [
        Headline("Method", summary.method, sparsity_in_words(record)),
        Headline("Target", rate(summary.target), "of the pruned linears"),
        Headline("Achieved", percent(summary.achieved, 2), f"{summary.zeros:,} zeros"),
        error,
        Headline(
            "Time",
            duration(record.seconds),
            f"{blocks} block{'s' if blocks != 1 else ''} on {record.device}, {record.dtype}",
        ),
        Headline(
            "Peak memory",
            size(record.peak_memory_bytes),
            f"and {size(device)} on the device" if device else "of the process",
        ),
    ]


def _heat(
    blocks: Sequence[BlockRecord], cells: Cells, labels: Sequence[str], summary: Summary
) -> Section:
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
            percent(block.sparsity, 2),
        ]
        for i, (label, block) in enumerate(zip(labels, blocks, strict=True))
    ]
    table.append(["mean", *(percent(m, 2) for m in means), percent(summary.achieved, 2)])
    return Section(
        caption,
        Chart.drawn(
            lambda w: heat.heatmap(rows, labels, target=target, width=w, means=means, tips=tips)
        ),
        Table(heads, table),
        legend=Markup(heat.scale_bar(target, reach)),
    )


def _rows(cells: Cells, labels: Sequence[str], target: float) -> RowsSection | None:
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
    ranges = None
    if len(merged) > 1:
        ranges = Chart.drawn(lambda w: spread.ranges(merged, names, target=target, width=w))
    return RowsSection(
        caption,
        ridges=Chart.drawn(lambda w: spread.ridges(groups, target=target, width=w)),
        ranges=ranges,
        table=_quantiles("linear", list(groups.items())),
        by_block=_quantiles("block", by_block),
    )


def _quantiles(head: str, entries: Sequence[tuple[str, Cell]]) -> Table:
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return Table(
        [head, "rows", "lowest", "5%", "25%", "median", "75%", "95%", "highest", "mean"],
        [
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
    )


def _errors(
    blocks: Sequence[BlockRecord], labels: Sequence[str], summary: Summary
) -> Section | None:
    own = [finite(block.error) for block in blocks]
    wanda = [finite(block.error_wanda) for block in blocks]
    if all(e is None for e in own):
        return None
    if not summary.compared:
        wanda = [None] * len(blocks)
    caption = (
        "How far each block's output is from what the dense block gives: squared error "
        "over the output's squared size, so 0.01 is 1%. "
    )
    if summary.compared:
        caption += (
            f"Filled dots are {summary.method}, open ones Wanda's mask at the same rate; the bars "
            "below are the difference between the two in percent (blue: lower than Wanda's)."
        )
    else:
        caption += "Each block reads what the pruned blocks before it put out."
    method = summary.method
    changes = [None if e is None or not w else e / w - 1 for e, w in zip(own, wanda, strict=True)]
    rows = [
        [
            label,
            block.name,
            significant(e),
            significant(w),
            NONE if change is None else signed(change),
            duration(block.seconds),
        ]
        for label, block, e, w, change in zip(labels, blocks, own, wanda, changes, strict=True)
    ]
    return Section(
        caption,
        Chart.drawn(lambda w: charts.errors(own, wanda, labels, method=method, width=w)),
        Table(["block", "name", method, "Wanda", "difference", "time"], rows),
        title="Against Wanda, block by block" if summary.compared else "Error, block by block",
    )


def _updates(blocks: Sequence[BlockRecord], labels: Sequence[str]) -> Section | None:
    """What was chosen to follow the masks; None where nothing was to choose."""
    chosen = {
        label: block.update
        for label, block in zip(labels, blocks, strict=True)
        if block.update is not None
    }
    if not chosen:
        return None
    tried = [
        {_update_name(each): finite(each.error) for each in update.tried}
        for update in chosen.values()
    ]
    heads = sorted({name for each in tried for name in each}, key=_by_cost)
    names = [
        _update_name(TriedUpdate(update=one.chosen, step=one.step, mask=one.mask))
        for one in chosen.values()
    ]
    alone = [errors.get(_ALONE) for errors in tried]
    best = [errors.get(name) for errors, name in zip(tried, names, strict=True)]
    rows = [
        [label, *(significant(errors.get(head)) for head in heads), name]
        for label, errors, name in zip(chosen, tried, names, strict=True)
    ]
    return Section(
        "How far each block's output is from its target, on calibration windows that nothing was "
        "learned from: squared error over squared size, of all and as a mean of the tokens, half "
        "each. Open dots are the masks alone, filled ones the best of what was tried to make up "
        "for them, which was kept; the bars below are what that gained.",
        Chart.drawn(
            lambda w: charts.errors(
                best,
                alone,
                list(chosen),
                method="what was kept",
                against=_ALONE,
                conditions="",
                width=w,
            )
        ),
        Table(["block", *heads, "kept"], rows),
    )


_ALONE = "masks alone"


def _update_name(tried: TriedUpdate) -> str:
    own = UPDATES.get(tried.update, tried.update)
    if tried.step is not None:
        own = f"learned, step {tried.step:g}"
    if tried.mask is None:
        return _ALONE if tried.update == "none" else own
    mask = f"{method_name(tried.mask)}'s mask"
    return f"{mask} alone" if tried.update == "none" else f"{mask}, {own}"


def _by_cost(name: str) -> tuple[bool, bool, bool, str]:
    """Sorts as it was tried: nothing, ADMM, learned weights by their step; other masks later."""
    return "'s mask" in name, "learned" in name, not name.endswith("alone"), name


def _learning(blocks: Sequence[BlockRecord], labels: Sequence[str]) -> Section | None:
    losses = {
        label: values
        for label, block in zip(labels, blocks, strict=True)
        if len(values := [v for v in map(finite, block.loss) if v is not None]) > 1 and values[0]
    }
    if not losses:
        return None
    return Section(
        "The loss while the masks were learned, as a share of its first value: a thin line for "
        "each block, the strong one their median. A line that still falls at the end would "
        "gain from more epochs.",
        Chart.drawn(lambda w: charts.curves(losses, width=w)),
        Table(
            ["block", "first", "last", "change", "points"],
            [
                [
                    label,
                    significant(v[0]),
                    significant(v[-1]),
                    signed(v[-1] / v[0] - 1),
                    str(len(v)),
                ]
                for label, v in losses.items()
            ],
        ),
    )
