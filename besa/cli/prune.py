"""Prune a model: a dense checkpoint with zeros, loadable everywhere.

besa prune MODEL --out PRUNED
besa prune MODEL --out PRUNED --sparsity 0.6 --calibration my-texts.jsonl
besa prune MODEL --out PRUNED --pattern 2:4 --method sparsegpt

MODEL is a Hugging Face directory with safetensors, or a hub id when online. An interrupted run
goes on when the same command is typed again.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory")
    parser.add_argument(
        "--method",
        default="besa",
        help="besa, wanda, sparsegpt or magnitude (default: %(default)s)",
    )
    parser.add_argument(
        "--sparsity", type=float, help="fraction of weights to prune (default: 0.5)"
    )
    parser.add_argument(
        "--pattern",
        default="unstructured",
        help="unstructured, or N:M: N of every M weights are kept (default: %(default)s)",
    )
    parser.add_argument(
        "--granularity",
        default="row",
        help="BESA learns a rate per row or per layer (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        default="builtin",
        metavar="TEXT",
        help=".txt, .jsonl or .parquet file, data set id, or builtin (default: %(default)s)",
    )
    parser.add_argument(
        "--samples", type=int, default=128, help="calibration samples (default: %(default)s)"
    )
    parser.add_argument(
        "--seqlen", type=int, help="tokens in a sample (default: 2048, or the model's most)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="BESA's passes over the samples (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="of the computation: auto, float32, bfloat16, float16 (default: %(default)s)",
    )
    parser.add_argument("--include", metavar="REGEX", help="prune only linears so named")
    parser.add_argument("--exclude", metavar="REGEX", help="leave linears so named dense")
    parser.add_argument(
        "--activations",
        default="host",
        help="keep the calibration stream in host memory or on disk (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    from besa.pruning.config import PruneConfig

    options = {k: v for k, v in vars(args).items() if k not in ("model", "command", "run")}
    config = PruneConfig(**options)

    from besa.progress import duration, progress_for
    from besa.pruning.pipeline import prune

    with progress_for(sys.stderr) as tell:
        result = prune(args.model, config, tell)
    record = result.record
    print(
        f"{result.out}: {record['sparsity']['zeros']:,} of {record['sparsity']['weights']:,} "
        f"weights pruned ({result.sparsity:.4%}) in {duration(record['seconds'])}; "
        f"see {result.out}/report.html"
    )
    for note in record["notes"]:
        print(note)
    return 0
