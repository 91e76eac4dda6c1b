"""SVG by hand: elements, number formats, scales and ticks. The colours are in the page's CSS.

>>> tag("rect", x=1.50, width=3, class_="h4", data_tip='a "b"')
'<rect x="1.5" width="3" class="h4" data-tip="a &quot;b&quot;"/>'
>>> ticks(0.31, 0.66, 4)
[0.4, 0.5, 0.6]
"""

from __future__ import annotations

import html
import math
import zlib
from collections.abc import Callable, Sequence

NARROW = 480  # below this many pixels a chart is drawn for a phone

Scale = Callable[[float], float]


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """One element. `content` is markup already; attribute values are escaped here."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            text = short(value) if isinstance(value, float) else str(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{html.escape(text)}"')
    opening = " ".join(parts)
    return f"<{opening}>{content}</{name}>" if content else f"<{opening}/>"


def text(x: float, y: float, content: str, class_: str = "", /, **attributes: object) -> str:
    return tag("text", html.escape(content), x=float(x), y=float(y), class_=class_, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> str:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), class_=class_)


def path(points: list[tuple[float, float]], class_: str, *, closed: bool = False) -> str:
    d = "M" + "L".join(f"{short(x)},{short(y)}" for x, y in points) + ("Z" if closed else "")
    return tag("path", d=d, class_=class_)


def picture(width: float, height: float, title: str, description: str, body: str) -> str:
    """The <svg> around `body`: as wide as it was drawn, or as the page allows."""
    key = f"c{zlib.crc32((title + body).encode('utf-8', 'replace')):08x}"
    names = tag("title", html.escape(title), id=key + "t")
    names += tag("desc", html.escape(description), id=key + "d")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" '
        f'viewBox="0 0 {short(width)} {short(height)}" style="width:{short(width)}px" '
        f'aria-labelledby="{key}t" aria-describedby="{key}d">{names}{body}</svg>'
    )


def short(value: float) -> str:
    """Two decimals at most: a hundredth of a pixel is enough."""
    digits = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if digits == "-0" else digits


def linear(low: float, high: float, start: float, end: float) -> Scale:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    scale = linear(math.log(low), math.log(high), start, end)
    return lambda value: scale(math.log(value))


def step(span: float, count: int) -> float:
    """The round step (1, 2 or 5 times a power of ten) that cuts `span` into at most `count`."""
    if span <= 0:
        return 1.0
    raw = span / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def ticks(low: float, high: float, count: int) -> list[float]:
    size = step(high - low, count)
    first = math.ceil(low / size - 1e-9)
    last = math.floor(high / size + 1e-9)
    return [round(k * size, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Round values inside [low, high]: powers of ten, with 2 and 5 or all digits as room allows."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        marks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(marks) > count and found:
            break
        found = marks
    return found if len(found) > 1 else ticks(low, high, count)


def every(count: int, room: float, label: float) -> int:
    """Label every n-th of `count` marks in `room` pixels when a label needs `label` pixels."""
    strides: list[int] = [n * 10**power for power in range(9) for n in (1, 2, 5)]
    return next(stride for stride in strides if room * stride >= label * count)


def clip(name: str, letters: int) -> str:
    """The end of a dotted name says more than its beginning."""
    return name if len(name) <= letters else "…" + name[-(letters - 1) :]


def anchor(x: float, left: float, right: float) -> str:
    if x < left + 14:
        return "small"
    return "small end" if x > right - 14 else "small mid"


def rules(marks: Sequence[tuple[float, str]], left: float, right: float) -> str:
    return "".join(
        line(left, y, right, y, "grid") + text(left - 7, y + 3.6, label, "small end")
        for y, label in marks
    )


def block_axis(blocks: Sequence[str], left: float, step: float, y: float) -> str:
    stride = every(len(blocks), step * len(blocks), 26)
    marks = range(0, len(blocks), stride)
    body = "".join(text(left + (i + 0.5) * step, y, blocks[i], "small mid") for i in marks)
    return body + text(left, y + 15, "block", "small")


def catcher(x: float, y: float, width: float, height: float, tip: str) -> str:
    """An invisible column that shows its tip wherever the pointer is in it."""
    return tag("rect", x=float(x), y=y, width=width, height=height, class_="catch", data_tip=tip)
