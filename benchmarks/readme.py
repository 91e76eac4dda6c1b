"""Writes the figures of README.md and docs/ from the result files.

    python benchmarks/readme.py            # writes
    python benchmarks/readme.py --check    # exit code 1 if a page is behind the results

A page marks the place of a section with two comments, and what is between them is replaced:

    <!-- kernels:begin -->
    <!-- kernels:end -->

Every ratio is the median of ratios paired by round, with the interval that holds it
(`besa.bench.statistics`).
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bits import bits_tables
from common import gain, milliseconds
from gpu_tables import gpu_sentence, gpu_tables
from kernel_report import amx_table, experts_table, isa_table, readme_table
from quality_report import quality_table
from samples import samples_table
from serving_report import engine_name, speed, tables

from besa.bench.results import read_results
from besa.bench.statistics import coverage
from besa.report.comparison import ComparedRun, Comparison, read_comparison

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
# Of the runs of benchmarks/table.py, by `ComparedRun.recipe`.
NAMES = {
    "Magnitude": "Magnitude",
    "Wanda": "Wanda",
    "SparseGPT": "SparseGPT",
    "Wanda + ADMM": "Wanda's masks, ADMM",
    "Wanda + guarded updates": "Wanda's masks, guarded updates",
    "BESA, rates by layer": "BESA's masks alone, rates by layer",
    "BESA": "BESA's masks alone, as in its paper",
    "BESA + ADMM": "BESA's masks, ADMM",
    "BESA + guarded updates": "**besa's default**: BESA's masks, guarded updates",
    "BESA + guarded updates, rotation on": "`--rotate on`",
    "BESA + guarded updates, high effort": "`--effort high`",
    "BESA + guarded updates, high effort, rotation on": "`--effort high --rotate on`",
    "BESA + guarded updates, rounded to int8": "`--quantize int8`",
    "BESA + guarded updates, rounded to int4:64": "`--quantize int4:64`",
}
DEFAULT = "BESA + guarded updates"
# What a reader of the front page does not look for.
PARTS = (
    "Magnitude",
    "Wanda + ADMM",
    "Wanda + guarded updates",
    "BESA, rates by layer",
    "BESA + ADMM",
)
MAIN = [recipe for recipe in NAMES if recipe not in PARTS]


def main_methods(comparison: Comparison) -> str:
    """The methods that a reader of the front page compares."""
    return methods(comparison, MAIN)


def methods(comparison: Comparison, recipes: Iterable[str] = NAMES) -> str:
    """The table of methods, from benchmarks/table.py.

    Args:
        recipes: its lines, as far as they were measured.
    """
    # Rates by size, then patterns.
    found = {row.setting for row in comparison.rows}
    settings = sorted(found, key=lambda name: (":" in name, name))
    rows = {(row.recipe, row.setting): row for row in comparison.rows}
    made = {row.recipe for row in comparison.rows}
    dense = comparison.dense.perplexity
    lines = [
        f"| perplexity | {' | '.join(settings)} |",
        f"| --- |{' --- |' * len(settings)}",
        f"| Dense | {' | '.join([f'{dense:.2f}'] * len(settings))} |",
    ]
    for recipe in recipes:
        if recipe in made:
            cells = [_closed(rows.get((recipe, setting))) for setting in settings]
            lines.append(f"| {NAMES[recipe]} | {' | '.join(cells)} |")
    margins = ", ".join(
        f"{rows[DEFAULT, s].margin:.3f} ± {rows[DEFAULT, s].margin_se:.3f} at {s}" for s in settings
    )
    samples = comparison.settings.get("samples", 128)
    high = any(row.effort == "high" for row in comparison.rows)
    more = ", three times as many with high effort" if high else ""
    lines += [
        "",
        f"The default's margin over Wanda in nats a token: {margins}. {samples} samples of "
        f"{comparison.seqlen} tokens to calibrate{more}; "
        f"{comparison.tokens:,} tokens of {comparison.text}, {comparison.windows};"
        f" {comparison.machine}; torch {comparison.versions['torch']}. "
        "By `benchmarks/table.py`, which says how.",
    ]
    return "\n".join(lines)


def _closed(row: ComparedRun | None) -> str:
    """A perplexity, and the share of Wanda's loss that is won back."""
    if row is None:
        return "–"
    cell = f"{row.perplexity:.2f}"
    if row.recovered is not None and row.method != "magnitude":
        cell += f" (closed {row.recovered:.0%})".replace("-", "\N{MINUS SIGN}")
    return cell


def cost(wallclock: dict[str, Any], memory: dict[str, Any], allocation: dict[str, Any]) -> str:
    """Time and memory, from benchmarks/wallclock.py, memory.py and allocation.py."""
    lines = [
        "| whole run of `besa prune`, masks alone | Wanda | BESA | BESA's time over Wanda's |",
        "| --- |" + " --- |" * 3,
    ]
    for name, model in wallclock["models"].items():
        seconds, ratio = model["wall_clock_seconds"], model["ratio"]
        lines.append(
            f"| {name}, {model['settings']['samples']} samples of {model['settings']['seqlen']} "
            f"tokens | {seconds['wanda']['median']:.1f} s | {seconds['besa']['median']:.1f} s "
            f"| {gain(ratio)} |"
        )
    few, many = memory["model"]["layers"]
    lines += ["", f"| peak resident memory | {few} blocks | {many} blocks | growth |"]
    lines.append("| --- |" + " --- |" * 3)
    for method, result in memory["methods"].items():
        low, high = (f"{one['median'] / 2**20:.0f} MiB" for one in result["peak_rss"].values())
        lines.append(f"| {method} | {low} | {high} | {result['growth']:+.1%} |")
    lines += [
        "",
        "How BESA learns, against the obvious way to write it: an int64 sort order of the weights "
        "and dense probabilities under autograd. *Masks* is the time to build the masked weights "
        "and to push the gradient back; *whole step* has the block's own forward and backward, "
        "too; *extra memory* is what the step takes beyond the activations, which both keep. One "
        f"calibration sample of {allocation['results'][0]['tokens']:,} tokens:",
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


def mixture_cost(record: dict[str, Any]) -> str:
    """A large mixture, from benchmarks/mixture_block.py."""
    layers, there = record["layers"], record["conditions"]
    lines = [
        f"| a block of `{record['shape']}`, random weights | time | all {layers} | peak memory |",
        "| --- |" + " --- |" * 3,
    ]
    for method, one in record["methods"].items():
        seconds, peak = one["block_seconds"], one["peak_rss"] / 2**30
        total = f"{seconds * layers / 3600:.1f} h"
        lines.append(f"| {method}, masks alone | {seconds:.0f} s | {total} | {peak:.1f} GiB |")
    lines += [
        "",
        f"{record['samples']} samples of {record['seqlen']} tokens, in float32. {there['cpu']}, "
        f"{there['threads']} threads, torch {there['torch']}. By `benchmarks/mixture_block.py`.",
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
                    cell += f", {gain(ratio)}"
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
    flags = ""
    if record["shape"] != "tinyllama":
        flags = f" --shape {record['shape']} --layers {record['layers']}"
        flags += f" --vocabulary {record['vocabulary']}" if record["vocabulary"] else ""
    lines += [
        "",
        f"{rounds_of(record)} bfloat16 except for int8 values, {record['layers']} blocks, "
        f"prompts of {record['prompt']} tokens before a step. {conditions['cpu']}, "
        f"{conditions['threads']} threads, torch {conditions['torch']}, vLLM "
        f"{conditions['vllm']}, transformers {conditions['transformers']}. "
        f"`python benchmarks/engines.py --work DIR{flags}`.",
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
        "Sparse bf16 is compared with fp32, sparse int8 with int8. "
        f"{rounds_of(record)} MatMulNBits of accuracy level 4; prompts of {record['prompt']} "
        "tokens before a step. "
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
                cell += f", {gain(found['gain'][question][name])}"
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


def gpu() -> str:
    """What `benchmarks/gpu.sh` has left of a GPU; one sentence if nothing."""
    return gpu_tables(RESULTS / "gpu")


def gpu_speed() -> str:
    """The same in a sentence."""
    return gpu_sentence(RESULTS / "gpu")


def rounds_of(record: dict[str, Any]) -> str:
    """How many rounds there were, and how sure they make an interval."""
    return (
        f"Medians of {record['rounds']} interleaved rounds; a ratio's interval holds its median "
        f"with {coverage(record['rounds'], 1):.0%}."
    )


MORE = ("vllm", "transformers", "demo")
# Measured on one CPU.
ISAS = ("avx512_bf16", "avx2_vnni", "avx2")

SECTIONS: dict[str, tuple[Callable[..., str], tuple[str, ...]]] = {
    "speed": (speed, ("serving/peers.json",)),
    "serving": (tables, ("serving/peers.json",)),
    "more": (tables, tuple(f"serving/{part}.json" for part in MORE)),
    "real": (main_methods, ("real.json",)),
    "quality": (quality_table, ("quality.json",)),
    "samples": (samples_table, ("samples.json",)),
    "table": (main_methods, ("table.json",)),
    "methods": (methods, ("table.json",)),
    "mixture": (methods, ("mixture.json",)),
    "mixture-cost": (mixture_cost, ("mixture-block.json",)),
    "cost": (cost, ("wallclock.json", "memory.json", "allocation-cpu.json")),
    "bits": (bits_tables, ("bits.json",)),
    "kernels": (readme_table, ("kernels.json",)),
    "isas": (isa_table, tuple(f"kernels-{isa}.json" for isa in ISAS)),
    "amx": (amx_table, ("kernels-avx512_amx.json", "kernels-beside-amx.json")),
    "experts": (experts_table, ("experts.json",)),
    "engines": (engines, ("engines.json",)),
    "engines-experts": (engines, ("engines-experts.json",)),
    "onnx": (onnx, ("onnx.json",)),
    "gpu": (gpu, ()),
    "gpu-speed": (gpu_speed, ()),
}


def section(name: str) -> str:
    """A section as the results say."""
    render, files = SECTIONS[name]
    return render(*map(read, files))


def read(file: str) -> Any:
    """A result file: runs of besa's own commands as their types, other scripts' as they are."""
    path = RESULTS / file
    if file in ("table.json", "real.json", "mixture.json"):
        return read_comparison(path)
    return read_results(path) if file.startswith("serving/") else json.loads(path.read_text())


def filled(text: str) -> tuple[str, list[str]]:
    """A page with every marked section filled in, and the names of these sections.

    Raises:
        SystemExit: the page marks a section that there is not.
    """
    names = re.findall(r"<!-- ([\w-]+):begin -->", text)
    for name in names:
        if name not in SECTIONS:
            raise SystemExit(f"there is no section {name}: {', '.join(SECTIONS)}")
        before, _, rest = text.partition(f"<!-- {name}:begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}:end -->")
        if not end:
            raise SystemExit(f"the section {name} has no end")
        text = f"{before}<!-- {name}:begin -->\n{section(name)}\n{end}{after}"
    return text, names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    shown: set[str] = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        new, names = filled(text)
        shown.update(names)
        if args.check and new != text:
            raise SystemExit(f"{page.relative_to(ROOT)} is behind benchmarks/results")
        if new != text:
            page.write_text(new, encoding="utf-8")
    if unused := SECTIONS.keys() - shown:
        raise SystemExit(f"no page shows {', '.join(sorted(unused))}")


if __name__ == "__main__":
    main()
