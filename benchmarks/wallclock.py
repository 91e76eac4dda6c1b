"""How long `besa prune` takes with BESA, against Wanda: whole runs, as a user starts them.

    python benchmarks/wallclock.py                          # the built-in model, and a wider one
    python benchmarks/wallclock.py --model path/to/model    # that model instead of the built-in

Both methods run on the same model and the same calibration samples, as processes of their own, in
turns. Wall clock counts from the start of the process to its end; the seconds that the run itself
reports leave out Python's start and the imports. The ratio is that of the medians; its spread is
that of the single rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    ROOT,
    SHAPES,
    apart,
    besa_prune,
    conditions,
    random_llama,
    spread,
    table,
    write_json,
    write_words,
)

METHODS = ("wanda", "besa")
MOST_RATIO = 4.0


def compare(model: Path, out: Path, rounds: int, options: list[object]) -> dict[str, Any]:
    """Wall clock and reported seconds of both methods, and BESA's as multiples of Wanda's."""
    clock: dict[str, list[float]] = {method: [] for method in METHODS}
    reported: dict[str, list[float]] = {method: [] for method in METHODS}
    settings: dict[str, Any] = {}
    for _ in range(rounds):
        for method in METHODS:
            run = besa_prune(model, out, "--method", method, "--overwrite", *options)
            record = json.loads((out / "besa.json").read_text())
            clock[method].append(run.seconds)
            reported[method].append(record["seconds"])
            settings = record["settings"]
    told = ("samples", "seqlen", "epochs", "sparsity", "granularity", "dtype", "threads")
    return {
        "settings": {name: settings[name] for name in told if name in settings},
        "wall_clock_seconds": {method: spread(clock[method]) for method in METHODS},
        "reported_seconds": {method: spread(reported[method]) for method in METHODS},
        "ratio": _ratio(clock),
        "ratio_without_start": _ratio(reported),
    }


def _ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    wanda, besa = (seconds[method] for method in METHODS)
    rounds = [b / w for w, b in zip(wanda, besa, strict=True)]
    return {**spread(rounds), "of_medians": statistics.median(besa) / statistics.median(wanda)}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "besa" / "demo" / "model")
    parser.add_argument("--samples", type=int, default=128, help="for the model")
    parser.add_argument("--shape", default="tinyllama", choices=SHAPES, help="of the random one")
    parser.add_argument("--layers", type=int, default=2, help="of the random one")
    parser.add_argument("--random-samples", type=int, default=16)
    parser.add_argument("--random-seqlen", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "wallclock.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.rounds, args.samples = "tiny", 1, 2
        args.random_samples, args.random_seqlen = 2, 16

    results = {}
    with tempfile.TemporaryDirectory() as folder:
        out, model, text = Path(folder, "pruned"), Path(folder, "random"), Path(folder, "w.txt")
        if not args.tiny:
            results[args.model.name if args.model.name != "model" else "built-in"] = compare(
                args.model, out, args.rounds, ["--samples", args.samples]
            )
        apart(random_llama, model, SHAPES[args.shape], args.layers)
        write_words(text)
        options = ["--samples", args.random_samples, "--seqlen", args.random_seqlen]
        results[f"random {args.shape}, {args.layers} blocks"] = compare(
            model, out, args.rounds, [*options, "--calibration", text]
        )
    rows = [
        [
            name,
            *(f"{result['wall_clock_seconds'][method]['median']:.1f}" for method in METHODS),
            f"{result['ratio']['of_medians']:.2f}×",
            f"{result['ratio']['min']:.2f}–{result['ratio']['max']:.2f}",
            f"{result['ratio_without_start']['of_medians']:.2f}×",
        ]
        for name, result in results.items()
    ]
    header = ["model", "Wanda s", "BESA s", "ratio", "by round", "without start"]
    print(table(header, rows))
    write_json(args.json, {"conditions": conditions(), "most_ratio": MOST_RATIO, "models": results})


if __name__ == "__main__":
    main()
