"""Pack a pruned model, so that its zeros take neither room nor time.

besa export PRUNED --out SPARSE
besa export PRUNED --out SPARSE --quantize int8 --group-size 128
besa export --format dense SPARSE --out DENSE
besa export --format onnx PRUNED --out ONNX
besa export --format onnx PRUNED --out ONNX --sparse --precision int8
besa export --format onnx PRUNED --out ONNX --sparse --device cuda
besa export PRUNED --plan

PRUNED is any Hugging Face directory with safetensors whose linears hold zeros, whoever pruned it.
SPARSE loads in vLLM and transformers wherever besa is installed. `--format dense` goes back, bit
for bit. ONNX is a graph for ONNX Runtime and ONNX Runtime GenAI: one that runs anywhere or, with
--sparse, one on packed weights. Graphs for NVIDIA GPUs (--device cuda) are untested on GPUs. An
interrupted run goes on when the same command is typed again. --plan says what a run would take of
memory, disk and time, and writes nothing.
"""

from __future__ import annotations

import argparse
import sys

from besa.cli.plan_flag import add_plan_flag, with_out
from besa.export.config import ExportConfig
from besa.settings import add_flags, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    add_flags(parser, ExportConfig)
    parser.add_argument("--verbose", action="store_true", help="show every linear")
    add_plan_flag(parser)


def run(args: argparse.Namespace) -> int:
    config = ExportConfig(**with_out(given(ExportConfig, args), args))
    if args.plan:
        from besa.cli.plans import print_export_plan
        from besa.planning.export import plan_export

        return print_export_plan(plan_export(args.model, config))

    from besa.cli.packing import print_export
    from besa.export import export
    from besa.progress import steps_for

    with steps_for(sys.stderr) as tell:
        result = export(args.model, config, tell)
    print_export(result.out, result.record, args.verbose)
    return 0
