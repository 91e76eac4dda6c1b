"""transformers, which serves everywhere: its models behind besa's API.

>>> engine = TransformersEngine()
>>> engine.launch(ServeConfig("path/to/sparse"), Path("path/to/sparse")).flags[-2:]
('--log-level', 'error')

Its server is in besa.serve.transformers.server.
"""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import Any

from besa.machine import has_nvidia_gpu
from besa.serve.engines import Engine, Generated, Launch, OfflineModel, need
from besa.serve.settings import ServeConfig


class TransformersEngine(Engine):
    """besa's server on transformers."""

    name = "transformers"

    def version(self) -> str:
        return importlib.metadata.version("transformers")

    def check(self) -> None:
        need("transformers", ("fastapi", "llguidance", "prometheus_client", "uvicorn"), "serve")

    def launch(self, config: ServeConfig, directory: Path) -> Launch:  # noqa: ARG002
        flags = [] if has_nvidia_gpu() else ["--continuous-batching"]
        if not config.verbose:
            flags += ["--log-level", "error"]
        return Launch(tuple(flags))

    def run(self, arguments: list[str]) -> None:
        from besa.serve.transformers.server import run

        run(arguments)

    def load_offline(self, directory: str, most: int, longest: int) -> OfflineModel:  # noqa: ARG002
        import torch

        from besa.model.loading import whole_model

        torch.set_grad_enabled(False)
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
        model = whole_model(Path(directory), trust_remote_code=False, dtype="auto")
        model.to(device).eval()
        return OfflineModel(
            model.config.get_text_config().vocab_size,
            lambda prompts, length: _generate(model, prompts, length),
        )


def _generate(model: Any, prompts: list[list[int]], length: int) -> Generated:
    """The plain model and its cache, called once for each token."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    tokens, seconds, new = torch.tensor(prompts, device=model.device), [], []
    for _ in range(length + 1):
        started = time.perf_counter()
        logits = model(tokens, past_key_values=cache, logits_to_keep=1).logits
        tokens = logits.argmax(-1)
        new.append(int(tokens[-1, 0]))  # waits for the device
        seconds.append(time.perf_counter() - started)
    return Generated(seconds[0], seconds[1:], new)
