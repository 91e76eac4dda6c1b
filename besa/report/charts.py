"""The pictures, each a pure function from numbers to an <svg> string of a given width.

Charts are drawn for the width that they are shown at, so that letters keep their size on a phone.

>>> heatmap({"q_proj": [0.4, 0.6]}, ["0", "1"], target=0.5, width=300).startswith("<svg xmlns")
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from besa.report import palette
from besa.report.figures import Cell, percent, quantile, rate, signed, small
from besa.report.svg import (
    clip,
    every,
    line,
    linear,
    log_ticks,
    logarithmic,
    path,
    picture,
    tag,
    text,
    ticks,
)

NARROW = 480  # below this many pixels a chart is drawn for a phone


def extent(values: Sequence[float], target: float) -> float:
    """The distance from the target that gets the strongest colour: round, and at least 1%."""
    furthest = max((abs(value - target) for value in values), default=0.0)
    steps = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75)
    return next((e for e in steps if furthest <= e + 1e-9), 1.0)


def scale_bar(target: float, reach: float) -> str:
    """The heat map's legend: as much of target ± reach as a rate can take."""
    width, low, high = 300.0, max(0.0, target - reach), min(1.0, target + reach)
    x = linear(low, high, 1, width - 1)
    middle, body = palette.LEVELS // 2, ""
    for index in range(palette.LEVELS):
        a, b = (target + reach * (index - middle + half) / middle for half in (-0.5, 0.5))
        a, b = max(a, low), min(b, high)
        if a < b:
            body += tag("rect", x=x(a), y=18.0, width=x(b) - x(a), height=10.0, class_=f"h{index}")
    body += text(1, 11, "kept more", "small") + text(width - 1, 11, "pruned more", "small end")
    body += line(x(target), 15, x(target), 31, "ink")
    body += text(1, 42, rate(round(low, 6)), "small")
    body += text(width - 1, 42, rate(round(high, 6)), "small end")
    body += text(x(target), 42, f"target {rate(target)}", "small mid")
    description = f"From {rate(round(low, 6))} over the target to {rate(round(high, 6))}."
    return picture(width, 46, "Colour scale", description, body)


def heatmap(
    rows: Mapping[str, Sequence[float | None]],
    blocks: Sequence[str],
    *,
    target: float,
    width: float,
    means: Sequence[float] = (),
    tips: Mapping[tuple[str, str], str] | None = None,
) -> str:
    """Rate by linear (name → one value per block) and block, coloured by distance from the target.

    Wide: blocks run to the right. Narrow: blocks run down. `means` closes each linear's line.
    """
    reach = extent([v for line_ in rows.values() for v in line_ if v is not None], target)
    upright = width < NARROW
    letters = max(len(clip(name, 24)) for name in rows)
    if upright:
        left, top, right, bottom = 30.0, 6.9 * letters + 10, 0.0, 20.0
        across, down = len(rows), len(blocks)
        step_y = 20.0 if down <= 16 else 12.0
        step_x = min((width - left) / across, 64.0)
    else:
        left, top, right, bottom = 6.8 * letters + 14, 4.0, 50.0, 36.0
        across, down = len(blocks), len(rows)
        step_y = 26.0 if down <= 12 else 20.0
        step_x = min((width - left - right) / across, 56.0)
    wide, high = left + across * step_x + right, top + down * step_y + bottom
    gap = 2.0 if min(step_x, step_y) > 12 else 0.8
    body = ""
    for j, (name, values) in enumerate(rows.items()):
        for i, (block, value) in enumerate(zip(blocks, values, strict=True)):
            if value is None:
                continue
            column, row = (j, i) if upright else (i, j)
            x, y = left + column * step_x, top + row * step_y
            colour = palette.level(value, target, reach)
            tip = (tips or {}).get((name, block), f"block {block} · {name}\n{percent(value)} zero")
            body += tag(
                "rect",
                x=x,
                y=y,
                width=step_x - gap,
                height=step_y - gap,
                rx=1.5 if gap > 1 else None,
                class_=f"h{colour}",
                data_tip=tip,
            )
            if step_x >= 34 and step_y >= 18:
                inside = f"small mid v{colour}"
                words = percent(value)[:-1]
                body += text(x + (step_x - gap) / 2, y + (step_y - gap) / 2 + 3.6, words, inside)
    for j, name in enumerate(rows):
        if upright:
            x, y = left + (j + 0.5) * step_x + 2, top - 8
            turn = f"rotate(-90 {x:.1f} {y:.1f})"
            body += text(x, y, clip(name, 24), "label", transform=turn)
        else:
            y = top + (j + 0.5) * step_y + 3
            body += text(left - 10, y, clip(name, 24), "label end")
    for j, value in enumerate(means):
        if upright and step_x >= 30:
            x = left + (j + 0.5) * step_x
            body += text(x, high - 5, percent(value), "small strong mid")
        elif not upright:
            y = top + (j + 0.5) * step_y + 3
            body += text(wide - 2, y, percent(value), "small strong end")
    stride = every(
        len(blocks), (step_y if upright else step_x) * len(blocks), 12 if upright else 26
    )
    for i in range(0, len(blocks), stride):
        if upright:
            body += text(left - 7, top + (i + 0.5) * step_y + 3.4, blocks[i], "small end")
        else:
            y = top + down * step_y + 13
            body += text(left + (i + 0.5) * step_x - gap / 2, y, blocks[i], "small mid")
    if not upright:
        body += text(left, high - 6, "block", "small")
        if means:
            body += text(wide - 2, high - 23, "mean", "small end")
    description = (
        f"{len(rows)} linears in {len(blocks)} blocks; rates from {_lowest(rows)} to "
        f"{_highest(rows)} around the target {rate(target)}."
    )
    return picture(wide, high, "Sparsity by block and linear", description, body)


def _present(rows: Mapping[str, Sequence[float | None]]) -> list[float]:
    return [value for values in rows.values() for value in values if value is not None]


def _lowest(rows: Mapping[str, Sequence[float | None]]) -> str:
    return percent(min(_present(rows)))


def _highest(rows: Mapping[str, Sequence[float | None]]) -> str:
    return percent(max(_present(rows)))


def span(lows: Sequence[float], highs: Sequence[float], target: float) -> tuple[float, float]:
    """The part of [0, 1] that rows' rates take, with room around it: at least 0.2 wide."""
    low = min(target, *lows, 1.0) - 0.02
    high = max(target, *highs, 0.0) + 0.02
    short_of = max(0.0, 0.2 - (high - low)) / 2
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
        body += text(x(mark), bottom + 14, rate(mark), _anchor(x(mark), left, width - right))
    for index, (name, cell) in enumerate(groups.items()):
        base = top + pitch * (index + 1)
        spread = f"{percent(cell.low)} to {percent(cell.high)}"
        if cell.high - cell.low < 1e-4:
            spread = f"all {percent(cell.high)}"
            hill = [(x(cell.low) - 1.5, base), (x(cell.low) - 1.5, base - peak)]
            hill += [(x(cell.low) + 1.5, base - peak), (x(cell.low) + 1.5, base)]
        else:
            hill = _hill(cell, base, peak, low, high, x)
        tip = f"{name}\n{cell.rows:,} rows: {spread}\nmean {percent(cell.sparsity)}"
        body += tag("path", d=_d(hill), class_="hill", data_tip=tip)
        body += line(left, base, width - right, base, "axis")
        if cell.high - cell.low >= 1e-4:
            body += tag("circle", cx=x(cell.sparsity), cy=base, r=3.2, class_="mark")
        if narrow:
            body += text(left, base - peak - 4, clip(name, 28), "label")
            body += text(width - right, base - peak - 4, spread, "small end")
        else:
            body += text(left - 12, base - 4, clip(name, 24), "label end")
            body += text(width - right + 12, base - 4, spread, "small")
    body += line(x(target), top - 8, x(target), bottom, "target")
    body += text(x(target), bottom + 27, "target", _anchor(x(target), left, width - right))
    description = (
        "; ".join(f"{n}: {percent(c.low)} to {percent(c.high)}" for n, c in groups.items()) + "."
    )
    return picture(width, bottom + 32, "Rows by sparsity, for each linear", description, body)


def _hill(
    cell: Cell, base: float, peak: float, low: float, high: float, x: object
) -> list[tuple[float, float]]:
    assert callable(x)
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


def _anchor(x: float, left: float, right: float) -> str:
    if x < left + 14:
        return "small"
    return "small end" if x > right - 14 else "small mid"


def ranges(cells: Sequence[Cell], blocks: Sequence[str], *, target: float, width: float) -> str:
    """Rows' rates block by block: thin line 5 to 95% of the rows, thick 25 to 75%, dot the median."""
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    bands = [[quantile(cell, share) for share in shares] for cell in cells]
    low, high = span([b[0] for b in bands], [b[-1] for b in bands], target)
    left, top, height, bottom = 44.0, 10.0, 190.0, 34.0
    width = min(width, left + 8 + 90 * len(cells) + 120)
    step = (width - left - 8) / len(cells)
    y = linear(low, high, top + height, top)
    body = _rows_grid([(y(mark), rate(mark)) for mark in ticks(low, high, 6)], left, width - 8)
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
        body += _catcher(left + index * step, top, step, height, tip)
    body += _block_axis(blocks, left, step, top + height + 14)
    medians = [band[2] for band in bands]
    description = f"Medians from {percent(min(medians))} to {percent(max(medians))}."
    return picture(
        width, top + height + bottom, "Rows by sparsity, block by block", description, body
    )


def errors(
    own: Sequence[float | None],
    wanda: Sequence[float | None],
    blocks: Sequence[str],
    *,
    method: str,
    width: float,
) -> str:
    """Each block's output error, the method's beside Wanda's; below it their difference in %."""
    both = [None if e is None or not w else e / w - 1 for e, w in zip(own, wanda, strict=True)]
    values = [v for v in (*own, *wanda) if v is not None]
    compared = [change for change in both if change is not None]
    left, top, height = 52.0, 30.0, 200.0
    width = min(width, left + 8 + 90 * len(blocks) + 120)
    step = (width - left - 8) / len(blocks)
    centre = [left + (index + 0.5) * step for index in range(len(blocks))]
    positive = [v for v in values if v > 0]
    curved = bool(positive) and max(positive) > 20 * min(positive)
    if curved:
        low, high = min(positive) / 1.3, max(positive) * 1.3
        scale = logarithmic(low, high, top + height, top)
        marks = log_ticks(low, high, 6)
    else:
        high = max(positive, default=1.0) * 1.06
        scale = linear(0.0, high, top + height, top)
        low, marks = 0.0, ticks(0.0, high, 5)

    def y(value: float) -> float:
        return scale(max(value, low))

    body = _rows_grid([(y(mark), _tick(mark)) for mark in marks], left, width - 8)
    radius = min(max(step * 0.26, 1.3), 4.2)
    for e, w, x in zip(own, wanda, centre, strict=True):
        if e is not None and w is not None:
            body += line(x, y(e), x, y(w), "better" if e <= w else "worse")
    for series, name in ((wanda, "wanda"), (own, "own")):
        points = [(x, y(v)) for x, v in zip(centre, series, strict=True) if v is not None]
        if len(points) > 1:
            body += path(points, f"line {name}")
        if radius > 1.6 or len(points) == 1:
            marks_at = (
                tag("circle", cx=a, cy=b, r=radius, class_=f"dot {name}") for a, b in points
            )
            body += "".join(marks_at)
    body += _key(left, "own", method)
    if compared:
        body += _key(left + 7.6 * len(method) + 52, "wanda", "Wanda, same rate")
    end = top + height
    if compared:
        end = top + height + 118
        body += _changes(both, centre, step, (top + height + 30, end), (left, width - 8))
    for index, block in enumerate(blocks):
        tip = f"block {block}\n{method} {small(own[index])}"
        change = both[index]
        if change is not None:
            tip += f"\nWanda {small(wanda[index])}: {signed(change)}"
        body += _catcher(left + index * step, top, step, end - top, tip)
    body += _block_axis(blocks, left, step, end + 14)
    description = f"Errors from {small(min(values))} to {small(max(values))}." if values else ""
    if compared:
        fewer = sum(change < 0 for change in compared)
        description += f" {method}'s is the lower one in {fewer} of {len(compared)} blocks."
    return picture(width, end + 34, "Error of each block's output", description, body)


def _key(x: float, class_: str, words: str) -> str:
    sample = line(x, 11, x + 22, 11, f"line {class_}")
    sample += tag("circle", cx=x + 11, cy=11.0, r=3.6, class_=f"dot {class_}")
    return sample + text(x + 29, 15, words, "label")


def _changes(
    both: Sequence[float | None],
    centre: Sequence[float],
    step: float,
    vertical: tuple[float, float],
    horizontal: tuple[float, float],
) -> str:
    top, bottom = vertical
    known = [change for change in both if change is not None]
    low, high = min(0.0, *known) * 1.1, max(0.0, *known) * 1.1
    if high - low < 0.01:
        low, high = low - 0.005, high + 0.005
    y = linear(low, high, bottom, top)
    body = _rows_grid([(y(m), signed(m, 0)) for m in ticks(low, high, 3)], *horizontal)
    wide = min(max(step * 0.6, 1.5), 22.0)
    for change, x in zip(both, centre, strict=True):
        if change is not None:
            edges = sorted((y(0.0), y(change)))
            body += tag(
                "rect",
                x=x - wide / 2,
                y=edges[0],
                width=wide,
                height=edges[1] - edges[0],
                class_="bar good" if change <= 0 else "bar bad",
            )
    words = "difference from Wanda, lower is better"
    body += line(horizontal[0], y(0.0), horizontal[1], y(0.0), "zero")
    return body + text(horizontal[0], top - 9, words, "small")


def curves(losses: Mapping[str, Sequence[float]], *, width: float) -> str:
    """Learning curves, each as a share of its own first value: a faint line per block."""
    left, top, height = 52.0, 10.0, 170.0
    width = min(width, 620.0)
    relative = {b: [v / loss[0] for v in loss] for b, loss in losses.items() if loss[0]}
    longest = max(len(values) for values in relative.values())
    high = max(1.0, *(v for values in relative.values() for v in values))
    low = min(v for values in relative.values() for v in values)
    low, high = max(0.0, low - (high - low) * 0.08), high + (high - low) * 0.04
    if high - low < 0.02:
        low, high = max(0.0, low - 0.01), high + 0.01
    x = linear(0, max(longest - 1, 1), left + 10, width - 14)
    y = linear(low, high, top + height, top)
    body = _rows_grid([(y(m), rate(round(m, 6))) for m in ticks(low, high, 5)], left, width - 8)
    for block, values in relative.items():
        points = [(x(k), y(v)) for k, v in enumerate(values)]
        tip = f"block {block}: {small(losses[block][0])} → {small(losses[block][-1])}"
        d = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in points)
        body += tag("path", d=d, class_="line faint", data_tip=tip)
    middle = []
    for k in range(longest):
        column = sorted(values[k] for values in relative.values() if len(values) > k)
        half = len(column) // 2
        median = column[half] if len(column) % 2 else (column[half - 1] + column[half]) / 2
        middle.append((x(k), y(median)))
    body += path(middle, "line median")
    for k in range(0, longest, every(longest, width - left, 30)):
        body += text(x(k), top + height + 14, str(k + 1), "small mid")
    body += text(left, top + height + 28, "point recorded while learning", "small")
    last = sorted(values[-1] for values in relative.values())
    description = f"At the end {percent(last[0])} to {percent(last[-1])} of the first value."
    return picture(width, top + height + 34, "Learning curves", description, body)


@dataclass(frozen=True)
class Dot:
    """One line of the comparison: `note` stands at its end when there is room."""

    label: str
    value: float
    error: float
    note: str = ""
    own: bool = False


def dots(groups: Mapping[str, Sequence[Dot]], *, dense: float, width: float) -> str:
    """Perplexity by method, grouped by setting; the dense model is the line on the left."""
    narrow = width < NARROW
    letters = max(len(dot.label) for members in groups.values() for dot in members)
    noted = any(dot.note for members in groups.values() for dot in members) and not narrow
    left, right = 7.3 * letters + 14, 56.0 + (112.0 if noted else 0.0)
    everything = [dot for members in groups.values() for dot in members]
    low = min([dense, *(d.value - d.error for d in everything)])
    high = max([dense, *(d.value + d.error for d in everything)])
    curved = high > 3 * low
    if curved:
        low, high = low / 1.06, high * 1.04
        x, marks = logarithmic(low, high, left, width - right), log_ticks(low, high, 6)
    else:
        low, high = low - (high - low) * 0.05 - 1e-9, high + (high - low) * 0.03 + 1e-9
        x, marks = linear(low, high, left, width - right), ticks(low, high, 3 if narrow else 6)
    top, head, pitch = 24.0, 26.0, 21.0
    bottom = top + sum(head + pitch * len(members) + 8 for members in groups.values())
    body = ""
    for mark in marks:
        body += line(x(mark), top, x(mark), bottom, "grid")
        body += text(x(mark), bottom + 14, _tick(mark), "small mid")
    body += line(x(dense), top - 6, x(dense), bottom, "target")
    words = f"dense {_perplexity(dense)}"
    body += text(x(dense) + 5, top - 7, words, "small strong")
    y = top
    for setting, members in groups.items():
        body += line(0, y + 4, width, y + 4, "axis")
        body += text(0, y + 21, setting, "label strong")
        y += head
        for dot in members:
            middle, class_ = y + pitch / 2, "own" if dot.own else "wanda"
            strong = " strong" if dot.own else ""
            body += text(left - 10, middle + 4, dot.label, f"label end{strong}")
            body += line(x(dense), middle, x(dot.value), middle, f"stem {class_}")
            if dot.error:
                a, b = x(dot.value - dot.error), x(dot.value + dot.error)
                body += line(a, middle, b, middle, f"whisker {class_}")
                body += line(a, middle - 5, a, middle + 5, f"whisker {class_}")
                body += line(b, middle - 5, b, middle + 5, f"whisker {class_}")
            body += tag("circle", cx=x(dot.value), cy=middle, r=4.0, class_=f"dot {class_}")
            at = width - right + 50
            body += text(at, middle + 4, _perplexity(dot.value), f"label end{strong}")
            if noted:
                body += text(at + 14, middle + 4, dot.note, f"small{strong}")
            tip = f"{dot.label}, {setting}\nperplexity {_perplexity(dot.value)}"
            tip += f" ± {_perplexity(dot.error)}" if dot.error else ""
            tip += f"\n{dot.note}" if dot.note else ""
            body += _catcher(0, y, width, pitch, tip)
            y += pitch
        y += 8
    words = "perplexity, logarithmic scale" if curved else "perplexity"
    place = width - right if narrow else left
    class_ = "small end" if narrow else "small"
    body += text(place, bottom + 29, f"{words} (lower is better)", class_)
    description = f"Dense {_perplexity(dense)}. " + " ".join(
        f"{setting}: " + ", ".join(f"{d.label} {_perplexity(d.value)}" for d in members) + "."
        for setting, members in groups.items()
    )
    return picture(width, bottom + 36, "Perplexity by method and setting", description, body)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _rows_grid(marks: Sequence[tuple[float, str]], left: float, right: float) -> str:
    return "".join(
        line(left, y, right, y, "grid") + text(left - 7, y + 3.6, words, "small end")
        for y, words in marks
    )


def _block_axis(blocks: Sequence[str], left: float, step: float, y: float) -> str:
    stride = every(len(blocks), step * len(blocks), 26)
    marks = range(0, len(blocks), stride)
    body = "".join(text(left + (i + 0.5) * step, y, blocks[i], "small mid") for i in marks)
    return body + text(left, y + 15, "block", "small")


def _catcher(x: float, y: float, width: float, height: float, tip: str) -> str:
    """An invisible column that shows its tip wherever the pointer is in it."""
    return tag("rect", x=float(x), y=y, width=width, height=height, class_="catch", data_tip=tip)


__all__ = ["Dot", "curves", "dots", "errors", "extent", "heatmap", "ranges", "ridges", "scale_bar"]
