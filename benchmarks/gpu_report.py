"""The tables of what `benchmarks/gpu.sh` measured, from its JSON files alone; the bars come last.

    python benchmarks/gpu_report.py                   # results/gpu
    python benchmarks/gpu_report.py FOLDER

A bar is what was asked of a GPU, beside the median that was measured in the worst case, and where
that was. A bar is `short` if it is missed, `wrong` if a case that it is made of failed or gave a
wrong result, and `open` if such cases were left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import RESULTS, gain, table

Row = Mapping[str, Any]

# How many times F.linear's speed, by kind and tokens.
KERNEL_BARS = [
    ("50%", 1, 1.5),
    ("50%", 8, 1.35),
    ("50%", 16, 1.15),
    ("70%", 1, 1.9),
    ("2:4", 1, 1.8),
    ("int8 50%", 1, 2.0),
]
ANYWHERE, PROMPT_TOKENS, PROMPT = 0.97, 4096, 0.95
SHAPES, SHORTER = (
    5,
    11,
)  # shapes that a kernel is measured on, and numbers of tokens below a prompt's
# How many times the dense model's tokens a second, by kind and batch, for LLaMA-7B's shape.
DECODE_BARS = [("50%", 1, 1.45), ("2:4", 1, 1.6), ("int8 50%", 1, 1.9), ("50%", 8, 1.3)]
# The most of the dense model's bytes.
MEMORY_BARS = [("50%", 0.60), ("2:4", 0.60), ("int8 50%", 0.36)]
ALLOCATION_SPEED, ALLOCATION_MEMORY = 2.0, 0.25


@dataclass(frozen=True)
class Figure:
    """One case's: a value, and where it was measured. None: the case failed or was wrong."""

    value: float | None
    where: str = ""


@dataclass(frozen=True)
class Bar:
    """What is asked, and all cases that it is asked of."""

    what: str
    asked: float
    figures: Sequence[Figure]
    at_least: bool = True
    cases: int = 1  # how many there have to be

    def cells(self) -> list[str]:
        """The row of the table."""
        asked = f"{'≥' if self.at_least else '≤'} {self.asked:.2f}"
        if not self.figures:
            return [self.what, asked, "-", "open", ""]
        good = [figure for figure in self.figures if figure.value is not None]
        bad = [figure.where for figure in self.figures if figure.value is None]
        if bad:
            return [self.what, asked, "-", "wrong", ", ".join(bad)]
        values = [figure.value for figure in good if figure.value is not None]
        worst = min(values) if self.at_least else max(values)
        met = worst >= self.asked if self.at_least else worst <= self.asked
        verdict = "short" if not met else "ok" if len(good) >= self.cases else "open"
        where = good[values.index(worst)].where
        if self.cases > 1:
            where += f", the worst of {len(good)} cases"
            where += "" if len(good) >= self.cases else f", {self.cases} are asked for"
        return [self.what, asked, f"{worst:.3f}", verdict, where]


def figure(row: Row, where: str, value: Callable[[Row], float]) -> Figure:
    """A row's figure, unless the row is a failure."""
    sound = "failed" not in row and row.get("right", True)
    return Figure(value(row) if sound else None, where)


def times_dense(row: Row) -> float:
    ratio: float = row["times_dense"]["median"]
    return ratio


# ---- kernels


def kernel_tables(rows: Sequence[Row]) -> Iterator[str]:
    """For each kind, microseconds and times F.linear, by tokens and shape."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        mine = {(row["tokens"], row["shape"]): row for row in rows if row["kind"] == kind}
        shapes = list(dict.fromkeys(shape for _, shape in mine))
        lines = []
        for tokens in dict.fromkeys(tokens for tokens, _ in mine):
            cells = [_kernel_cell(mine.get((tokens, shape))) for shape in shapes]
            lines.append([str(tokens), *cells])
        first = [next(r for (_, s), r in mine.items() if s == shape) for shape in shapes]
        lines.append(["floor, µs", *(_digits(row.get("floor_us")) for row in first)])
        lines.append(["bytes of dense", *(_digits(row.get("bytes_of_dense")) for row in first)])
        title = f"{kind}: µs (times F.linear)"
        yield table([title, *shapes], lines)


def _kernel_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if "failed" in row:
        return "failed"
    wrong = "" if row["right"] else " WRONG"
    return f"{_digits(row['us']['median'])} ({times_dense(row):.2f}){wrong}"


def kernel_bars(rows: Sequence[Row]) -> Iterator[Bar]:
    def of(keep: Callable[[Row], bool]) -> list[Figure]:
        return [
            figure(row, f"{row['shape']}, tokens {row['tokens']}", times_dense)
            for row in rows
            if keep(row)
        ]

    for kind, tokens, asked in KERNEL_BARS:
        what = f"{kind}, {tokens} token{'s' if tokens > 1 else ''}, times F.linear"
        figures = of(lambda r, k=kind, t=tokens: r["kind"] == k and r["tokens"] == t)  # type: ignore[misc]
        yield Bar(what, asked, figures, cases=SHAPES)
    for kind in dict.fromkeys(bar[0] for bar in KERNEL_BARS):
        mine = of(lambda r, k=kind: r["kind"] == k and r["tokens"] != PROMPT_TOKENS)  # type: ignore[misc]
        yield Bar(f"{kind}, anywhere, times F.linear", ANYWHERE, mine, cases=SHAPES * SHORTER)
        mine = of(lambda r, k=kind: r["kind"] == k and r["tokens"] == PROMPT_TOKENS)  # type: ignore[misc]
        yield Bar(f"{kind}, {PROMPT_TOKENS} tokens, times F.linear", PROMPT, mine, cases=SHAPES)


# ---- whole models


def model_table(record: Mapping[str, Any]) -> str:
    """Tokens a second, prompts and memory of one shape."""
    lines = []
    for row in record["rows"]:
        sort = {"decode": "batch", "prompt": "tokens"}.get(row["what"])
        name = f"{row['what']} {row[sort]}" if sort else "memory, of dense"
        if "failed" in row:
            lines.append([f"{name}, {row['kind']}", "failed", "", "", row["failed"][:60]])
        elif sort:
            dense, ours = row["dense_tokens_a_second"], row["tokens_a_second"]
            graphs = "failed" if row["compile_failed"] else f"{row['graphs']} graphs"
            graphs += f", {row['compile_seconds']:.0f} s"
            cells = [f"{dense:.1f}", f"{ours:.1f}", gain(row["times_dense"]), graphs]
            lines.append([f"{name}, {row['kind']}", *cells])
        else:
            ours = f"{row['bytes_of_dense']:.3f}"
            linears = f"linears {row['linears_of_dense']:.3f}"
            packed = f"packed in {row['seconds_to_pack']:.0f} s"
            lines.append([f"{name}, {row['kind']}", "1", ours, linears, packed])
    settings = record["settings"]
    title = f"{settings['shape']['name']}, context {settings['context']}: tokens/s"
    return table([title, "dense", "packed", "times dense", "compiled"], lines)


def model_bars(record: Mapping[str, Any]) -> Iterator[Bar]:
    rows = record["rows"]
    for kind, batch, asked in DECODE_BARS:
        what = f"LLaMA-7B, batch {batch}, {kind}, times dense"
        cases = [row for row in rows if row["kind"] == kind and row.get("batch") == batch]
        yield Bar(what, asked, [figure(row, "tokens/s", times_dense) for row in cases])
    for kind, asked in MEMORY_BARS:
        cases = [row for row in rows if row["kind"] == kind and row["what"] == "model"]
        found = [figure(row, "whole model", lambda r: float(r["bytes_of_dense"])) for row in cases]
        yield Bar(f"LLaMA-7B, memory, {kind}, of dense", asked, found, at_least=False)


# ---- pruning


def pruning_table(record: Mapping[str, Any]) -> str:
    """Seconds and memory of every method on one block."""
    lines = []
    for row in record["methods"]:
        seconds, extra = row["seconds"], row["peak_extra_bytes"]
        spread = f"{seconds['min']:.3f}–{seconds['max']:.3f}"
        memory = "-" if extra is None else f"{extra / 2**20:.0f}"
        name = f"{row['method']} {row['pattern']}"
        lines.append([name, f"{seconds['median']:.3f}", spread, memory, f"{row['error']:.2e}"])
    for what, seconds in record["statistics_seconds"].items():
        spread = f"{seconds['min']:.3f}–{seconds['max']:.3f}"
        lines.append([f"gathering {what}", f"{seconds['median']:.3f}", spread, "", ""])
    title = f"one block of {record['shape']['name']}, {record['samples']} x {record['tokens']}"
    return table([title, "s", "min–max", "extra MiB", "error"], lines)


def allocation_table(record: Mapping[str, Any]) -> str:
    """BESA's learning against dense probability masks."""
    lines = []
    for case in record["results"]:
        for part in ("mask", "step"):
            result = case[part]
            times = [f"{result['seconds'][c]['median'] * 1e3:.1f}" for c in ("dense", "besa")]
            shares = [f"{result[f'memory_share{of}']:.2f}" for of in ("", "_beyond_activations")]
            name = f"allocation, {case['shape']} {case['dtype']}, {part}"
            lines.append([name, *times, f"{result['speed_up']:.2f}×", *shares])
    header = ["BESA's rates", "dense ms", "besa ms", "faster", "memory", "beyond activations"]
    return table(header, lines)


def allocation_bars(record: Mapping[str, Any]) -> Iterator[Bar]:
    for part, memory in (("mask", "memory_share"), ("step", "memory_share_beyond_activations")):
        name = {"mask": "masks alone", "step": "a whole learning step"}[part]
        cases = [(f"{x['shape']} {x['dtype']}", x[part]) for x in record["results"]]
        speed = [Figure(result["speed_up"], where) for where, result in cases]
        share = [Figure(result[memory], where) for where, result in cases]
        yield Bar(f"BESA's allocation, {name}, times the obvious", ALLOCATION_SPEED, speed)
        what = f"BESA's allocation, {name}, extra memory"
        yield Bar(what, ALLOCATION_MEMORY, share, at_least=False)


# ---- all of it


def checks_row(records: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How many results were compared with a reference, and which of them were wrong."""
    passed, wrong = 0, []
    for name, record in records.items():
        for row in [*record.get("rows", []), *record.get("checks", [])]:
            if "failed" not in row and row.get("right", row.get("passed", False)):
                passed += 1
            else:
                parts = (row.get(key) for key in ("check", "what", "kind", "shape", "tokens"))
                wrong.append(" ".join([name, *(str(part) for part in parts if part is not None)]))
        wrong += [f"{name} {what}" for what in record.get("failed", {})]
    total = passed + len(wrong)
    cells = ["checks", f"all {total}", str(passed), "ok" if not wrong else "wrong"]
    more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
    return [*cells, "; ".join(wrong[:2]) + more]


def report(records: Mapping[str, Mapping[str, Any]]) -> str:
    """All tables, by the names of their files without `.json`."""
    parts: list[str] = []
    bars: list[Bar] = []
    nothing: dict[str, Any] = {"rows": [], "results": []}
    if "kernels" in records:
        parts += kernel_tables(records["kernels"]["rows"])
    parts += [model_table(records[name]) for name in records if name.startswith("decode-")]
    if "pruning" in records:
        parts.append(pruning_table(records["pruning"]))
    parts += [allocation_table(records[name]) for name in records if name.startswith("allocation-")]
    # A look that it runs, on a CPU or with tiny shapes, is held against no bar.
    measured = {name: record for name, record in records.items() if "gpu" in record["conditions"]}
    bars += kernel_bars(measured.get("kernels", nothing)["rows"])
    bars += model_bars(measured.get("decode-llama-7b", nothing))
    bars += allocation_bars(measured.get("allocation-cuda", nothing))
    for name, record in records.items():
        if not record.get("finished"):
            parts.append(f"{name}: cut off, or a part was left out; run the script again")
    header = ["bar", "asked", "measured", "", "where"]
    parts.append(table(header, [*(bar.cells() for bar in bars), checks_row(records)]))
    machines = dict.fromkeys(_machine(record["conditions"]) for record in records.values())
    return "\n\n".join([*machines, *parts])


def _machine(conditions: Mapping[str, Any]) -> str:
    there = conditions.get("gpu", conditions["cpu"])
    return f"{there}, torch {conditions['torch']}, transformers {conditions['transformers']}"


def _digits(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS / "gpu")
    folder = parser.parse_args().folder
    records = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("*.json"))
    }
    print(report({name: record for name, record in records.items() if "conditions" in record}))


if __name__ == "__main__":
    main()
