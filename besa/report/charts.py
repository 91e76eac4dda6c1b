"""The other pictures: block errors, learning curves, and perplexity by method.

Each is a pure function from numbers to an <svg> string, drawn for the width that it is shown at,
so that letters keep their size on a phone.

>>> errors([0.01], [0.02], ["0"], method="BESA", width=300).startswith("<svg xmlns")
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from besa.report.formatting import percent, rate, signed, significant
from besa.report.svg import (
    NARROW,
    block_axis,
    catcher,
    every,
    line,
    linear,
    log_ticks,
    logarithmic,
    path,
    picture,
    rules,
    tag,
    text,
    ticks,
)


def errors(
    own: Sequence[float | None],
    other: Sequence[float | None],
    blocks: Sequence[str],
    *,
    method: str,
    against: str = "Wanda",
    conditions: str = ", same rate",
    width: float,
) -> str:
    """Each block's output error, the method's beside another's; below it their difference in %.

    Args:
        against: the name of the other; `conditions` follows it in the key.
    """
    both = [None if e is None or not w else e / w - 1 for e, w in zip(own, other, strict=True)]
    values = [v for v in (*own, *other) if v is not None]
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

    body = rules([(y(mark), _tick(mark)) for mark in marks], left, width - 8)
    radius = min(max(step * 0.26, 1.3), 4.2)
    for e, w, x in zip(own, other, centre, strict=True):
        if e is not None and w is not None:
            body += line(x, y(e), x, y(w), "better" if e <= w else "worse")
    for series, name in ((other, "wanda"), (own, "own")):
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
        body += _key(left + 7.6 * len(method) + 52, "wanda", against + conditions)
    end = top + height
    if compared:
        end = top + height + 118
        sides = (left, width - 8)
        body += _changes(both, centre, step, (top + height + 30, end), sides, against)
    for index, block in enumerate(blocks):
        tip = f"block {block}\n{method} {significant(own[index])}"
        change = both[index]
        if change is not None:
            tip += f"\n{against} {significant(other[index])}: {signed(change)}"
        body += catcher(left + index * step, top, step, end - top, tip)
    body += block_axis(blocks, left, step, end + 14)
    description = (
        f"Errors from {significant(min(values))} to {significant(max(values))}." if values else ""
    )
    if compared:
        fewer = sum(change < 0 for change in compared)
        description += f" {method}'s is the lower one in {fewer} of {len(compared)} blocks."
    return picture(width, end + 34, "Error of each block's output", description, body)


def _key(x: float, class_: str, label: str) -> str:
    sample = line(x, 11, x + 22, 11, f"line {class_}")
    sample += tag("circle", cx=x + 11, cy=11.0, r=3.6, class_=f"dot {class_}")
    return sample + text(x + 29, 15, label, "label")


def _changes(
    both: Sequence[float | None],
    centre: Sequence[float],
    step: float,
    vertical: tuple[float, float],
    horizontal: tuple[float, float],
    against: str,
) -> str:
    top, bottom = vertical
    known = [change for change in both if change is not None]
    low, high = min(0.0, *known) * 1.1, max(0.0, *known) * 1.1
    if high - low < 0.01:
        low, high = low - 0.005, high + 0.005
    y = linear(low, high, bottom, top)
    body = rules([(y(m), signed(m, 0)) for m in ticks(low, high, 3)], *horizontal)
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
    heading = f"difference from {against}, lower is better"
    body += line(horizontal[0], y(0.0), horizontal[1], y(0.0), "zero")
    return body + text(horizontal[0], top - 9, heading, "small")


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
    body = rules([(y(m), rate(round(m, 6))) for m in ticks(low, high, 5)], left, width - 8)
    for block, values in relative.items():
        points = [(x(k), y(v)) for k, v in enumerate(values)]
        tip = f"block {block}: {significant(losses[block][0])} → {significant(losses[block][-1])}"
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
    body += text(x(dense) + 5, top - 7, f"dense {_perplexity(dense)}", "small strong")
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
            body += catcher(0, y, width, pitch, tip)
            y += pitch
        y += 8
    scale = "perplexity, logarithmic scale" if curved else "perplexity"
    place = width - right if narrow else left
    class_ = "small end" if narrow else "small"
    body += text(place, bottom + 29, f"{scale} (lower is better)", class_)
    description = f"Dense {_perplexity(dense)}. " + " ".join(
        f"{setting}: " + ", ".join(f"{d.label} {_perplexity(d.value)}" for d in members) + "."
        for setting, members in groups.items()
    )
    return picture(width, bottom + 36, "Perplexity by method and setting", description, body)


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:,.0f}"


def _tick(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
