"""The heat map: rates by linear and block, coloured by their distance from the target.

>>> heatmap({"q_proj": [0.4, 0.6]}, ["0", "1"], target=0.5, width=300).startswith("<svg xmlns")
True
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from besa.report import palette
from besa.report.formatting import percent, rate
from besa.report.svg import NARROW, clip, every, line, linear, picture, tag, text


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
    known = [value for values in rows.values() for value in values if value is not None]
    reach = extent(known, target)
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
                body += text(
                    x + (step_x - gap) / 2,
                    y + (step_y - gap) / 2 + 3.6,
                    percent(value)[:-1],
                    inside,
                )
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
        f"{len(rows)} linears in {len(blocks)} blocks; rates from {percent(min(known))} to "
        f"{percent(max(known))} around the target {rate(target)}."
    )
    return picture(wide, high, "Sparsity by block and linear", description, body)
