"""Writes the README's figures from the result files.

python benchmarks/readme.py            # writes
python benchmarks/readme.py --check    # exit code 1 if the README is behind the results
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import milliseconds
from kernel_report import readme_table
from serving_report import engine_name, tables

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    ("magnitude", None): "Magnitude",
    ("wanda", None): "Wanda",
    ("sparsegpt", None): "SparseGPT (updates weights)",
    ("besa", "layer"): "BESA, rates by layer",
    ("besa", "row"): "**BESA, rates by row** (default)",
}


def table(record: dict[str, Any]) -> str:
    """The table of methods, from benchmarks/table.py."""
    settings = list(dict.fromkeys(row["setting"] for row in record["rows"]))
    rows = {(r["method"], r["granularity"], r["setting"]): r for r in record["rows"]}
    dense = record["dense"]["perplexity"]
    lines = [
        f"| perplexity | {' | '.join(settings)} |",
        f"| --- |{' --- |' * len(settings)}",
        f"| Dense | {' | '.join([f'{dense:.2f}'] * len(settings))} |",
    ]
    for (method, granularity), name in NAMES.items():
        cells = []
        for setting in settings:
            row = rows[method, granularity, setting]
            cell = f"{row['perplexity']:.2f}"
            if row["recovered"] is not None and method != "magnitude":
                cell += f" (closed {row['recovered']:.0%})"
            cells.append(cell)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    margins = ", ".join(
        f"{rows['besa', 'row', s]['margin']:.3f} ± {rows['besa', 'row', s]['margin_se']:.3f} at {s}"
        for s in settings
    )
    lines += [
        "",
        f"BESA's margin over Wanda in nats a token: {margins}. {record['tokens']:,} tokens, "
        f"windows of {record['seqlen']}; {record['machine']}; torch {record['versions']['torch']}. "
        "`python benchmarks/table.py --work DIR`.",
    ]
    return "\n".join(lines)


def cost(wallclock: dict[str, Any], memory: dict[str, Any], allocation: dict[str, Any]) -> str:
    """Time and memory, from benchmarks/wallclock.py, memory.py and allocation.py."""
    lines = [
        "| whole run of `besa prune` | Wanda | BESA | ratio (rounds) |",
        "| --- |" + " --- |" * 3,
    ]
    for name, model in wallclock["models"].items():
        seconds, ratio = model["wall_clock_seconds"], model["ratio"]
        lines.append(
            f"| {name}, {model['settings']['samples']} samples of {model['settings']['seqlen']} "
            f"tokens | {seconds['wanda']['median']:.1f} s | {seconds['besa']['median']:.1f} s "
            f"| {ratio['of_medians']:.2f}× ({ratio['min']:.2f}–{ratio['max']:.2f}) |"
        )
    few, many = memory["model"]["layers"]
    lines += ["", f"| peak resident memory | {few} blocks | {many} blocks | growth |"]
    lines.append("| --- |" + " --- |" * 3)
    for method, result in memory["methods"].items():
        low, high = (f"{one['median'] / 2**20:.0f} MiB" for one in result["peak_rss"].values())
        lines.append(f"| {method} | {low} | {high} | {result['growth']:+.1%} |")
    lines += [
        "",
        "BESA's masks against the obvious representation (int64 sort order, dense probabilities "
        "under autograd), one calibration sample of "
        f"{allocation['results'][0]['tokens']:,} tokens, time to build the masked weights and "
        "push the gradient back, and the whole learning step with the block's own forward and "
        "backward; extra memory of the step beyond the block's activations, which both keep:",
        "",
        "| one block of | masks: dense | besa | faster | extra memory "
        "| whole step: faster | extra memory |",
        "| --- |" + " --- |" * 6,
    ]
    for result in allocation["results"]:
        mask, step = result["mask"], result["step"]
        times = [f"{mask['seconds'][c]['median']:.2f} s" for c in ("dense", "besa")]
        lines.append(
            f"| {result['shape']}, {result['dtype']} | {times[0]} | {times[1]} "
            f"| {mask['speed_up']:.1f}× | {mask['memory_share']:.2f} of it "
            f"| {step['speed_up']:.1f}× | {step['memory_share_beyond_activations']:.2f} of it |"
        )
    conditions = allocation["conditions"]
    lines += [
        "",
        f"{conditions['cpu']}, {conditions['threads']} threads, torch {conditions['torch']}, "
        f"transformers {conditions['transformers']}. `python benchmarks/wallclock.py`, "
        "`memory.py`, `allocation.py`; `benchmarks/gpu.sh` does it on a GPU.",
    ]
    return "\n".join(lines)


def engines(record: dict[str, Any]) -> str:
    """Dense against packed in the engines, from benchmarks/engines.py."""
    names = list(record["checkpoint_bytes"])
    lines = [
        f"| {record['shape']}'s shape, random weights, 50% | {' | '.join(names)} |",
        "| --- |" + " --- |" * len(names),
    ]

    def line(title: str, cells: list[str]) -> None:
        lines.append(f"| {title} | {' | '.join(cells)} |")

    for engine, result in record["engines"].items():
        for question, seconds in result["seconds"].items():
            cells = []
            for name in names:
                ratio = result["speedup"][question][name]
                cell = f"{seconds[name]['median'] * 1e3:.0f} ms"
                if name != "dense":
                    ends = f"{ratio['min']:.2f}–{ratio['max']:.2f}"
                    cell += f" ({ratio['median']:.2f}×, {ends})"
                cells.append(cell)
            batch = question.removeprefix("batch ")
            step = f"a step of {batch} sequence{'' if batch == '1' else 's'}"
            first = f"first token after a {question}"
            title = first if question.startswith("prompt") else step
            line(f"{engine_name(engine)}: {title}", cells)
        start = result["start_seconds"]
        cells = [f"{start[n]:.1f} s ({start[n] / start['dense']:.2f})" for n in names]
        line(f"{engine_name(engine)}: start", cells)
    linears = record["engines"]["vllm"]["linear_bytes"]
    for title, sizes in (
        ("pruned linears in memory", linears),
        ("checkpoint on disk", record["checkpoint_bytes"]),
    ):
        cells = [f"{sizes[n] / 2**20:.0f} MiB ({sizes[n] / sizes['dense']:.3f})" for n in names]
        line(title, cells)
    conditions = record["conditions"]
    lines += [
        "",
        f"Medians of {record['rounds']} interleaved rounds, smallest and largest ratio; bfloat16 "
        f"except for int8 values, {record['layers']} blocks, prompts of {record['prompt']} tokens "
        f"before a step. {conditions['cpu']}, {conditions['threads']} threads, "
        f"torch {conditions['torch']}, vLLM {conditions['vllm']}, transformers "
        f"{conditions['transformers']}. `python benchmarks/engines.py --work DIR`.",
    ]
    return "\n".join(lines)


# What each sparse graph is held against.
ONNX_AGAINST = {"sparse bf16": "fp32", "sparse int8": "int8"}


def onnx(record: dict[str, Any]) -> str:
    """Dense and packed weights in ONNX Runtime, from benchmarks/onnx_runtime.py."""
    titles = {
        "tinyllama": f"TinyLlama's shape, {record['layers']} blocks, random weights, 50%",
        "embedded": "the embedded model, Wanda, 50%",
    }
    tables = [onnx_table(titles[model], found) for model, found in record["models"].items()]
    conditions = record["conditions"]
    words = (
        "In parentheses: sparse bf16 against fp32, sparse int8 against int8. Medians of "
        f"{record['rounds']} interleaved rounds, smallest and largest ratio; MatMulNBits of "
        f"accuracy level 4; prompts of {record['prompt']} tokens before a step. "
        f"{conditions['cpu']}, {conditions['cores']} cores, ONNX Runtime "
        f"{conditions['onnxruntime']}, GenAI {conditions['onnxruntime-genai']}. "
        "`python benchmarks/onnx_runtime.py --work DIR`."
    )
    return "\n\n".join([*tables, words])


def onnx_table(title: str, found: dict[str, Any]) -> str:
    names = list(found["load_seconds"])
    lines = [f"| {title} | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]

    def line(what: str, values: dict[str, float], shape: str, ratio: bool = True) -> None:
        cells = []
        for name in names:
            cell = shape.format(values[name])
            if ratio and name in ONNX_AGAINST:
                cell += f" ({values[name] / values[ONNX_AGAINST[name]]:.2f})"
            cells.append(cell)
        lines.append(f"| {what} | {' | '.join(cells)} |")

    for question, seconds in found["seconds"].items():
        cells = []
        for name in names:
            cell = milliseconds(seconds[name]["median"])
            if name in ONNX_AGAINST:
                gain = found["gain"][question][name]
                ends = f"{gain['min']:.2f}–{gain['max']:.2f}"
                cell += f" ({gain['median']:.2f}×, {ends})"
            cells.append(cell)
        lines.append(f"| {question} | {' | '.join(cells)} |")
    own = {name: memory["own"] for name, memory in found["memory_loaded"].items()}
    line("loading", {n: x["median"] for n, x in found["load_seconds"].items()}, "{:.2f} s")
    for what, sizes in (
        ("the blocks' products", found["linear_bytes"]),
        ("all weights, on the disk", found["data_bytes"]),
        ("memory of its own, loaded", own),
    ):
        line(what, {name: size / 2**20 for name, size in sizes.items()}, "{:.1f} MiB")
    errors = {name: check["error"] for name, check in found["logits"].items()}
    line("logits, relative difference from transformers'", errors, "{:.1g}", ratio=False)
    return "\n".join(lines)


MORE = ("vllm", "transformers", "demo")

SECTIONS: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "serving": (tables, ("serving/peers.json",)),
    "more": (tables, tuple(f"serving/{part}.json" for part in MORE)),
    "table": (table, ("table.json",)),
    "cost": (cost, ("wallclock.json", "memory.json", "allocation-cpu.json")),
    "kernels": (readme_table, ("kernels.json",)),
    "engines": (engines, ("engines.json",)),
    "onnx": (onnx, ("onnx.json",)),
}


def filled(text: str) -> str:
    """The README with every marked section as the results say."""
    for name, (render, files) in SECTIONS.items():
        body = render(*(json.loads((RESULTS / file).read_text()) for file in files))
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.S)  # noqa: B023
        if count != 1:
            raise SystemExit(f"README.md has {count} sections marked {name}")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    new = filled(text)
    if args.check:
        raise SystemExit("README.md is behind benchmarks/results" if new != text else 0)
    readme.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
