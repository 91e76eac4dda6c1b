"""The pictures and the table of what benchmarks/quality.py measured.

    python benchmarks/quality_report.py      # results/quality.json -> results/quality.svg

The table goes into docs/results.md: `python benchmarks/readme.py`. Perplexity against tokens a
second is drawn once results/serving/quality.json is there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from common import RESULTS
from kernel_report import WIDTH, page

from besa.bench.results import Results, read_results
from besa.report.svg import line, linear, log_ticks, logarithmic, path, tag, text, ticks

PICTURE, SPEED_PICTURE = "quality.svg", "quality-speed.svg"
# How a point is drawn, by who made it; the dense model is neither's.
MAKERS = {"besa": 1, "llama.cpp": 2}
LLAMA = "llama-cpp-python"
LETTER, LINE = 7.2, 13.0  # of the small letters: how wide, how high


@dataclass(frozen=True)
class Point:
    """A model in a picture: what it costs, and its perplexity."""

    maker: str
    name: str
    cost: float
    perplexity: float


def bits_of(row: dict[str, Any], *parts: str) -> float:
    """Bits that a weight takes in the mean, of "linears", of "others", or of both."""
    chosen = [row[part] for part in parts]
    total: float = sum(part["bytes"] for part in chosen)
    return total * 8 / sum(part["weights"] for part in chosen)


def front(points: Iterable[Point], dear: int = 1) -> list[Point]:
    """The points that no other one beats in both, from the cheapest to the best.

    Args:
        dear: 1 where much costs, -1 where much is good, as of tokens a second.

    >>> a, b, c = (Point("", "", *values) for values in ((3, 60), (4, 50), (5, 55)))
    >>> front([c, b, a]) == [a, b]
    True
    """
    found: list[Point] = []
    for point in sorted(points, key=lambda one: (dear * one.cost, one.perplexity)):
        if not found or point.perplexity < found[-1].perplexity:
            found.append(point)
    return found


def by_bits(record: dict[str, Any], *parts: str) -> list[Point]:
    """The models by the bits of these parts."""
    return [
        Point(row["engine"], row["name"], bits_of(row, *parts), row["perplexity"])
        for row in record["rows"]
        # The two dense ones are one.
        if (row["engine"], row["name"]) != ("llama.cpp", "BF16")
    ]


def by_speed(record: dict[str, Any], results: Results) -> list[Point]:
    """The models by the tokens that their servers give in a second."""
    perplexity = {row["name"]: row["perplexity"] for row in record["rows"]}
    maker = {row["name"]: row["engine"] for row in record["rows"]}
    return [
        Point(maker[name], name, measurement.summary["output_tps"].median, perplexity[name])
        for measurement, _ in results.by_load()
        if (name := measurement.contender) in perplexity
    ]


# --------------------------------------------------------------------------- pictures


def plot(record: dict[str, Any]) -> str:
    """Perplexity against bits a weight: of the blocks' linears, and of the whole model."""
    # Weights alone are rounded where nobody serves them for speed: the table has them.
    rows = [row for row in record["rows"] if not row["name"].endswith("weight-only")]
    record = {**record, "rows": rows}
    panels = {
        "bits a weight of the blocks' linears": by_bits(record, "linears"),
        "bits a weight of the whole model, its embedding too": by_bits(record, "linears", "others"),
    }
    return _picture("Perplexity against bits a weight", record, panels)


def plot_speed(record: dict[str, Any], results: Results) -> str:
    """Perplexity against tokens a second, one request at a time."""
    panels = {"output tokens a second": by_speed(record, results)}
    return _picture("Perplexity against tokens a second", record, panels, dear=-1)


def _picture(
    title: str, record: dict[str, Any], panels: dict[str, list[Point]], dear: int = 1
) -> str:
    body, at, top = text(16, 28, title, "strong"), 16.0, 72.0
    for maker, colour in MAKERS.items():
        body += tag("circle", cx=at + 5, cy=47.0, r=4.0, class_=f"dot f{colour}")
        body += text(at + 15, 52, maker)
        at += 40 + 8 * len(maker)
    body += line(at, 47, at + 20, 47, "line s0") + text(at + 26, 52, "no model beats these in both")
    for what, points in panels.items():
        body += _panel(points, top, what, dear)
        top += 288
    description = f"{record['name']}, {record['text']}, {record['tokens']:,} tokens."
    return page(top - 6, title, description, body)


def _panel(points: Sequence[Point], top: float, what: str, dear: int) -> str:
    """Dots with their names, and the front, below `top`."""
    height, left, right = 226.0, 46.0, WIDTH - 20
    costs, worst = [point.cost for point in points], [point.perplexity for point in points]
    low, high = min(costs), max(costs)
    first, last = low - 0.16 * (high - low), high + 0.08 * (high - low)  # names stand at the left
    x = linear(first, last, left, right)
    least, most = min(worst) * 0.97, max(worst) * 1.04
    y = logarithmic(least, most, top + height, top)
    body = ""
    for mark in log_ticks(least, most, 6) if most > 3 * least else ticks(least, most, 6):
        body += line(left, y(mark), right, y(mark), "grid")
        body += text(left - 7, y(mark) + 4, f"{mark:g}", "small end")
    for mark in ticks(first, last, 7):
        body += line(x(mark), top, x(mark), top + height, "grid")
        body += text(x(mark), top + height + 16, f"{mark:g}", "small mid")
    body += text((left + right) / 2, top + height + 34, what, "small mid")
    best = [(x(one.cost), y(one.perplexity)) for one in front(points, dear)]
    body += path(best, "line s0")
    at = [(x(one.cost), y(one.perplexity)) for one in points]
    for (a, b), one in zip(at, points, strict=True):
        colour = 0 if one.name == "dense" else MAKERS[one.maker]
        body += tag("circle", cx=a, cy=b, r=4.0, class_=f"dot f{colour}")
    named = [(*where, one.name) for where, one in zip(at, points, strict=True)]
    spots = labels(named, left, right, best)
    for (a, b, side), one in zip(spots, points, strict=True):
        body += text(a, b, one.name, f"small {side}".strip())
    return body


Box = tuple[float, float, float, float]  # left, top, right, bottom


def labels(
    points: Sequence[tuple[float, float, str]],
    left: float,
    right: float,
    lines: Sequence[tuple[float, float]] = (),
) -> list[tuple[float, float, str]]:
    """Where each dot's name stands: x, y and "", "end" or "mid".

    Not on a dot, nor on another name, nor on the line through the points `lines`.
    """
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    for (a, b), (c, d) in pairwise(lines):
        for k in range(51):
            x, y = a + (c - a) * k / 50, b + (d - b) * k / 50
            taken.append((x - 1, y - 1, x + 1, y + 1))
    found = []
    for x, y, name in points:
        width = LETTER * len(name)
        spots: list[tuple[float, float, str]] = []
        for down in (4, 7, 1):  # beside the dot, or nearly so
            spots += [(x + 8, y + down, ""), (x - 8, y + down, "end")]
        for step in range(4):
            away = 9 + step * LINE
            spots += [(x, y - away, "mid"), (x, y + away + 9, "mid")]
            spots += [(x + 6, y - away, ""), (x - 6, y - away, "end")]
            spots += [(x + 6, y + away + 9, ""), (x - 6, y + away + 9, "end")]
        boxes = {spot: _box(spot, width) for spot in spots}
        free = (
            spot
            for spot, box in boxes.items()
            if left <= box[0] and box[2] <= right and not any(_meet(box, one) for one in taken)
        )
        chosen = next(free, spots[0])
        taken.append(boxes[chosen])
        found.append(chosen)
    return found


def _box(spot: tuple[float, float, str], width: float) -> Box:
    x, y, side = spot
    start = x - {"": 0.0, "end": width, "mid": width / 2}[side]
    return start, y - LINE + 3, start + width, y + 2


def _meet(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --------------------------------------------------------------------------- what pages show

PARTS = {"linears": ("linears",), "whole model": ("linears", "others")}


def quality_table(record: dict[str, Any]) -> str:
    """A line for each model, by the bits of its linears, and which models are on the front."""
    points = {name: by_bits(record, *parts) for name, parts in PARTS.items()}
    best = {name: {(one.maker, one.name) for one in front(points[name])} for name in PARTS}
    lines = [
        f"| {record['name']} | perplexity | worse than dense, nats a token "
        f"| bits a weight: {' | '.join(PARTS)} | bytes |",
        "| --- |" + " --- |" * 5,
    ]
    for row in sorted(record["rows"], key=lambda row: -bits_of(row, "linears")):
        gap = "{nats:z.3f} ± {standard_error:.3f}".format(**row["worse"])
        cells = []
        for name, parts in PARTS.items():
            cell = f"{bits_of(row, *parts):.2f}"
            cells.append(f"**{cell}**" if (row["engine"], row["name"]) in best[name] else cell)
        size = sum(row[part]["bytes"] for part in ("linears", "others")) / 2**20
        lines.append(
            f"| {row['engine']} {row['name']} | {row['perplexity']:.2f} "
            f"| {gap if row['losses'] != _dense(record)['losses'] else '–'} "
            f"| {' | '.join(cells)} | {size:.0f} MiB |"
        )
    return "\n".join([*lines, "", _fronts(record, points), "", _conditions(record)])


def _dense(record: dict[str, Any]) -> dict[str, Any]:
    """The model that all others are made of."""
    found: dict[str, Any] = next(
        row for row in record["rows"] if (row["engine"], row["name"]) == ("besa", "dense")
    )
    return found


def _fronts(record: dict[str, Any], points: dict[str, list[Point]]) -> str:
    """Which models are on the front, and which of besa's are not."""
    sentences = []
    for name, every in points.items():
        best = front(every)
        behind = [x.name for x in every if x.maker == "besa" and x not in best]
        on = ", ".join(
            one.name if one.name == "dense" else f"{one.maker} {one.name}" for one in best
        )
        sentences.append(
            f"By the bits of the {name} the front is {on}"
            + (
                f"; besa's {', '.join(behind)} {'is' if len(behind) == 1 else 'are'} behind it."
                if behind
                else "."
            )
        )
    rest = _dense(record)
    share = rest["others"]["weights"] / sum(rest[x]["weights"] for x in ("linears", "others"))
    return (
        "On the front, in bold, is a model if none has both fewer bits and a lower perplexity. "
        f"{' '.join(sentences)} The blocks' linears are {1 - share:.0%} of this model's weights, "
        "nearly all others its embedding, which is its head, too: besa leaves it in bfloat16, "
        "llama.cpp's formats round it."
    )


def _conditions(record: dict[str, Any]) -> str:
    there = record["conditions"]
    return (
        f"{record['tokens']:,} tokens of {record['text']}, in windows of {record['seqlen']}, each "
        f"after a beginning token; {record['samples']} windows of as many tokens of "
        f"{record['calibration']} to calibrate, and for the importance matrix of llama.cpp's "
        f"formats below 8 bits. {there['cpu']}; torch {there['torch']}"
        + (f", llama-cpp-python {there[LLAMA]}" if LLAMA in there else "")
        + ". By `benchmarks/quality.py`, which says how."
    )


def main() -> None:
    record = json.loads((RESULTS / "quality.json").read_text())
    pictures: dict[str, Callable[[], str]] = {PICTURE: lambda: plot(record)}
    speed = RESULTS / "serving" / "quality.json"
    if speed.exists():
        pictures[SPEED_PICTURE] = lambda: plot_speed(record, read_results(speed))
    for name, draw in pictures.items():
        (RESULTS / name).write_text(draw() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
