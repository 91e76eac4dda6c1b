"""How much faster `besa prune` is with several processes, one thread each.

    python benchmarks/ranks.py                      # 1 and 2 processes, three rounds in turns
    python benchmarks/ranks.py --processes 1 2 4    # on a machine with four cores or more

Each run prunes a random Llama as a user does it, by torchrun where there are several processes.
Seconds a block are wall clock, as besa.json has them, from the second block on. Processor time is
that of all processes together: runs of two models are subtracted, of which one has but a block, so
that Python's start and the imports fall out; divided by the number of processes it says how long a
block would take where each had a core to itself. The ratios are medians of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
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

# What two processes are to reach.
LEAST_GAIN = 1.8


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        processor: seconds of processor time of all its processes.
        blocks: wall-clock seconds of each block.
    """

    processor: float
    blocks: list[float]
    settings: dict[str, Any]


def prune(model: Path, out: Path, processes: int, options: list[object]) -> Run:
    """Prunes a model by so many processes of one thread."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    launcher = torchrun if processes > 1 else []
    options = [*options, "--overwrite", "--device", "cpu"]
    found = besa_prune(model, out, *options, launcher=launcher, OMP_NUM_THREADS="1")
    record = read_record(out)
    assert isinstance(record, PruneRecord)
    assert record.processes == processes
    seconds = [block.seconds for block in record.blocks]
    return Run(found.processor, seconds, record.settings)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--shape", default="small", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--step-samples", type=int, default=8)
    parser.add_argument("--method", default="besa")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULTS / "ranks.json")
    parser.add_argument("--tiny", action="store_true", help="a quick look that it runs")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.layers, args.samples, args.seqlen, args.rounds = "tiny", 2, 16, 16, 1

    wall: dict[int, list[float]] = {count: [] for count in args.processes}
    processor: dict[int, list[float]] = {count: [] for count in args.processes}
    settings: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        text, out = Path(folder, "words.txt"), Path(folder, "pruned")
        write_words(text)
        models = {layers: Path(folder, str(layers)) for layers in (1, args.layers)}
        for layers, model in models.items():
            apart(random_llama, model, SHAPES[args.shape], layers)
        options = ["--samples", args.samples, "--seqlen", args.seqlen, "--calibration", text]
        options += ["--step-samples", args.step_samples, "--method", args.method]
        for _ in range(args.rounds):
            for count in args.processes:
                few, many = (prune(model, out, count, options) for model in models.values())
                wall[count].append(statistics.mean(many.blocks[1:]))
                added = (many.processor - few.processor) / (args.layers - 1)
                processor[count].append(added / count)
                settings = many.settings

    one = args.processes[0]
    results: dict[str, Any] = {}
    for count in args.processes:
        results[str(count)] = {
            "seconds_per_block": spread(wall[count]),
            "processor_seconds_per_block_and_process": spread(processor[count]),
            "gain": spread([a / b for a, b in zip(wall[one], wall[count], strict=True)]),
            "gain_in_processor_time": spread(
                [a / b for a, b in zip(processor[one], processor[count], strict=True)]
            ),
        }
    rows = [
        [
            count,
            f"{result['seconds_per_block']['median']:.2f}",
            gain(result["gain"]) if count != str(one) else "",
            f"{result['processor_seconds_per_block_and_process']['median']:.2f}",
            gain(result["gain_in_processor_time"]) if count != str(one) else "",
        ]
        for count, result in results.items()
    ]
    header = ["processes", "s a block", "gain", "processor s a block, each", "gain"]
    print(table(header, rows))
    told = ("method", "update", "samples", "seqlen", "step_samples", "sparsity", "dtype")
    found = {
        "conditions": {**conditions(), "threads": 1, "load": os.getloadavg()},
        "shape": vars(SHAPES[args.shape]),
        "layers": args.layers,
        "settings": {name: settings[name] for name in told},
        "least_gain": LEAST_GAIN,
        "processes": results,
    }
    write_json(args.json, found)


if __name__ == "__main__":
    main()
