"""The picture and the README's tables of what benchmarks/serving.py measured.

    python benchmarks/serving_report.py      # benchmarks/results/serving/peers.json -> serving.svg

The tables go into the README with all others: `python benchmarks/readme.py`.
"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS
from kernel_report import STYLE

from besa.bench.results import by_load
from besa.bench.words import FIGURE_NAMES, amount, change
from besa.report.figures import size
from besa.report.svg import line, linear, picture, tag, text, ticks

SHOWN = ("output_tps", "itl_p50", "ttft_p50")
# Those that do not go by the name of their flag.
_ENGINES = {"vllm": "vLLM", "onnx": "ONNX Runtime GenAI"}


def engine_name(engine: str) -> str:
    return _ENGINES.get(engine, engine)


def tables(*records: dict[str, Any]) -> str:
    """A table for each record, and the conditions of all."""
    first = records[0]
    settings, machine, versions = first["settings"], first["machine"], first["versions"]
    engines = ", ".join(
        f"{engine_name(engine)} {version}"
        for engine, version in {
            one["engine"]: one["engine_version"]
            for record in records
            for one in record["contenders"]
        }.items()
    )
    words = (
        f"Medians of {settings['rounds']} interleaved rounds of the same greedy requests, "
        f"{settings['input_length']} tokens in, {settings['output_length']} out; times better than "
        "dense in the same rounds, and the interval that holds it. "
        f"{machine['cpu']}, {machine['cores']} cores; {engines}, torch {versions['torch']}. "
        "`python benchmarks/serving.py --work DIR`."
    )
    return "\n\n".join([*(table(record) for record in records), words])


def table(record: dict[str, Any]) -> str:
    """A row for each contender and load: figures, what they gain over dense, and what it costs."""
    by_name = {one["name"]: one for one in record["contenders"]}
    perplexity = any(one["perplexity"] for one in by_name.values())
    heads = [*(FIGURE_NAMES[name] for name in SHOWN), "on disk", "memory"]
    heads += ["perplexity"] * perplexity
    random = any(one["random_weights"] for one in by_name.values())
    title = "TinyLlama's shape, random weights" if random else "the embedded model"
    lines = [f"| {title} | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for one, gains in by_load(record):
        contender = by_name[one["contender"]]
        cells = []
        for figure in SHOWN:
            cell = amount(figure, one["summary"].get(figure))
            if figure in gains:
                cell += f", {change(gains[figure])}"
            cells.append(cell)
        cells += [size(contender["disk_bytes"]), size(contender["memory"]["steady"])]
        if perplexity:
            cells.append(f"{contender['perplexity']['perplexity']:.2f}")
        row = label(contender) + (f", {one['load']}" if len(record["loads"]) > 1 else "")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def label(contender: dict[str, Any]) -> str:
    """The engine and what it serves; what besa made of it in bold."""
    name = contender["name"].removeprefix("ONNX ").removeprefix("llama.cpp ")
    if contender["packing"] is not None:
        name = f"**besa {name}**"
    return f"{engine_name(contender['engine'])}, {name}"


def plot(record: dict[str, Any]) -> str:
    """Tokens a second, one request at a time: a bar for each contender."""
    by_name = {one["name"]: one for one in record["contenders"]}
    bars = [(by_name[m["contender"]], m["summary"]["output_tps"]) for m, _ in by_load(record)]
    left, top, width, step = 280.0, 34.0, 420.0, 26.0
    most = max(value["high"] for _, value in bars)
    x = linear(0, most, left, left + width)
    bottom = top + step * len(bars)
    body = tag("style", STYLE) + text(left, 14, "tokens a second, one request at a time", "strong")
    for mark in ticks(0, most, 6):
        body += line(x(mark), top - 4, x(mark), bottom, "grid")
        body += text(x(mark), bottom + 15, f"{mark:g}", "small mid")
    for k, (contender, value) in enumerate(bars):
        y, own = top + k * step, contender["packing"] is not None
        name = label(contender).replace("*", "")
        body += text(left - 8, y + 14, name, "end strong" if own else "end")
        size_of = {"width": x(value["median"]) - left, "height": step - 8}
        body += tag("rect", x=left, y=y + 1, rx=2, class_=f"dot f{1 if own else 0}", **size_of)
        body += text(x(value["median"]) + 7, y + 14, f"{value['median']:.1f}", "small")
    machine, settings = record["machine"], record["settings"]
    description = (
        f"A model of TinyLlama's shape with random weights, {settings['input_length']} tokens in, "
        f"{settings['output_length']} out, {machine['cpu']}, {machine['cores']} cores."
    )
    return picture(left + width + 48, bottom + 22, "Serving on two cores", description, body)


def main() -> None:
    folder = RESULTS / "serving"
    record = json.loads((folder / "peers.json").read_text())
    (RESULTS / "serving.svg").write_text(plot(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
