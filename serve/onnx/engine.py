"""ONNX Runtime GenAI, for the graphs that `besa export --format onnx` writes.

>>> engine = OnnxEngine()
>>> engine.launch(ServeConfig("path/to/onnx"), Path("path/to/onnx")).flags
('--log-level', 'error')

Its server is besa's own: besa.serve.onnx.server, and the generation behind it
besa.serve.onnx.generation.
"""

from __future__ import annotations

import importlib.util
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from besa.export.onnx.runtime import distribution
from besa.serve.cpu import threads
from besa.serve.engines import Engine, Generated, Launch, OfflineModel, need
from besa.serve.onnx.description import described_by
from besa.serve.settings import ServeConfig


class OnnxEngine(Engine):
    """besa's server on ONNX Runtime GenAI."""

    name = "onnx"
    reads_onnx = True

    def version(self) -> str | None:
        installed = importlib.util.find_spec("onnxruntime_genai") is not None
        package = distribution("onnxruntime_genai") if installed else None
        return None if package is None else version(package)

    def check(self) -> None:
        server = ("fastapi", "llguidance", "prometheus_client", "uvicorn")
        need("ONNX Runtime", (*server, "onnx", "onnxruntime", "onnxruntime_genai"), "onnx,serve")

    def launch(self, config: ServeConfig, directory: Path) -> Launch:  # noqa: ARG002
        return Launch(() if config.verbose else ("--log-level", "error"))

    def run(self, arguments: list[str]) -> None:
        from besa.serve.onnx.server import run

        run(arguments)

    def load_offline(self, directory: str, most: int, longest: int) -> OfflineModel:  # noqa: ARG002
        import onnxruntime_genai

        described = described_by(Path(directory))
        model = onnxruntime_genai.Model(genai_config(onnxruntime_genai, directory, threads()))
        return OfflineModel(
            int(described["model"]["vocab_size"]),
            lambda prompts, length: _generate(onnxruntime_genai, model, prompts, length),
        )


def genai_config(genai: Any, directory: str, threads: int) -> Any:
    """GenAI's configuration of a model, with the number of threads.

    By itself GenAI takes half of what the machine has, be they cores or not.
    """
    config = genai.Config(directory)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    return config


def _generate(genai: Any, model: Any, prompts: list[list[int]], length: int) -> Generated:
    """A batch in GenAI's own generator, token by token."""
    parameters = genai.GeneratorParams(model)
    total = len(prompts[0]) + length + 1
    parameters.set_search_options(
        batch_size=len(prompts), max_length=total, min_length=total, do_sample=False
    )
    generator = genai.Generator(model, parameters)
    started = time.perf_counter()
    generator.append_tokens(prompts)
    generator.generate_next_token()
    prefill = time.perf_counter() - started
    steps = []
    for _ in range(length):
        started = time.perf_counter()
        generator.generate_next_token()
        steps.append(time.perf_counter() - started)
    new = list(generator.get_sequence(len(prompts) - 1))[len(prompts[0]) :]
    return Generated(prefill, steps, list(map(int, new)))
