"""The peak memory of `besa prune` does not grow with the number of layers.

    python benchmarks/memory.py

Prunes random-weight Llamas of the same width and of 8 and 32 layers, each run a process of its
own, and compares the most resident memory that the system saw in them. The embedding is held
whatever the depth; it is taken off before the growth is figured. Since importing torch and
transformers makes up most of so small a run, the growth is also given beyond what the imports
alone hold, and as a share of the weights that the deeper model has more: 0% says that no layer's
weights stay in memory, 100% that all do.

    python benchmarks/memory.py --experts 64 --layers 2 6 --json memory-64-experts.json

does the same with mixtures of 64 experts, each of an eighth of the width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    SHAPES,
    apart,
    besa_prune,
    conditions,
    random_llama,
    random_mixture,
    run_measured,
    spread,
    table,
    write_json,
    write_words,
)

# The most by which the deeper model's peak may be above the other's.
MOST_GROWTH = 0.10

IMPORTS = "import besa.cli, besa.pruning.run, transformers.models.llama.modeling_llama"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 32], metavar=("FEW", "MANY"))
    parser.add_argument("--experts", type=int, help="mixtures of so many instead of Llamas")
    parser.add_argument("--methods", nargs="+", default=["wanda", "besa"])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--json", type=Path, default=RESULTS / "memory.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.layers, args.rounds, args.seqlen = "tiny", [1, 2], 1, 16
    shape, (few, many) = SHAPES[args.shape], args.layers

    peaks: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "words.txt")
        write_words(text)
        for layers in (few, many):
            make = (random_mixture, args.experts) if args.experts else (random_llama,)
            apart(*make, Path(folder, f"{layers}"), shape, layers, args.vocab)
        imports = run_measured([sys.executable, "-c", IMPORTS]).peak_rss
        settings = ("--samples", args.samples, "--seqlen", args.seqlen, "--calibration", text)
        settings += ("--update", "none")  # the masks alone
        for _ in range(args.rounds):
            for method in args.methods:
                for layers in (few, many):
                    out = Path(folder, "pruned")
                    run = besa_prune(
                        Path(folder, f"{layers}"), out, "--method", method, *settings, "--overwrite"
                    )
                    peaks.setdefault((method, layers), []).append(run.peak_rss)
        block = _block_bytes(Path(folder, f"{many}"), Path(folder, f"{few}"), many - few)

    embedding = args.vocab * shape.hidden * 2
    results: dict[str, Any] = {}
    for method in args.methods:
        low, high = (statistics.median(peaks[method, layers]) for layers in (few, many))
        results[method] = {
            "peak_rss": {f"{n} layers": spread(peaks[method, n]) for n in (few, many)},
            "growth": (high - low) / (low - embedding),
            "growth_beyond_imports": (high - low) / max(1, low - embedding - imports),
            "growth_of_added_weights": (high - low) / ((many - few) * block),
        }
    rows = [
        [
            method,
            *(f"{one['median'] / 2**20:.0f}" for one in result["peak_rss"].values()),
            f"{result['growth']:+.1%}",
            f"{result['growth_beyond_imports']:+.1%}",
            f"{result['growth_of_added_weights']:+.1%}",
        ]
        for method, result in results.items()
    ]
    header = ["method", f"MiB at {few}", f"MiB at {many}", "growth"]
    print(table([*header, "beyond imports", "of the added weights"], rows))
    write_json(
        args.json,
        {
            "conditions": conditions(),
            "model": {
                **vars(shape),
                "vocab": args.vocab,
                "dtype": "bfloat16",
                "layers": [few, many],
                "experts": args.experts,
            },
            "samples": args.samples,
            "seqlen": args.seqlen,
            "imports_rss": imports,
            "embedding_bytes": embedding,
            "block_bytes": block,
            "most_growth": MOST_GROWTH,
            "methods": results,
        },
    )
    grown = [method for method, result in results.items() if result["growth"] >= MOST_GROWTH]
    if grown and not args.tiny:
        raise SystemExit(f"{', '.join(grown)}: the peak grows by {MOST_GROWTH:.0%} or more")


def _block_bytes(deep: Path, shallow: Path, layers: int) -> int:
    """The stored size of one block, from two checkpoints that differ by `layers`."""
    sizes = [
        sum(file.stat().st_size for file in model.glob("*.safetensors"))
        for model in (deep, shallow)
    ]
    return (sizes[0] - sizes[1]) // layers


if __name__ == "__main__":
    main()
