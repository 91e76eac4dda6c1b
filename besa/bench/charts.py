"""The pictures of a bench report: curves, distributions, bars, and quality against speed.

Each is a pure function from numbers to an <svg> string, drawn for the width that it is shown at.
A contender keeps its number, and with it colour and dash, through all of them (`.s0` … `.s8`).

>>> curves([Curve("a", ((10.0, 0.1, "1 at a time"),))], width=400).startswith("<svg xmlns")
True
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from besa.bench.formatting import seconds
from besa.report.svg import (
    Scale,
    catcher,
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

SERIES = 9
_LETTER = 6.6  # pixels of a letter, about


@dataclass(frozen=True)
class Curve:
    """A contender's points: throughput, seconds, and the load's name."""

    name: str
    points: tuple[tuple[float, float, str], ...]


def series(index: int) -> str:
    """The class of a contender's marks."""
    return f"s{index % SERIES}"


def shortened(name: str, letters: int) -> str:
    """A name that fits into so many letters."""
    return name if len(name) <= letters else name[: letters - 1] + "…"


def legend(names: Sequence[str], width: float, numbers: Sequence[int] = ()) -> tuple[str, float]:
    """A sample of each contender's line with its name; and how much room it takes.

    Args:
        numbers: the contenders', if not 0, 1, ….
    """
    body, x, y = "", 0.0, 12.0
    for index, name in zip(numbers or range(len(names)), names, strict=True):
        shown = shortened(name, 28)
        room = 30 + _LETTER * len(shown) + 18
        if x and x + room > width:
            x, y = 0.0, y + 20
        body += line(x, y - 4, x + 22, y - 4, f"line {series(index)}")
        body += tag("circle", cx=x + 11, cy=y - 4, r=3.6, class_=f"dot {series(index)}")
        body += text(x + 29, y, shown, "label")
        x += room
    return body, y + 12


def _scale(values: Sequence[float], start: float, end: float) -> tuple[Scale, list[float]]:
    """Logarithmic where values differ much, else from zero."""
    low, high = min(values), max(values)
    if low > 0 and high > 8 * low:
        low, high = low / 1.15, high * 1.15
        return logarithmic(low, high, start, end), log_ticks(low, high, 6)
    high = high * 1.08 or 1.0
    return linear(0.0, high, start, end), ticks(0.0, high, 5)


def curves(
    found: Sequence[Curve],
    *,
    width: float,
    across: str = "output tokens/s",
    up: str = "end to end",
) -> str:
    """Throughput across, latency up; a point for each load. Right and down is better."""
    everything = [point for curve in found for point in curve.points]
    body, head = legend([curve.name for curve in found], width)
    left, top, height = 56.0, head + 18, 240.0
    x, across_ticks = _scale([p[0] for p in everything], left + 10, width - 16)
    y, up_ticks = _scale([p[1] for p in everything], top + height, top)
    body += text(left, top - 8, f"{up}, median", "small")
    body += rules([(y(mark), seconds(mark) if mark else "0") for mark in up_ticks], left, width - 8)
    last = -100.0
    for mark in across_ticks:
        if x(mark) - last > 38:
            body += text(x(mark), top + height + 15, f"{mark:g}", "small mid")
            last = x(mark)
    body += text(width - 8, top + height + 31, across, "small end")
    catchers = ""
    taken: list[tuple[float, float]] = []
    for index, curve in enumerate(found):
        points = [(x(a), y(b)) for a, b, _ in curve.points]
        if len(points) > 1:
            body += path(points, f"line {series(index)}")
        for (a, b), (rate, latency, load) in zip(points, curve.points, strict=True):
            body += tag("circle", cx=a, cy=b, r=4.0, class_=f"dot {series(index)}")
            if all(abs(a - x) > 24 or abs(b - y) > 14 for x, y in taken):  # else unreadable
                body += text(a, b - 8, load.split()[0], "small mid")
                taken.append((a, b))
            tip = f"{curve.name}, {load}\n{rate:.3g} {across}, {seconds(latency)}"
            catchers += catcher(a - 9, b - 9, 18, 18, tip)
    description = " ".join(
        f"{curve.name}: "
        + ", ".join(f"{a:.3g} {across} at {seconds(b)}" for a, b, _ in curve.points)
        + "."
        for curve in found
    )
    title = f"{across.capitalize()} against latency, {up}"
    return picture(width, top + height + 38, title, description, body + catchers)


@dataclass(frozen=True)
class Range:
    """A distribution: 5, 25, 50, 75, 95 and 99% of the values lie below these, in seconds."""

    name: str
    series: int
    marks: tuple[float, float, float, float, float, float]


def ranges(groups: Mapping[str, Sequence[Range]], *, title: str, width: float) -> str:
    """Distributions beside each other, by load."""
    everything = [mark for members in groups.values() for one in members for mark in one.marks]
    longest = max(len(one.name) for members in groups.values() for one in members)
    left = min(_LETTER * longest + 14, width * 0.32)
    letters = int((left - 12) / _LETTER)
    top, pitch, head = 8.0, 20.0, 24.0
    bottom = top + sum(head + pitch * len(members) + 6 for members in groups.values())
    x, marks = _scale(everything, left, width - 14)
    body, last = "", -100.0
    for mark in marks:
        body += line(x(mark), top, x(mark), bottom, "grid")
        if x(mark) - last > 52:
            body += text(x(mark), bottom + 14, seconds(mark) if mark else "0", "small mid")
            last = x(mark)
    y = top
    for load, members in groups.items():
        body += line(0, y + 2, width, y + 2, "axis") + text(0, y + 18, load, "label strong")
        y += head
        for one in members:
            p5, p25, p50, p75, p95, p99 = one.marks
            middle, class_ = y + pitch / 2, series(one.series)
            body += text(left - 10, middle + 4, shortened(one.name, letters), "label end")
            body += line(x(p5), middle, x(p95), middle, f"thin {class_}")
            wide = max(x(p75) - x(p25), 1.0)
            body += tag(
                "rect", x=x(p25), y=middle - 4, width=wide, height=8.0, class_=f"fill {class_}"
            )
            body += tag("circle", cx=x(p50), cy=middle, r=4.0, class_=f"dot {class_}")
            body += line(x(p99), middle - 5, x(p99), middle + 5, f"thin {class_}")
            tip = (
                f"{one.name}, {load}\nmedian {seconds(p50)}, half {seconds(p25)} to {seconds(p75)}"
            )
            tip += f"\np95 {seconds(p95)}, p99 {seconds(p99)}"
            body += catcher(0, y, width, pitch, tip)
            y += pitch
        y += 6
    description = " ".join(
        f"{load}: " + ", ".join(f"{one.name} {seconds(one.marks[2])}" for one in members) + "."
        for load, members in groups.items()
    )
    return picture(width, bottom + 22, title, "Medians. " + description, body)


def bars(
    groups: Mapping[str, Sequence[tuple[str, int, float]]],
    *,
    title: str,
    show: Callable[[float], str],
    width: float,
) -> str:
    """Bars from zero: by group, (name, series, value); `show` writes the value beside its bar."""
    everything = [value for members in groups.values() for _, _, value in members]
    longest = max(len(name) for members in groups.values() for name, _, _ in members)
    left = min(_LETTER * longest + 14, width * 0.32)
    letters = int((left - 12) / _LETTER)
    x = linear(0.0, max(everything) or 1.0, left, width - 74)
    body, y, pitch = "", 0.0, 22.0
    for group, members in groups.items():
        body += line(0, y + 2, width, y + 2, "axis") + text(0, y + 18, group, "label strong")
        y += 26
        for name, index, value in members:
            body += text(left - 10, y + 14, shortened(name, letters), "label end")
            body += tag(
                "rect",
                x=left,
                y=y + 4,
                width=max(x(value) - left, 1.0),
                height=13.0,
                class_=f"fill {series(index)}",
            )
            body += text(x(value) + 7, y + 15, show(value), "small")
            y += pitch
        y += 8
    description = " ".join(
        f"{group}: " + ", ".join(f"{name} {show(value)}" for name, _, value in members) + "."
        for group, members in groups.items()
    )
    return picture(width, y, title, description, body)


def quality(
    points: Sequence[tuple[str, int, float, float, float]], *, across: str, width: float
) -> str:
    """Speed across, perplexity up: (name, series, speed, perplexity, its standard error)."""
    width = min(width, 640.0)
    names, head = legend([p[0] for p in points], width, [p[1] for p in points])
    left, top, height = 56.0, head + 22, 190.0
    speeds = [p[2] for p in points]
    low = min(p[3] - p[4] for p in points)
    high = max(p[3] + p[4] for p in points)
    room = (high - low) * 0.15 or high * 0.1
    x = linear(0.0, max(speeds) * 1.25, left, width - 14)
    y = linear(max(0.0, low - room), high + room, top + height, top)
    marks = ticks(max(0.0, low - room), high + room, 5)
    body = names + rules([(y(mark), f"{mark:g}") for mark in marks], left, width - 8)
    for mark in ticks(0.0, max(speeds) * 1.25, 5):
        body += text(x(mark), top + height + 15, f"{mark:g}", "small mid")
    body += text(left, top - 10, "perplexity (lower is better)", "small")
    body += text(width - 8, top + height + 31, across, "small end")
    for name, index, speed, perplexity, error in points:
        a, b = x(speed), y(perplexity)
        body += line(a, y(perplexity - error), a, y(perplexity + error), f"thin {series(index)}")
        body += tag("circle", cx=a, cy=b, r=5.0, class_=f"dot {series(index)}")
        tip = f"{name}\nperplexity {perplexity:.3f}\n{speed:.3g} {across}"
        body += catcher(a - 10, b - 10, 20, 20, tip)
    description = " ".join(f"{p[0]}: {p[3]:.2f} at {p[2]:.3g} {across}." for p in points)
    return picture(width, top + height + 38, "Quality against speed", description, body)
