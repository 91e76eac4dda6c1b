"""What serving the packed model gains over HTTP, beside what others serve on the same machine.

    python benchmarks/serving.py --work DIR --llama PYTHON           # every part, an hour or so
    python benchmarks/serving.py --work DIR --parts transformers     # one of them

Each part is one run of `besa bench`, whose results.json it leaves in benchmarks/results/serving:

    vllm          a model of TinyLlama's shape, random weights, in vLLM: dense, and packed at 50%,
                  2:4, and 50% with int8 values; one request at a time, and four
    peers         in vLLM dense, at 50%, and with int8 values; in ONNX Runtime GenAI dense with
                  int8 and int4 values, at 50% with bfloat16 and int8; in llama.cpp dense (bf16,
                  Q8_0, Q4_0); one request at a time
    transformers  what the first part has, in transformers, one request at a time
    offline       inside the engines, without server and client
    demo          the model that besa carries, pruned by half with BESA, its perplexity, too

PYTHON is one with `llama-cpp-python[server]` and `gguf`: they are not installed beside besa.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import RESULTS, run_besa, write_json
from rich.console import Console

from besa.bench.events import Event
from besa.bench.load import Load
from besa.bench.offline import bench_offline
from besa.bench.random_models import random_contenders
from besa.bench.results import Results, results_json
from besa.bench.run import bench
from besa.bench.settings import BenchConfig, Contender
from besa.bench.table import print_results
from besa.demo import MODEL, SEQLEN

SHAPE = "tinyllama"
# Contender: pattern and values.
PACKED = {"50%": ("unstructured", None), "2:4": ("2:4", None), "50% int8": ("unstructured", "int8")}
GGUF = {"llama.cpp bf16": "bf16", "llama.cpp Q8_0": "q8_0", "llama.cpp Q4_0": "q4_0"}
LLAMA = "llama-cpp-python"
# Contender: the model that it is made of, and how it is exported.
ONNX = {
    "ONNX int8": ("dense", ("--precision", "int8")),
    "ONNX int4": ("dense", ("--precision", "int4")),
    "ONNX 50%": ("50%", ("--sparse", "--precision", "bf16")),
    "ONNX 50% int8": ("50%", ("--sparse", "--precision", "int8")),
}
THREADS = len(os.sched_getaffinity(0))

# 64 tokens in and 16 out; requests are few, for a part has to stay within some ten minutes.
BASE = BenchConfig(
    (Contender("none", "none"),), input_length=64, output_length=16, requests=4, quality=False
)


@dataclass(frozen=True)
class Part:
    """A run: who takes part, and how it differs from `BASE`."""

    models: tuple[str, ...]
    settings: dict[str, Any]
    peers: bool = False
    batches: tuple[int, ...] = ()


ALL, SOME = ("dense", *PACKED), ("dense", "50%", "50% int8")
ONE, FOUR = Load("concurrency", 1), Load("concurrency", 4)
PARTS = {
    "vllm": Part(ALL, {"engine": "vllm", "loads": (ONE, FOUR)}),
    "peers": Part(SOME, {"engine": "vllm", "loads": (ONE,)}, True),
    "transformers": Part(ALL, {"engine": "transformers", "loads": (ONE,)}),
    "offline": Part(SOME, {}, True, (1, 4)),
}


def show(event: Event) -> None:
    print(event, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------- contenders


def random_models(work: Path) -> dict[str, Contender]:
    """The random-weight models by name."""
    found: dict[str, Contender] = {}
    for name, (pattern, values) in PACKED.items():
        with random_contenders(SHAPE, 0.5, pattern, values, work, show) as (dense, packed):
            found |= {"dense": dense, name: replace(packed, name=name)}
    return found


def graphs(work: Path, models: dict[str, Contender]) -> list[Contender]:
    """The models for ONNX Runtime GenAI."""
    outs = {name: work / name.replace(" ", "-").replace("%", "") for name in ONNX}
    unpacked = work / "unpacked"  # from packed weights no graph is built
    missing = [name for name, out in outs.items() if not out.exists()]
    if not unpacked.exists() and any(ONNX[name][0] != "dense" for name in missing):
        run_besa("export", "--format", "dense", models["50%"].model, "--out", unpacked)
    for name in missing:
        source, flags = ONNX[name]
        model = models["dense"].model if source == "dense" else unpacked
        run_besa("export", "--format", "onnx", model, *flags, "--out", outs[name])
    shutil.rmtree(unpacked, ignore_errors=True)
    return [Contender(name, str(out), random_weights=True) for name, out in outs.items()]


def gguf(work: Path, python: str, dense: str) -> dict[str, Path]:
    """The dense model for llama.cpp."""
    out = work / "gguf"
    script = Path(__file__).with_name("gguf_model.py")
    subprocess.run([python, script, dense, out], check=True, capture_output=True)
    return {name: out / f"{kind}.gguf" for name, kind in GGUF.items()}


@contextmanager
def llama_server(python: str, model: Path) -> Iterator[str]:
    """llama-cpp-python's OpenAI-compatible server; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "llama_cpp.server", "--model", model, "--model_alias", model.stem]
    flags = {"host": "127.0.0.1", "port": port, "n_ctx": 1024}
    flags |= {"n_threads": THREADS, "n_threads_batch": THREADS}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    with model.with_suffix(".log").open("w") as log:
        process = subprocess.Popen([*command, *words], stdout=log, stderr=log)
        try:
            url = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"llama.cpp ended: see {log.name}") from None
                    time.sleep(0.2)
            yield url
        finally:
            process.kill()
            process.wait()


@contextmanager
def llama_contenders(
    files: dict[str, Path], python: str, random_weights: bool = False
) -> Iterator[tuple[list[Contender], dict[str, dict[str, Any]]]]:
    """A server of llama.cpp for each model, and of each what besa bench cannot know of it."""
    contenders: list[Contender] = []
    known: dict[str, dict[str, Any]] = {}
    version = version_of(LLAMA, python)
    with ExitStack() as stack:
        for name, file in files.items():
            url = stack.enter_context(llama_server(python, file))
            contenders.append(Contender(name, None, url, random_weights))
            size = file.stat().st_size
            known[name] = {"engine": LLAMA, "engine_version": version, "disk_bytes": size}
        yield contenders, known


def version_of(package: str, python: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return found.stdout.strip()


# --------------------------------------------------------------------------- parts


def run_part(part: Part, work: Path, rounds: int, python: str | None) -> Results:
    """The results of a part with a random-weight shape."""
    models = random_models(work)
    contenders = [models[name] for name in part.models]
    dense = models["dense"].model
    assert dense is not None
    with ExitStack() as stack:
        if part.peers:
            contenders += graphs(work, models)
        servers: dict[str, dict[str, Any]] = {}  # what is known of those that run already
        if part.peers and not part.batches and python is not None:
            peers = llama_contenders(gguf(work, python, dense), python, random_weights=True)
            more, servers = stack.enter_context(peers)
            contenders += more
        settings: dict[str, Any] = {"contenders": tuple(contenders), "rounds": rounds}
        config = replace(BASE, **settings, **part.settings)
        if part.batches:
            return bench_offline(config, part.batches, show)
        results = bench(config, show)
    contenders_there = (replace(x, **servers.get(x.name, {})) for x in results.contenders)
    return replace(results, contenders=tuple(contenders_there))


def run_demo(work: Path, rounds: int) -> Results:
    """The embedded model, from pruning to serving."""
    pruned, packed = work / "demo-pruned", work / "demo-50"
    if not packed.exists():
        shutil.rmtree(pruned, ignore_errors=True)
        run_besa("prune", MODEL, "--seqlen", SEQLEN, "--out", pruned)
        run_besa("export", pruned, "--out", packed)
    config = replace(
        BASE,
        contenders=(Contender("dense", str(MODEL)), Contender("50%", str(packed))),
        loads=(ONE, FOUR),
        engine="vllm",
        rounds=rounds,
        requests=16,
        quality=True,
        windows=400,
    )
    return bench(config, show)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the models are made")
    parser.add_argument("--llama", metavar="PYTHON", help="one that has llama-cpp-python and gguf")
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, "demo"], default=[*PARTS, "demo"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "serving")
    parser.add_argument("--only-make", action="store_true", help="the models, nothing else")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no server stays
    if args.only_make:
        models = random_models(args.work)
        dense = models["dense"].model
        assert dense is not None
        graphs(args.work, models)
        if args.llama:
            gguf(args.work, args.llama, dense)
        return
    for name in args.parts:
        if name == "demo":
            results = run_demo(args.work, args.rounds)
        else:
            results = run_part(PARTS[name], args.work, args.rounds, args.llama)
        print_results(results, Console(width=160, highlight=False))
        write_json(args.out / f"{name}.json", results_json(results))


if __name__ == "__main__":
    main()
