"""Serve a model behind an OpenAI-compatible API.

besa serve SPARSE
besa serve SPARSE --port 8001 --api-key KEY
besa serve SPARSE --max-model-len 2048 --enforce-eager
besa serve SPARSE --engine transformers
besa serve SPARSE --plan

SPARSE is what `besa export` wrote; any other model is served as it is. vLLM serves it where it is
installed, else transformers; an ONNX model is served by ONNX Runtime GenAI. Flags after SPARSE that
are not below go to the engine as they are: `vllm serve --help=all` lists vLLM's, docs/serve.md
those of the others. For several GPUs or machines, vLLM's --tensor-parallel-size,
--pipeline-parallel-size and --distributed-executor-backend; --dry-run prints what would be started,
for a cluster's own way of starting things. --plan says what the server would take of memory.
"""

from __future__ import annotations

import argparse

from besa.cli.plan_flag import add_plan_flag
from besa.serve.settings import ServeConfig, key_from_environment
from besa.settings import add_flags, given


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # an engine's flag may be the beginning of one of these
    parser.set_defaults(engine_flags=[])
    parser.add_argument("model", metavar="SPARSE", help="model directory or hub id")
    add_flags(parser, ServeConfig)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the engine's environment and command line, and end",
    )
    add_plan_flag(parser)


def run(args: argparse.Namespace) -> int:
    asked = {"api_key": key_from_environment(), **given(ServeConfig, args)}
    config = ServeConfig(args.model, engine_args=tuple(args.engine_flags), **asked)
    if args.plan:
        from besa.cli.plans import print_serve_plan
        from besa.planning.serve import plan_serve

        return print_serve_plan(plan_serve(config))

    from besa.serve.launch import dry_run, serve

    if args.dry_run:
        print(dry_run(config))
        return 0
    return serve(config)
