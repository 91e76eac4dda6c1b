"""The process of `besa serve --engine onnx`: ONNX Runtime GenAI behind the API.

python -m besa.serve.engine onnx serve DIR --served-model-name tiny --port 8000
"""

from __future__ import annotations

from besa.serve.api import server
from besa.serve.cpu import threads
from besa.serve.onnx.generation import OnnxBackend


def run(arguments: list[str]) -> None:
    """Serves until a signal comes.

    Args:
        arguments: DIR, --served-model-name NAME, and flags.
    """
    parser = server.parser("onnx")
    parser.add_argument("--threads", type=int, help="default: one for each core")
    args = parser.parse_args(arguments)
    backend = OnnxBackend(args.directory, args.threads or threads(), args.trust_remote_code)
    try:
        server.run(backend, args)
    finally:
        backend.stop()
