"""Prune a model: a dense checkpoint with zeros, loadable everywhere.

besa prune MODEL --out PRUNED
besa prune MODEL --out PRUNED --sparsity 0.6 --calibration my-texts.jsonl
besa prune MODEL --out PRUNED --pattern 2:4 --effort high
besa prune MODEL --out PRUNED --quantize int4:64
besa prune MODEL --plan

MODEL is a Hugging Face directory with safetensors, or a hub id when online. An interrupted run
goes on when the same command is typed again. --plan says what a run would take of memory, disk and
time, and writes nothing. Several processes share the samples:

torchrun --nproc-per-node 2 -m besa prune MODEL --out PRUNED
"""

from __future__ import annotations

import argparse
import sys

from besa.cli.plan_flag import add_plan_flag, with_out
from besa.errors import BesaError
from besa.processes.launch import launch_of
from besa.pruning.config import PruneConfig
from besa.settings import add_flags, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    add_flags(parser, PruneConfig)
    add_plan_flag(parser)


def run(args: argparse.Namespace) -> int:
    config = PruneConfig(**with_out(given(PruneConfig, args), args))
    if args.plan:
        if launch_of().size > 1:
            raise BesaError("--plan is for one process: start it without torchrun")
        from besa.cli.plans import print_prune_plan
        from besa.planning import plan_prune

        return print_prune_plan(plan_prune(args.model, config))

    from besa.progress import duration, progress_for
    from besa.pruning.run import prune

    with progress_for(sys.stderr) as tell:
        result = prune(args.model, config, tell)
    if not launch_of().leads:
        return 0
    record = result.record
    print(
        f"{result.out}: {record.sparsity.zeros:,} of {record.sparsity.weights:,} "
        f"weights pruned ({result.sparsity:.4%}) in {duration(record.seconds)}; "
        f"see {result.out}/report.html"
    )
    for note in record.notes:
        print(note)
    return 0
