"""`besa bench compare A.json B.json`: whether B is worse than A, for people and for CI.

>>> results = Path("path/to/results.json")
>>> lines, regressions = compare_files(results, results, threshold=0.05)
>>> regressions
[]

Two runs are not paired, so machines may have drifted between them. A figure has regressed if B's
median is worse than A's by more than the threshold and the two intervals do not overlap; where a
run has one round only, the threshold alone decides. A contender that was measured in A and is
broken or missing in B has regressed, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from besa.bench.figures import OFFLINE, SERVING
from besa.bench.formatting import amount
from besa.bench.results import Results, read_results
from besa.bench.statistics import Spread
from besa.errors import BesaError
from besa.report.formatting import size
from besa.typed_json import to_json

_HIGHER_IS_BETTER = {**SERVING, **OFFLINE}


@dataclass(frozen=True)
class Change:
    """A line about what differs between two runs, and whether it is for the worse."""

    line: str
    worse: bool = False


def compare_files(a: Path, b: Path, threshold: float) -> tuple[list[str], list[str]]:
    """What to say, line by line, and those of the lines that are regressions.

    Raises:
        BesaError: a file that is no results.json, or two that have nothing in common.
    """
    if not 0 <= threshold < 10:
        raise BesaError(f"--threshold is {threshold}: a share, as 0.05")
    before, after = read_results(a), read_results(b)
    found = list(changes(before, after, threshold))
    if not found:
        raise BesaError(f"{a} and {b} have no contender and load in common")
    regressions = [change.line for change in found if change.worse]
    count = len(regressions)
    verdict = (
        f"{count} regression{'s' if count != 1 else ''} of more than {threshold:.1%}"
        if count
        else f"no regression of more than {threshold:.1%}"
    )
    return [*_conditions(before, after), *(change.line for change in found), verdict], regressions


def changes(before: Results, after: Results, threshold: float) -> Iterator[Change]:
    """What differs by more than the threshold, and how many figures do not."""
    now = {contender.name: contender for contender in after.contenders}
    for contender in before.sound:
        name = contender.name
        if name in now and now[name].broken is not None:
            yield Change(f"WORSE   {name} is broken now: {now[name].broken}", worse=True)
    summaries = {(m.contender, m.load): m.summary for m in after.measurements}
    for m in before.measurements:
        summary = summaries.get((m.contender, m.load))
        if summary is None:
            if m.contender not in now:
                yield Change(f"WORSE   {m.contender} is not there any more", worse=True)
            continue
        where, unchanged = f"{m.contender}, {m.load}", 0
        for figure, old in m.summary.items():
            if figure in summary and figure in _HIGHER_IS_BETTER:
                change = _figure_change(where, figure, old, summary[figure], threshold)
                if change is None:
                    unchanged += 1
                else:
                    yield change
        yield Change(f"same    {where}: {unchanged} figures")
    yield from _size_changes(before, after, threshold)


def _figure_change(
    where: str, figure: str, old: Spread, new: Spread, threshold: float
) -> Change | None:
    """None if a figure did not change, as far as that can be told."""
    if not old.median > 0 or not new.median > 0:  # NaN, too
        return None
    ratio = new.median / old.median
    overlap = old.low <= new.high and new.low <= old.high
    one_round = old.rounds < 2 or new.rounds < 2
    if abs(ratio - 1) <= threshold or (overlap and not one_round):
        return None
    values = f"{amount(figure, old)} → {amount(figure, new)} ({ratio - 1:+.1%})"
    return _change(f"{where}: {figure} {values}", (ratio < 1) == _HIGHER_IS_BETTER[figure])


def _size_changes(before: Results, after: Results, threshold: float) -> Iterator[Change]:
    """Bytes on disk and in memory, which have no spread."""
    new = {contender.name: contender for contender in after.sound}
    for one in before.sound:
        other = new.get(one.name)
        if other is None:
            continue
        for what, a, b in (
            ("bytes on disk", one.disk_bytes, other.disk_bytes),
            ("memory at rest", one.memory.steady, other.memory.steady),
        ):
            if a and b and abs(b / a - 1) > threshold:
                values = f"{size(a)} → {size(b)} ({b / a - 1:+.1%})"
                yield _change(f"{one.name}: {what} {values}", b > a)


def _change(what: str, worse: bool) -> Change:
    return Change(f"{'WORSE ' if worse else 'better'}  {what}", worse)


def _conditions(before: Results, after: Results) -> Iterator[str]:
    """What differs between the runs besides the result."""
    for part in ("machine", "settings", "versions"):
        a, b = to_json(getattr(before, part)), to_json(getattr(after, part))
        for key in dict.fromkeys([*a, *b]):
            if a.get(key) != b.get(key) and (part, key) != ("machine", "system"):
                yield f"note    {part}: {key} was {a.get(key)}, is {b.get(key)}"
