"""`besa bench compare A.json B.json`: whether B is worse than A, for people and for CI.

    lines, regressions = compare_files(Path("A/results.json"), Path("B/results.json"), 0.05)

Two runs are not paired, so machines may have drifted between them. A figure has regressed if B's
median is worse than A's by more than the threshold and the two intervals do not overlap; where a
run has one round only, the threshold alone decides. A contender that was measured in A and is
broken or missing in B has regressed, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from besa.bench.figures import FIGURES
from besa.bench.offline_figures import OFFLINE_FIGURES
from besa.bench.results import Results, read_results
from besa.bench.words import amount
from besa.errors import BesaError
from besa.report.figures import size

_BETTER = {name: higher for name, (_, _, higher) in {**FIGURES, **OFFLINE_FIGURES}.items()}


def compare_files(a: Path, b: Path, threshold: float) -> tuple[list[str], list[str]]:
    """What to say, line by line, and the lines of it that are regressions.

    Raises:
        BesaError: a file that is no results.json, or two that have nothing in common.
    """
    if not 0 <= threshold < 10:
        raise BesaError(f"--threshold is {threshold}: a share, as 0.05")
    before, after = read_results(a), read_results(b)
    found = list(changes(before, after, threshold))
    if not found:
        raise BesaError(f"{a} and {b} have no contender and load in common")
    regressions = [line for line, regressed in found if regressed]
    lines = [*_conditions(before, after), *(line for line, _ in found)]
    count = len(regressions)
    lines.append(
        f"{count} regression{'s' if count != 1 else ''} of more than {threshold:.1%}"
        if count
        else f"no regression of more than {threshold:.1%}"
    )
    return lines, regressions


def changes(before: Results, after: Results, threshold: float) -> Iterator[tuple[str, bool]]:
    """A line for each change beyond the threshold, and whether it is for the worse."""
    broken = {one["name"]: one["broken"] for one in after["contenders"]}
    for one in before["contenders"]:
        name = one["name"]
        if one["broken"] is None and broken.get(name) is not None:
            yield f"WORSE   {name} is broken now: {broken[name]}", True
    new = {(m["contender"], m["load"]): m["summary"] for m in after["measurements"]}
    for m in before["measurements"]:
        key = (m["contender"], m["load"])
        if key not in new:
            if m["contender"] not in broken:
                yield f"WORSE   {m['contender']} is not there any more", True
            continue
        unchanged = 0
        for figure, old in m["summary"].items():
            if figure not in new[key] or figure not in _BETTER:
                continue
            line, worse = _change(figure, old, new[key][figure], threshold)
            if line is None:
                unchanged += 1
            else:
                yield f"{line.format(where=', '.join(key))}", worse
        yield f"same    {', '.join(key)}: {unchanged} figures", False
    yield from _sizes(before, after, threshold)


def _change(
    figure: str, old: Mapping[str, Any], new: Mapping[str, Any], threshold: float
) -> tuple[str | None, bool]:
    if not old["median"] or not new["median"]:
        return None, False
    ratio = new["median"] / old["median"]
    gain = ratio if _BETTER[figure] else 1 / ratio
    overlap = old["low"] <= new["high"] and new["low"] <= old["high"]
    single = old["rounds"] < 2 or new["rounds"] < 2
    if abs(ratio - 1) <= threshold or (overlap and not single):
        return None, False
    word = "WORSE " if gain < 1 else "better"
    values = f"{amount(figure, old)} → {amount(figure, new)} ({ratio - 1:+.1%})"
    return f"{word}  {{where}}: {figure} {values}", gain < 1


def _sizes(before: Results, after: Results, threshold: float) -> Iterator[tuple[str, bool]]:
    """Bytes on disk and in memory, which have no spread."""
    new = {one["name"]: one for one in after["contenders"]}
    for one in before["contenders"]:
        other = new.get(one["name"])
        if other is None or one["broken"] or other["broken"]:
            continue
        for what, a, b in (
            ("bytes on disk", one["disk_bytes"], other["disk_bytes"]),
            ("memory at rest", one["memory"]["steady"], other["memory"]["steady"]),
        ):
            if a and b and abs(b / a - 1) > threshold:
                word = "WORSE " if b > a else "better"
                line = f"{word}  {one['name']}: {what} {size(a)} → {size(b)} ({b / a - 1:+.1%})"
                yield line, b > a


def _conditions(before: Results, after: Results) -> Iterator[str]:
    """What differs between the runs besides the result."""
    for part in ("machine", "settings", "versions"):
        a, b = before[part], after[part]
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key) and (part, key) != ("machine", "system"):
                yield f"note    {part}: {key} was {a.get(key)}, is {b.get(key)}"
