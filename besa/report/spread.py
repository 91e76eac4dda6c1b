"""How rows spread over rates: a hill for each linear, a bar for each block.

>>> cell = Cell(sparsity=0.5, weights=64, low=0.4, high=0.6, histogram=(0, 0, 4, 4, 0))
>>> ranges([cell], ["0"], target=0.5, width=300).startswith("<svg xmlns")
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from besa.report.figures import Cell, quantile
from besa.report.formatting import percent, rate
from besa.report.svg import (
    NARROW,
    Scale,
    anchor,
    block_axis,
    catcher,
    clip,
    line,
    linear,
    picture,
    rules,
    tag,
    text,
    ticks,
)


def span(lows: Sequence[float], highs: Sequence[float], target: float) -> tuple[float, float]:
    """The part of [0, 1] that rows' rates take, with room around it: at least 0.1 wide."""
    low = min(target, *lows, 1.0) - 0.02
    high = max(target, *highs, 0.0) + 0.02
    short_of = max(0.0, 0.1 - (high - low)) / 2
    return max(0.0, low - short_of), min(1.0, high + short_of)


def ridges(groups: Mapping[str, Cell], *, target: float, width: float) -> str:
    """How each linear's rows spread over rates; every hill is scaled to its own peak."""
    narrow = width < NARROW
    letters = max(len(clip(name, 24)) for name in groups)
    left, right = (4.0, 4.0) if narrow else (6.8 * letters + 18, 150.0)
    pitch, peak, top = (50.0, 30.0, 14.0) if narrow else (40.0, 32.0, 18.0)
    low, high = span([c.low for c in groups.values()], [c.high for c in groups.values()], target)
    x = linear(low, high, left, width - right)
    bottom = top + pitch * len(groups) + 6
    body = ""
    marks = ticks(low, high, 5 if narrow else 9)
    for mark in marks:
        body += line(x(mark), top - 8, x(mark), bottom, "grid")
        body += text(x(mark), bottom + 14, rate(mark), anchor(x(mark), left, width - right))
    body += line(x(target), top - 8, x(target), bottom, "target")
    body += text(x(target), bottom + 27, "target", anchor(x(target), left, width - right))
    for index, (name, cell) in enumerate(groups.items()):
        base = top + pitch * (index + 1)
        alike = cell.high - cell.low < 1e-4
        spread = f"{percent(cell.low)} to {percent(cell.high)}"
        if alike:
            spread = f"all {percent(cell.high)}"
            hill = [(x(cell.low) - 1.5, base), (x(cell.low) - 1.5, base - peak)]
            hill += [(x(cell.low) + 1.5, base - peak), (x(cell.low) + 1.5, base)]
        else:
            hill = _hill(cell, base, peak, low, high, x)
        tip = f"{name}\n{cell.rows:,} rows: {spread}\nmean {percent(cell.sparsity)}"
        body += tag("path", d=_d(hill), class_="hill alike" if alike else "hill", data_tip=tip)
        body += line(left, base, width - right, base, "axis")
        if not alike:
            body += tag("circle", cx=x(cell.sparsity), cy=base, r=3.2, class_="mark")
        if narrow:
            body += text(left, base - peak - 4, clip(name, 28), "label")
            body += text(width - right, base - peak - 4, spread, "small end")
        else:
            body += text(left - 12, base - 4, clip(name, 24), "label end")
            body += text(width - right + 12, base - 4, spread, "small")
    description = (
        "; ".join(f"{n}: {percent(c.low)} to {percent(c.high)}" for n, c in groups.items()) + "."
    )
    return picture(width, bottom + 32, "Rows by sparsity, for each linear", description, body)


def _hill(
    cell: Cell, base: float, peak: float, low: float, high: float, x: Scale
) -> list[tuple[float, float]]:
    bins, most = len(cell.histogram), max(cell.histogram, default=1)
    points = []
    for index, count in enumerate(cell.histogram):
        a, b = max(index / bins, low), min((index + 1) / bins, high)
        if a < b:
            y = base - peak * count / most
            points += [(x(a), y), (x(b), y)]
    return [(points[0][0], base), *points, (points[-1][0], base)] if points else [(0.0, base)]


def _d(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + "Z"


def ranges(cells: Sequence[Cell], blocks: Sequence[str], *, target: float, width: float) -> str:
    """Rows' rates block by block: thin, 5 to 95% of them; thick, the middle half."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    bands = [[quantile(cell, share) for share in shares] for cell in cells]
    low, high = span([b[0] for b in bands], [b[-1] for b in bands], target)
    left, top, height, bottom = 44.0, 10.0, 190.0, 34.0
    width = min(width, left + 8 + 90 * len(cells) + 120)
    step = (width - left - 8) / len(cells)
    y = linear(low, high, top + height, top)
    body = rules([(y(mark), rate(mark)) for mark in ticks(low, high, 6)], left, width - 8)
    body += line(left, y(target), width - 8, y(target), "target")
    thick = min(max(step * 0.42, 1.2), 9.0)
    for index, (cell, block) in enumerate(zip(cells, blocks, strict=True)):
        x = left + (index + 0.5) * step
        p5, p25, p50, p75, p95 = bands[index]
        body += line(x, y(p5), x, y(p95), "whisker")
        box = (y(p75), max(y(p25) - y(p75), 0.01))
        body += tag(
            "rect", x=x - thick / 2, y=box[0], width=thick, height=box[1], class_="box", rx=0.6
        )
        body += tag("circle", cx=x, cy=y(p50), r=min(max(step * 0.3, 1.1), 4.0), class_="mark")
        tip = (
            f"block {block}: half of the rows {percent(p25)} to {percent(p75)}\n"
            f"median {percent(p50)}; all {percent(cell.low)} to {percent(cell.high)}"
        )
        body += catcher(left + index * step, top, step, height, tip)
    body += block_axis(blocks, left, step, top + height + 14)
    medians = [band[2] for band in bands]
    description = f"Medians from {percent(min(medians))} to {percent(max(medians))}."
    return picture(
        width, top + height + bottom, "Rows by sparsity, block by block", description, body
    )
