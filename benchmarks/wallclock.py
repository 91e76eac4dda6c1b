"""How long `besa prune` takes with BESA, against Wanda: whole runs, as a user starts them.

    python benchmarks/wallclock.py                          # the built-in model, and a wider one
    python benchmarks/wallclock.py --model path/to/model    # that model instead of the built-in

Both methods run on the same model and the same calibration samples, as processes of their own, in
turns. Wall clock counts from the start of the process to its end; the seconds that the run itself
reports leave out Python's start and the imports. The ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
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
    gain,
    random_llama,
    spread,
    table,
    write_json,
    write_words,
)

from besa.model.prune_record import PruneRecord
from besa.model.record import read_record

METHODS = ("wanda", "besa")
MASKS_ALONE = ("--update", "none", "--overwrite")
MOST_RATIO = 4.0
BUILT_IN = ROOT / "besa" / "demo" / "model"


def compare(model: Path, out: Path, rounds: int, options: list[object]) -> dict[str, Any]:
    """Wall clock and reported seconds of both methods, and BESA's as multiples of Wanda's."""
    clock: dict[str, list[float]] = {method: [] for method in METHODS}
    reported: dict[str, list[float]] = {method: [] for method in METHODS}
    settings: dict[str, Any] = {}
    for _ in range(rounds):
        for method in METHODS:
            run = besa_prune(model, out, "--method", method, *MASKS_ALONE, *options)
            record = read_record(out)
            assert isinstance(record, PruneRecord)
            clock[method].append(run.seconds)
            reported[method].append(record.seconds)
            settings = record.settings
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
    return spread([b / w for w, b in zip(wanda, besa, strict=True)])


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=BUILT_IN)
    parser.add_argument("--samples", type=int, default=128, help="for the model")
    parser.add_argument("--shape", default="tinyllama", choices=SHAPES, help="of the random one")
    parser.add_argument("--layers", type=int, default=1, help="of the random one")
    parser.add_argument("--random-samples", type=int, default=8)
    parser.add_argument("--random-seqlen", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "wallclock.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.rounds, args.samples = "tiny", 1, 2
        args.random_samples, args.random_seqlen = 2, 16

    results: dict[str, Any] = {}

    def add(name: str, model: Path, options: list[object]) -> None:
        results[name] = compare(model, out, args.rounds, options)
        print(table(HEADER, [_row(name, result) for name, result in results.items()]))
        found = {"conditions": conditions(), "most_ratio": MOST_RATIO, "models": results}
        write_json(args.json, found)

    with tempfile.TemporaryDirectory() as folder:
        out, random, text = Path(folder, "pruned"), Path(folder, "random"), Path(folder, "w.txt")
        write_words(text)
        apart(random_llama, random, SHAPES[args.shape], args.layers)
        if not args.tiny:
            name = "built-in" if args.model == BUILT_IN else args.model.name
            add(name, args.model, ["--samples", args.samples])
        options = ["--samples", args.random_samples, "--seqlen", args.random_seqlen]
        blocks = "1 block" if args.layers == 1 else f"{args.layers} blocks"
        name = f"random {args.shape}, {blocks}"
        add(name, random, [*options, "--calibration", text])


HEADER = ["model", "Wanda s", "BESA s", "ratio", "without start"]


def _row(name: str, result: dict[str, Any]) -> list[str]:
    return [
        name,
        *(f"{result['wall_clock_seconds'][method]['median']:.1f}" for method in METHODS),
        gain(result["ratio"]),
        gain(result["ratio_without_start"]),
    ]


if __name__ == "__main__":
    main()
