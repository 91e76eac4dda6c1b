"""Serve a model behind an OpenAI-compatible API.

besa serve SPARSE
besa serve SPARSE --port 8001 --api-key KEY
besa serve SPARSE --max-model-len 2048 --enforce-eager
besa serve SPARSE --engine transformers

SPARSE is what `besa export` wrote; any other model is served as it is. vLLM serves it where it is
installed, else transformers; an ONNX model is served by ONNX Runtime GenAI. Flags after SPARSE that
are not below go to the engine as they are: `vllm serve --help=all` and `transformers serve --help`
list them. For several GPUs or machines, vLLM's --tensor-parallel-size, --pipeline-parallel-size and
--distributed-executor-backend; --dry-run prints what would be started, for a cluster's own way of
starting things.
"""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False  # an engine's flag may be the beginning of one of these
    parser.set_defaults(engine_args=())
    parser.add_argument("model", metavar="SPARSE", help="model directory or hub id")
    parser.add_argument(
        "--engine",
        help="vllm, transformers or onnx (default: onnx for an ONNX model, else vllm where it is "
        "installed)",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for all (default: %(default)s, this machine only)",
    )
    parser.add_argument(
        "--port", type=int, default=8000, help="0 for any that is free (default: %(default)s)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients have to show (default: BESA_API_KEY or VLLM_API_KEY of the "
        "environment, which others on this machine do not see)",
    )
    parser.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="what clients call the model (default: the name of its directory)",
    )
    parser.add_argument(
        "--shutdown-timeout",
        type=int,
        default=30,
        metavar="SECONDS",
        help="for requests to end after Ctrl-C or SIGTERM (default: %(default)s)",
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the engine's log, and what besa sets"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the engine's environment and command line, and end",
    )


def run(args: argparse.Namespace) -> int:
    from besa.serve.launch import dry_run, serve
    from besa.serve.settings import ServeConfig, key_from_environment

    config = ServeConfig(
        model=args.model,
        engine=args.engine,
        host=args.host,
        port=args.port,
        api_key=key_from_environment() if args.api_key is None else args.api_key,
        served_model_name=args.served_model_name,
        shutdown_timeout=args.shutdown_timeout,
        verbose=args.verbose,
        engine_args=tuple(args.engine_args),
    )
    if args.dry_run:
        print(dry_run(config))
        return 0
    return serve(config)
