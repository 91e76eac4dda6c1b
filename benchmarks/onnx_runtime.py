"""What packed weights gain in ONNX Runtime: decode, prefill, loading, memory, bytes.

    python benchmarks/onnx_runtime.py --work DIR
    python benchmarks/onnx_runtime.py --work DIR --models tinyllama --rounds 3

Two models with half of their linears' weights gone: one of TinyLlama's shape, random weights in
bfloat16, whose working set is far beyond any cache; and the small one that besa carries, pruned
with Wanda. Each as `besa export --format onnx` writes it: dense in fp32, int8 and int4
(MatMulNBits, accuracy level 4), sparse in bfloat16 and int8. Every graph is in ONNX Runtime GenAI
in a process of its own; they answer in turns, round by round, and the others are stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    apart,
    conditions,
    milliseconds,
    random_shape,
    run_besa,
    spread,
    table,
    write_json,
)
from engines import LAYERS

from besa.bench.offline import EngineProcess
from besa.demo import MODEL
from besa.model.export_record import OnnxRecord
from besa.model.record import read_record
from besa.typed_json import to_json

VARIANTS = {
    "fp32": [],
    "int8": ["--precision", "int8"],
    "int4": ["--precision", "int4"],
    "sparse bf16": ["--sparse", "--precision", "bf16"],
    "sparse int8": ["--sparse", "--precision", "int8"],
}
# What each sparse graph is held against.
AGAINST = {"sparse bf16": "fp32", "sparse int8": "int8"}

BATCHES = (1, 4, 16)
PROMPT = 32
STEPS = {"tinyllama": 16, "embedded": 128}  # the latter's are a fraction of a millisecond
LONG_PROMPT = {"tinyllama": 256, "embedded": 192}  # which can read 256, the answer among them

# Seconds for an answer; a dense fp32 graph takes half a minute for the longest.
LIMIT = 300


def make(work: Path, model: str) -> dict[str, Path]:
    """The graphs of a model, made where they are not there."""
    pruned = work / model / "pruned"
    if not (pruned / "config.json").exists():
        shutil.rmtree(pruned, ignore_errors=True)
        if model == "tinyllama":
            apart(random_shape, pruned, "tinyllama", LAYERS, 0.5)
        else:
            run_besa("prune", MODEL, "--method", "wanda", "--out", pruned)
    graphs = {}
    for name, flags in VARIANTS.items():
        graphs[name] = work / model / name.replace(" ", "-")
        if not graphs[name].exists():
            run_besa("export", "--format", "onnx", pruned, "--out", graphs[name], *flags)
    return graphs


class Contender(EngineProcess):
    """A process that holds one graph, and what it takes once that is loaded."""

    def __init__(self, directory: Path) -> None:
        super().__init__("onnx", directory, max(BATCHES), 512, LIMIT)
        self.loaded = memory(self.popen.pid)


def memory(pid: int) -> dict[str, int]:
    """Bytes: of its own, mapped from files, and the most in all so far."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split() for line in lines}
    names = {"own": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}
    return {name: int(found[field][1]) * 1024 for name, field in names.items()}


def compare(graphs: dict[str, Path], rounds: int, model: str) -> dict[str, Any]:
    """Every graph's figures, and the sparse ones' gain over what they are held against."""
    long_prompt = LONG_PROMPT[model]
    starts: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):  # loading, with nothing beside it
        for name, directory in graphs.items():
            with Contender(directory) as one:
                starts[name].append(one.start_seconds)
    questions = {
        f"batch {n}, a step": {"batch": n, "prompt": PROMPT, "steps": STEPS[model]} for n in BATCHES
    }
    questions[f"prompt of {long_prompt}"] = {"batch": 1, "prompt": long_prompt, "steps": 1}
    seconds: dict[str, dict[str, list[float]]] = {q: {n: [] for n in graphs} for q in questions}
    with ExitStack() as stack:
        contenders = {n: stack.enter_context(Contender(d)) for n, d in graphs.items()}
        check = {"batch": 1, "prompt": 8, "steps": 16, "seed": 1}
        said = {name: one.ask(check, LIMIT) for name, one in contenders.items()}
        for question, arguments in questions.items():
            for turn in range(rounds + 1):
                for name, one in contenders.items():
                    answer = one.ask({**arguments, "seed": turn}, LIMIT)
                    found = [answer["prefill"]] if "prompt" in question else answer["steps"]
                    if turn:  # the first one warms up
                        seconds[question][name].append(sorted(found)[len(found) // 2])
        loaded = {name: one.loaded for name, one in contenders.items()}
        worked = {name: memory(one.popen.pid) for name, one in contenders.items()}
    return {
        "load_seconds": {name: spread(found) for name, found in starts.items()},
        "seconds": {q: {n: spread(t) for n, t in own.items()} for q, own in seconds.items()},
        "gain": {
            q: {
                name: spread([d / t for d, t in zip(own[other], own[name], strict=True)])
                for name, other in AGAINST.items()
            }
            for q, own in seconds.items()
        },
        "memory_loaded": loaded,
        "memory_worked": worked,
        "data_bytes": {n: (d / "model.onnx.data").stat().st_size for n, d in graphs.items()},
        "linear_bytes": {name: linear_bytes(directory) for name, directory in graphs.items()},
        "tokens": {name: answer["tokens"] for name, answer in said.items()},
        "logits": {name: logits_check(directory) for name, directory in graphs.items()},
    }


def logits_check(directory: Path) -> dict[str, Any]:
    """How far the logits are from transformers', as the export found."""
    record = read_record(directory)
    assert isinstance(record, OnnxRecord)
    return to_json(record.check)


def linear_bytes(directory: Path) -> int:
    """What the weights of the blocks' products take, scales and bitmasks with them."""
    code = (
        "import math, sys, onnx\n"
        "graph = onnx.load(sys.argv[1], load_external_data=False).graph\n"
        "sizes = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer}\n"
        "nodes = [n for n in graph.node if 'MatMul' in n.op_type and '/layers.' in n.name]\n"
        "names = [name for node in nodes for name in node.input[1:]]\n"
        "print(sum(int(sizes[n]['length']) for n in names if n in sizes))\n"
    )
    model = str(directory / "model.onnx")
    found = subprocess.run(
        [sys.executable, "-P", "-c", code, model], capture_output=True, check=True
    )
    return int(found.stdout)


def show(model: str, result: dict[str, Any]) -> str:
    names = list(VARIANTS)
    rows: list[list[object]] = []
    for question, found in result["seconds"].items():
        cells = [milliseconds(found[name]["median"]) for name in names]
        gains = [f"{result['gain'][question][name]['median']:.2f}×" for name in AGAINST]
        rows.append([question, *cells, *gains])
    for what, found in (("linears", "linear_bytes"), ("all weights", "data_bytes")):
        sizes = result[found]
        cells = [f"{sizes[name] / 2**20:.0f} MiB" for name in names]
        gains = [f"{sizes[name] / sizes[other]:.2f}" for name, other in AGAINST.items()]
        rows.append([what, *cells, *gains])
    loads = {name: found["median"] for name, found in result["load_seconds"].items()}
    cells = [f"{loads[name]:.2f} s" for name in names]
    rows.append(["loading", *cells, *(f"{loads[n] / loads[o]:.2f}" for n, o in AGAINST.items())])
    for part in ("own", "mapped", "peak"):
        sizes = {name: found[part] for name, found in result["memory_loaded"].items()}
        cells = [f"{sizes[name] / 2**20:.0f} MiB" for name in names]
        gains = [f"{sizes[name] / sizes[other]:.2f}" for name, other in AGAINST.items()]
        rows.append([f"memory loaded, {part}", *cells, *gains])
    return table([model, *names, *(f"over {other}" for other in AGAINST.values())], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the models are made")
    parser.add_argument("--models", nargs="+", default=["tinyllama", "embedded"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-make", action="store_true", help="make the models and end")
    parser.add_argument("--json", type=Path, default=RESULTS / "onnx.json")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    results = json.loads(args.json.read_text())["models"] if args.json.exists() else {}
    for model in args.models:
        graphs = make(args.work, model)
        if args.only_make:
            continue
        results[model] = compare(graphs, args.rounds, model)
        print(show(model, results[model]), flush=True)
        names = ("onnx", "onnxruntime", "onnxruntime-genai")
        write_json(
            args.json,
            {
                "conditions": {**conditions(), **{name: version(name) for name in names}},
                "rounds": args.rounds,
                "prompt": PROMPT,
                "steps": STEPS,
                "layers": LAYERS,
                "models": results,
            },
        )


if __name__ == "__main__":
    main()
