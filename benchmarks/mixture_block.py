"""What a block of a large mixture takes to prune: its time, and the most memory.

    python benchmarks/mixture_block.py              # Qwen3-30B-A3B's, some 6 minutes, 16 GiB

Makes one layer of the shape with random weights, 128 experts in 604 million of them, and prunes it.
All layers are alike, so that the model takes as many times as long as it has layers. The weights
being random changes what is chosen, and not what it takes. Masks alone, without updates.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from common import (
    RESULTS,
    apart,
    besa_prune,
    conditions,
    random_shape,
    write_json,
    write_words,
)

from besa.model.prune_record import PruneRecord
from besa.model.record import read_record

METHODS = ("wanda", "besa")


def pruned(model: Path, out: Path, method: str, options: list[object]) -> dict[str, Any]:
    """Seconds of its block, and bytes of the whole run's peak."""
    run = besa_prune(model, out, "--method", method, "--update", "none", "--overwrite", *options)
    record = read_record(out)
    assert isinstance(record, PruneRecord)
    (block,) = record.blocks
    return {"block_seconds": block.seconds, "peak_rss": run.peak_rss}


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="qwen3-30b-a3b", help="as of `besa bench --shape`")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--work", type=Path, help="where the model goes, and is removed")
    parser.add_argument("--json", type=Path, default=RESULTS / "mixture-block.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        model, text = Path(folder, "model"), Path(folder, "words.txt")
        write_words(text)
        layers = apart(random_shape, model, args.shape, 1)
        options = ["--samples", args.samples, "--seqlen", args.seqlen, "--calibration", text]
        measured = {
            method: pruned(model, Path(folder, "pruned"), method, options) for method in METHODS
        }
    for method, one in measured.items():
        print(f"{method}: {one['block_seconds']:.0f} s, {one['peak_rss'] / 2**30:.1f} GiB")
    record = {
        "conditions": conditions(),
        "shape": args.shape,
        "layers": layers,
        "samples": args.samples,
        "seqlen": args.seqlen,
        "methods": measured,
    }
    write_json(args.json, record)


if __name__ == "__main__":
    main()
