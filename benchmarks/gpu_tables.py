"""The tables of docs/gpu.md, from the JSON files that `benchmarks/gpu.sh` leaves.

    python benchmarks/readme.py      # results/gpu/*.json -> docs/gpu.md

A part that was not measured has no table, and a case that failed or was wrong no figure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import gain

Row = Mapping[str, Any]
Record = Mapping[str, Any]

# Of all that is measured, what a page has room for; `benchmarks/gpu_report.py` prints the rest.
SHAPE = "4096x4096"
TOKENS = (1, 8, 16, 32, 64, 256, 1024, 4096)
KINDS = ("50%", "70%", "2:4", "int8 50%")

NAMES = {
    "llama-7b": "LLaMA-7B",
    "llama-3-8b": "Llama-3-8B",
    "besa row": "BESA, rates by row",
    "besa layer": "BESA, rates by layer",
    "besa": "BESA",
    "sparsegpt": "SparseGPT",
    "magnitude": "Magnitude",
    "wanda": "Wanda",
}


def gpu_tables(folder: Path) -> str:
    """All of them; one sentence where there is no file."""
    found = {
        path.stem: json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))
    }
    records = {name: record for name, record in found.items() if "conditions" in record}
    parts: list[str] = []
    if "kernels" in records:
        parts += kernels(records["kernels"])
    if models := [records[name] for name in sorted(records) if name.startswith("decode-")]:
        parts.append(decoding(models))
    if "pruning" in records:
        parts.append(pruning(records["pruning"]))
    if "allocation-cuda" in records:
        parts.append(allocation(records["allocation-cuda"]))
    if not parts:
        return "No GPU has been measured with this version yet: `benchmarks/gpu.sh` does it."
    return "\n\n".join([*parts, conditions(list(records.values()))])


def gpu_sentence(folder: Path) -> str:
    """What a model of LLaMA-7B's shape gains and loses, with the conditions."""
    record = json.loads((folder / "decode-llama-7b.json").read_text("utf-8"))
    settings = record["settings"]
    found = {
        (row["what"], row["kind"]): row
        for row in reversed(record["rows"])  # the first batch counts
        if sound(row)
    }
    one = {kind: found["decode", kind]["times_dense"] for kind in ("50%", "2:4", "int8 50%")}
    tokens = found["decode", "50%"]["tokens_a_second"]
    prompt, whole = found["prompt", "50%"], found["model", "50%"]
    model = f"{model_name(settings)}'s shape"
    return (
        f"On an {record['conditions']['gpu'].split()[1]}, a model of {model} (random weights, "
        f"transformers, compiled, {settings['context']} tokens in its cache) generates "
        f"{tokens:.0f} tokens/s with half of its weights, {gain(one['50%'])} those of the dense "
        f"one; at 2:4 {gain(one['2:4'])}, with int8 values {gain(one['int8 50%'])}. It takes "
        f"{whole['bytes_of_dense']:.2f} of the memory, and a prompt of {prompt['tokens']} tokens "
        f"goes through at {gain(prompt['times_dense'])} the speed."
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def sound(row: Row | None) -> bool:
    """Whether a case was measured, and its result right."""
    return row is not None and "failed" not in row and bool(row.get("right", True))


# ---- single products


def kernels(record: Record) -> Iterator[str]:
    """Products of one shape by tokens, and of one token by shape."""
    rows = record["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not shapes:
        return
    main = SHAPE if SHAPE in shapes else shapes[0]
    by_case = {(row["kind"], row["shape"], row["tokens"]): row for row in rows}
    kinds = [kind for kind in KINDS if any(row["kind"] == kind for row in rows)]
    tokens = [count for count in TOKENS if any(row["tokens"] == count for row in rows)]

    def line(title: str, shape: str, count: int) -> list[str]:
        found = [by_case.get((kind, shape, count)) for kind in kinds]
        dense = next((microseconds(row["dense_us"]) for row in found if row and sound(row)), "–")
        return [title, dense, *map(product, found)]

    by_tokens = [line(f"{count} token{'s' * (count > 1)}", main, count) for count in tokens]
    yield markdown([f"{size(main)}, times F.linear", "F.linear", *kinds], by_tokens)
    if len(shapes) > 1:
        by_shape = [line(size(shape), shape, 1) for shape in shapes]
        yield markdown(["1 token, times F.linear", "F.linear", *kinds], by_shape)


def size(shape: str) -> str:
    return shape.replace("x", " × ")


def product(row: Row | None) -> str:
    if row is None or not sound(row):
        return "–"
    return f"{microseconds(row['us'])}, {gain(row['times_dense'])}"


def microseconds(spread: Mapping[str, float]) -> str:
    value = spread["median"]
    return f"{value:.1f} µs" if value < 100 else f"{value:.0f} µs"


# ---- whole models


def decoding(records: Sequence[Record]) -> str:
    """Tokens a second, prompts and memory of whole models."""
    kinds = [
        kind
        for kind in KINDS
        if any(row["kind"] == kind for record in records for row in record["rows"])
    ]
    lines = []
    for record in records:
        settings = record["settings"]
        name = f"{model_name(settings)}'s shape"
        passes = [row for row in record["rows"] if row["what"] != "model"]
        for case in dict.fromkeys((x["what"], x.get("batch"), x.get("tokens")) for x in passes):
            what, batch, tokens = case
            title = f"a prompt of {tokens}" if what == "prompt" else f"{batch} at a time"
            found = {
                row["kind"]: row
                for row in passes
                if (row["what"], row.get("batch"), row.get("tokens")) == case and sound(row)
            }
            dense = next((per_second(x["dense_tokens_a_second"]) for x in found.values()), "–")
            cells = [_pass(found.get(kind)) for kind in kinds]
            lines.append([f"{name}, {title}", dense, *cells])
        made = {row["kind"]: row for row in record["rows"] if row["what"] == "model"}
        good = {kind: row for kind, row in made.items() if sound(row)}
        dense = next((gibibytes(row["dense_bytes"]) for row in good.values()), "–")
        lines.append([f"{name}, memory", dense, *(_memory(good.get(kind)) for kind in kinds)])
    return markdown(["tokens a second, times dense", "dense", *kinds], lines)


def model_name(settings: Mapping[str, Any]) -> str:
    name: str = settings["shape"]["name"]
    return NAMES.get(name, name)


def per_second(value: float) -> str:
    return f"{value:.0f}/s" if value >= 1000 else f"{value:.1f}/s"


def gibibytes(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"


def _pass(row: Row | None) -> str:
    if row is None:
        return "–"
    return f"{per_second(row['tokens_a_second'])}, {gain(row['times_dense'])}"


def _memory(row: Row | None) -> str:
    if row is None:
        return "–"
    share = row["bytes_of_dense"]
    return f"{gibibytes(share * row['dense_bytes'])}, {share:.2f} of dense"


# ---- pruning


def pruning(record: Record) -> str:
    """Seconds and memory of every method on one block."""
    lines = []
    for row in record["methods"]:
        extra = row["peak_extra_bytes"]
        seconds = row["seconds"]
        lines.append(
            [
                f"{NAMES.get(row['method'], row['method'])}, {row['pattern']}",
                f"{seconds['median']:.2f} s ({seconds['min']:.2f}–{seconds['max']:.2f})",
                "–" if extra is None else f"{extra / 2**20:.0f} MiB",
            ]
        )
    what = f"one block of {model_name(record)}'s shape"
    samples = f"{record['samples']} samples of {record['tokens']:,} tokens"
    return markdown([f"{what}, {samples}, from statistics to masks", "time", "memory"], lines)


def allocation(record: Record) -> str:
    """BESA's learning against the obvious way to write it, as docs/prune.md has it for a CPU."""
    lines = []
    for case in record["results"]:
        mask, step = case["mask"], case["step"]
        times = [f"{mask['seconds'][c]['median'] * 1e3:.0f} ms" for c in ("dense", "besa")]
        lines.append(
            [
                f"{NAMES.get(case['shape'], case['shape'])}, {case['dtype']}",
                *times,
                f"{mask['speed_up']:.1f}×",
                f"{mask['memory_share']:.2f} of it",
                f"{step['speed_up']:.1f}×",
                f"{step['memory_share_beyond_activations']:.2f} of it",
            ]
        )
    header = ["BESA's masks of one block", "dense", "besa", "faster", "extra memory"]
    return markdown([*header, "whole step: faster", "extra memory"], lines)


# ---- all of it


def conditions(records: Sequence[Record]) -> str:
    """Machines and versions, and what the figures are."""
    there = [record["conditions"] for record in records]
    machines = dict.fromkeys(
        f"{x.get('gpu', x['cpu'])}, torch {x['torch']}, transformers {x['transformers']}"
        for x in there
    )
    left_out = [record for record in records if not record.get("finished", True)]
    words = (
        "Medians of CUDA graphs replayed in turns, and the smallest and the largest ratio of a "
        "round; weights are random and read from memory, not from the L2 cache. A dash: no "
        f"figure. {'; '.join(machines)}. `benchmarks/gpu.sh`."
    )
    return words + (" Some cases were left out: the time was up." if left_out else "")
