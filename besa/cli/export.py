"""Pack a pruned model, so that its zeros take neither room nor time.

besa export PRUNED --out SPARSE
besa export PRUNED --out SPARSE --quantize int8 --group-size 128
besa export --format dense SPARSE --out DENSE
besa export --format onnx PRUNED --out ONNX
besa export --format onnx PRUNED --out ONNX --sparse --precision int8

PRUNED is any Hugging Face directory with safetensors whose linears hold zeros, whoever pruned it.
SPARSE loads in vLLM and transformers wherever besa is installed. `--format dense` goes back, bit
for bit. ONNX is a graph for ONNX Runtime and ONNX Runtime GenAI: one that runs anywhere or, with
--sparse, one on packed weights. An interrupted run goes on when the same command is typed again.
"""

from __future__ import annotations

import argparse
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model directory or hub id")
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory")
    parser.add_argument(
        "--format",
        default="vllm",
        help="vllm packs, dense unpacks what was packed, onnx makes a graph (default: %(default)s)",
    )
    parser.add_argument("--quantize", help="int8: round what is kept to 8 bits")
    parser.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="for int8: 32, 64 or 128 columns share a scale (default: a whole row)",
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="onnx: packed weights, by besa's operator (default: dense ones)",
    )
    parser.add_argument(
        "--precision",
        help="onnx: fp32 (the default), fp16 (for GPUs), int8 or int4; with --sparse bf16, fp16, "
        "fp32 or int8 (default: as stored)",
    )
    parser.add_argument(
        "--onnx-graph",
        default="genai",
        metavar="KIND",
        help="onnx: genai for fused operators, standard for those of ONNX alone (default: "
        "%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--verbose", action="store_true", help="show every linear")


def run(args: argparse.Namespace) -> int:
    from besa.export import ExportConfig, export

    config = ExportConfig(
        out=args.out,
        format=args.format,
        quantize=args.quantize,
        group_size=args.group_size,
        sparse=args.sparse,
        precision=args.precision,
        onnx_graph=args.onnx_graph,
        overwrite=args.overwrite,
    )

    from besa.cli.packing import print_graph, print_packed, print_unpacked
    from besa.progress import steps_for

    with steps_for(sys.stderr) as tell:
        result = export(args.model, config, tell)
    if config.format == "dense":
        print_unpacked(result.out, result.record)
    elif config.format == "onnx":
        print_graph(result.out, result.record)
    else:
        print_packed(result.out, result.record, args.verbose)
    return 0
