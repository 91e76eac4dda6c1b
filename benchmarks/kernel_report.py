"""The picture and the table of what benchmarks/kernels.py measured.

    python benchmarks/kernel_report.py      # benchmarks/results/kernels.json -> kernels.svg

The tables go into docs/kernels.md: `python benchmarks/readme.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from common import RESULTS, gain, in_tokens

from besa.bench.statistics import CONFIDENCE, coverage
from besa.report.svg import line, linear, logarithmic, path, picture, tag, text

SHAPE, THREADS = "4096x4096", 2
SHOWN = {"dense": "besa, dense", "50%": "50%", "70%": "70%", "2:4": "2:4"}
Rows = tuple[dict[str, Any], ...]  # of one type and number of tokens, one of each record
PANELS = ("bfloat16", "float32", "int8")
# Of transformers and of vLLM, the fastest last.
DENSE_EXPERTS = ("eager", "grouped_mm", "vllm")
AGAINST = {"bfloat16": "F.linear", "float32": "F.linear", "int8": "torch._int_mm"}

# Drawn as narrow as a phone, so that the letters stay readable there, and with a background: an
# image knows whether the reader's system is dark, but not the page around it.
WIDTH = 460.0
STYLE = """
svg { font: 14px system-ui, sans-serif; --page: #fff; --ink: #1b1e23; --soft: #646a73;
      --grid: #e4e1da; --a: #1d5a9e; --b: #b8520f; --c: #3d7a4f; --d: #8b857a; }
@media (prefers-color-scheme: dark) { svg { --page: #16181d; --ink: #e8e6e1; --soft: #9aa0aa;
      --grid: #353941; --a: #7db8f5; --b: #ee9150; --c: #86c79a; --d: #a49d90; } }
.page { fill: var(--page); } text { fill: var(--ink); }
.small { fill: var(--soft); font-size: 12px; }
.strong { font-weight: 600; } .mid { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--grid); } .one { stroke: var(--ink); stroke-dasharray: 3 3; }
.span { stroke: var(--ink); stroke-width: 1.5; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.s0 { stroke: var(--d); stroke-dasharray: 5 3; } .s1 { stroke: var(--a); }
.s2 { stroke: var(--b); } .s3 { stroke: var(--c); }
.dot { stroke: none; } .f0 { fill: var(--d); } .f1 { fill: var(--a); } .f2 { fill: var(--b); }
.f3 { fill: var(--c); }
"""


def page(height: float, title: str, description: str, body: str) -> str:
    """A picture of that height, with style and background."""
    ground = tag("rect", x=0.0, y=0.0, width=WIDTH, height=height, rx=8, class_="page")
    return picture(WIDTH, height, title, description, tag("style", STYLE) + ground + body)


def cells(record: dict[str, Any], shape: str, dtype: str, threads: int) -> list[dict[str, Any]]:
    """The results of one shape, type and number of threads, by tokens."""
    return [
        row
        for row in record["results"]
        if (row["shape"], row["dtype"], row["threads"]) == (shape, dtype, threads)
    ]


def plot(record: dict[str, Any]) -> str:
    """Times faster than torch, by tokens: a panel for each type."""
    height, left, right = 150.0, 52.0, WIDTH - 20
    by_type = {dtype: cells(record, SHAPE, dtype, THREADS) for dtype in PANELS}
    values = [
        row["contenders"][name]["over_torch"]["median"]
        for rows in by_type.values()
        for row in rows
        for name in SHOWN
    ]
    high = 2.0 ** math.ceil(math.log2(max(values)))
    low = 2.0 ** math.floor(math.log2(min(0.9, *values)))
    tokens = [row["tokens"] for row in next(iter(by_type.values()))]
    x = linear(0, len(tokens) - 1, left + 10, right - 10)
    body, at = text(16, 28, "Times faster than torch, by tokens", "strong"), 16.0
    for s, name in enumerate(SHOWN.values()):
        body += line(at, 48, at + 20, 48, f"line s{s}") + text(at + 26, 52, name)
        at += 52 + 7 * len(name)
    top = 92.0
    for dtype, rows in by_type.items():
        y = logarithmic(low, high, top + height, top)
        body += text(16, top - 14, f"{dtype}, against {AGAINST[dtype]}", "small")
        mark = low
        while mark <= high * 1.001:
            body += line(left, y(mark), right, y(mark), "one" if mark == 1 else "grid")
            body += text(left - 7, y(mark) + 4, f"{mark:g}×", "small end")
            mark *= 2
        for k, count in enumerate(tokens):
            body += text(x(k), top + height + 16, str(count), "small mid")
        for s, name in enumerate(SHOWN):
            points = [
                (x(k), y(row["contenders"][name]["over_torch"]["median"]))
                for k, row in enumerate(rows)
            ]
            body += path(points, f"line s{s}")
            for a, b in points:
                body += tag("circle", cx=a, cy=b, r=2.6, class_=f"dot f{s}")
        top += height + 56
    conditions = record["conditions"]
    description = (
        f"A product of {SHAPE.replace('x', ' by ')}, {THREADS} threads, {conditions['cpu']}, "
        f"torch {conditions['torch']}."
    )
    return page(top - 28, "Packed products", description, body)


def readme_table(record: dict[str, Any]) -> str:
    """The section of docs/kernels.md: a few rows of the whole."""
    names = ["50%", "70%", "2:4"]
    lines = [
        f"| {SHAPE.replace('x', ' × ')}, {THREADS} threads | torch | besa, dense "
        f"| {' | '.join(names)} | of the read limit, 50% |",
        "| --- |" + " --- |" * (len(names) + 3),
    ]
    for dtype in PANELS:
        for row in cells(record, SHAPE, dtype, THREADS):
            if row["tokens"] not in (1, 4, 16, 64, 256):
                continue
            made = row["contenders"]
            parts = [_time(made["torch"]), _time(made["dense"])]
            parts += [_time_and_gain(made[name], "over_torch") for name in names]
            limit = f"{made['50%']['of_limit']:.0%}" if row["tokens"] == 1 else ""
            tokens = in_tokens(row["tokens"])
            lines.append(f"| {dtype}, {tokens} | {' | '.join(parts)} | {limit} |")
    conditions = record["conditions"]
    best = max(r["read_bandwidth"]["best"] for r in record["results"])
    lines += [
        "",
        f"Medians of {record['rounds']} interleaved rounds; times faster than `F.linear` (for int8 "
        "`torch._int_mm`, without quantizing its input) in the same rounds, and the interval that "
        f"holds the median with {coverage(record['rounds'], 1):.0%}. "
        f"{conditions['cpu']}, {conditions['cores']} cores, read bandwidth up to "
        f"{best / 1e9:.0f} GB/s, torch {conditions['torch']}. All shapes, threads, sparsities and "
        "tokens: `benchmarks/results/kernels.json`, by `python benchmarks/kernels.py`.",
    ]
    return "\n".join(lines)


def isa_table(*records: dict[str, Any]) -> str:
    """One CPU by instruction set: times of half of the weights, and against besa's dense kernel."""

    def by_isa(rows: Rows) -> list[str]:
        found = [_time_and_gain(row["contenders"]["50%"], "over_dense") for row in rows]
        if rows[0]["tokens"] > 1:
            return found
        limits = [f"{row['contenders']['50%']['of_limit']:.0%} of the limit" for row in rows]
        return [f"{one}, {limit}" for one, limit in zip(found, limits, strict=True)]

    first = records[0]
    best = max(r["read_bandwidth"]["best"] for record in records for r in record["results"])
    lines = [
        *_by_tokens(records, _isas(records), by_isa),
        "",
        "Times, and times faster than besa's dense kernel of the same column (for int4 that "
        f"of int8) in the same rounds: {_medians(first)}, read bandwidth up to {best / 1e9:.0f} "
        f"GB/s, torch {first['conditions']['torch']}. `BESA_ISA=NAME python benchmarks/kernels.py "
        f"--shapes {SHAPE} --threads {THREADS} --json FILE`.",
    ]
    return "\n".join(lines)


def amx_table(*records: dict[str, Any]) -> str:
    """What AMX adds: half of the weights with it and without, against torch, which uses it."""

    def against_torch(rows: Rows) -> list[str]:
        if rows[0]["tokens"] < 16:
            return []
        halves = [_time_and_gain(row["contenders"]["50%"], "over_torch") for row in rows]
        return [_time(rows[0]["contenders"]["torch"]), *halves]

    first = records[0]
    lines = [
        *_by_tokens(records, ["torch", *_isas(records)], against_torch),
        "",
        "Times, and times faster than `F.linear` (for int8 and int4 `torch._int_mm`, without "
        f"quantizing its input) in the same rounds: {_medians(first)}, torch "
        f"{first['conditions']['torch']}.",
    ]
    return "\n".join(lines)


def experts_table(record: dict[str, Any]) -> str:
    """A layer of experts: times, and times faster than the last of the dense ones."""
    shape, there = record["shape"], record["conditions"]
    dense = [name for name in DENSE_EXPERTS if name in record["results"][0]["contenders"]]
    ours = [name for name in record["results"][0]["contenders"] if name not in dense]
    last = dense[-1]
    lines = [
        f"| {shape['experts']} experts of 3 × {shape['inner']} × {shape['hidden']}, "
        f"{shape['chosen']} a token | {' | '.join(dense)} | {' | '.join(ours)} |",
        "| --- |" + " --- |" * (len(dense) + len(ours)),
    ]
    for row in record["results"]:
        made = row["contenders"]
        cells = [_time(made[name]) for name in dense]
        cells += [_time_and_gain(made[name], f"over_{last}") for name in ours]
        lines.append(f"| {in_tokens(row['tokens'])} | {' | '.join(cells)} |")
    threads = "a thread" if there["threads"] == 1 else f"{there['threads']} threads"
    lines += [
        "",
        f"Times, and times faster than {last} in the same rounds: {_medians(record)}, {threads}, "
        f"`{there['isa']}`, torch {there['torch']}, transformers {there['transformers']}. "
        f"`python benchmarks/experts.py --threads {there['threads']}`.",
    ]
    return "\n".join(lines)


def _by_tokens(
    records: Sequence[dict[str, Any]], columns: list[str], line: Callable[[Rows], list[str]]
) -> list[str]:
    """A table with a line for each type and number of tokens that records have in common.

    Args:
        line: the cells of a line, from each record's row; none to leave it out.
    """
    lines = [
        f"| {SHAPE.replace('x', ' × ')}, {THREADS} threads, 50% | {' | '.join(columns)} |",
        "| --- |" + " --- |" * len(columns),
    ]
    for dtype in ("bfloat16", "int8", "int4"):
        in_common = zip(*(cells(r, SHAPE, dtype, THREADS) for r in records), strict=True)
        lines += [
            f"| {dtype}, {in_tokens(rows[0]['tokens'])} | {' | '.join(found)} |"
            for rows in in_common
            if (found := line(rows))
        ]
    return lines


def _isas(records: Sequence[dict[str, Any]]) -> list[str]:
    return [f"`{record['conditions']['isa']}`" for record in records]


def _time(contender: dict[str, Any]) -> str:
    return f"{contender['seconds']['median'] * 1e3:.2f} ms"


def _time_and_gain(contender: dict[str, Any], over: str) -> str:
    return f"{_time(contender)}, {gain(contender[over])}"


def _medians(record: dict[str, Any]) -> str:
    """What the figures of a record with intervals are, and of which machine."""
    return (
        f"medians of {record['rounds']}, and the interval that holds the median with "
        f"{CONFIDENCE:.0%}. {record['conditions']['cpu']}, {record['conditions']['cores']} cores"
    )


def main() -> None:
    record = json.loads((RESULTS / "kernels.json").read_text())
    (RESULTS / "kernels.svg").write_text(plot(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
