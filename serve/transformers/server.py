"""`transformers serve`, with what a client of an OpenAI-compatible server counts on.

    python -m besa.serve.engine transformers serve DIR --served-model-name tiny --port 8000

The server and all of its flags are transformers' own: completions and chat completions, streamed or
not. It looks its parts up by name when it starts, and besa puts its own in
the place of six of them:

- one model, from a directory, under a name that is no path (`/v1/models` lists it and it alone);
- API keys, closed connections, closed endpoints (besa.serve.middleware);
- requests batched on a CPU; stop strings cut off, prompts that do not fit refused, sampling as each
  request asks, cancelled requests ended (besa.serve.transformers.generation);
- a limit of time for requests that have begun, once the server is told to stop;
- bad requests answered with status 400 in OpenAI's words, streams ended with `[DONE]`, fields that
  would have been ignored (`n`, `logprobs`, …) refused, and `ignore_eos` heeded, which load
  generators ask for (besa.serve.transformers.handlers).

Not there: `/metrics`, `/v1/responses`, log probabilities, more than one choice, structured output.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import typer
import uvicorn
from transformers import AutoTokenizer
from transformers.cli import serve as command
from transformers.cli.serving import chat_completion, completion, model_manager, server, utils

from besa.errors import BesaError
from besa.model.architecture import loader_of, read_config
from besa.serve.middleware import Middleware
from besa.serve.requests import answer_errors
from besa.serve.transformers.engine import SERVER_VERSIONS
from besa.serve.transformers.generation import Generation
from besa.serve.transformers.handlers import ChatRequests, CompletionRequests


def run(arguments: list[str]) -> None:
    """Serves until a signal comes.

    Args:
        arguments: DIR, --served-model-name NAME, and transformers' flags.
    """
    parser = argparse.ArgumentParser(prog="transformers serve", add_help=False, allow_abbrev=False)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--served-model-name", required=True)
    args, flags = parser.parse_known_args(arguments)

    name: str = args.served_model_name
    key = os.environ.get("BESA_API_KEY") or None
    drain_seconds = int(os.environ.get("BESA_SHUTDOWN_TIMEOUT", "30"))
    _replace(name, args.directory, key, drain_seconds)
    _quiet_access_log()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command.Serve)
    try:
        # After `--`, as a name may begin with a dash.
        typer.main.get_command(app).main(
            [*flags, "--", name], prog_name="transformers serve", standalone_mode=False
        )
    except Exception as error:
        if (usage_error := getattr(error, "format_message", None)) is None:
            raise
        print(f"error: {usage_error()}", file=sys.stderr)
        sys.exit(2)


def _replace(name: str, directory: Path, key: str | None, drain_seconds: int) -> None:
    """Puts besa's parts in the place of transformers', for this process."""
    build_server = server.build_server

    def build(*args: Any, **kwargs: Any) -> Middleware:
        app = build_server(*args, **kwargs)
        answer_errors(app)
        return Middleware(app, key, name)

    class OneModel(model_manager.ModelManager):  # type: ignore[misc]
        """Loads the model that is served, under any name."""

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return model_id

        def _load_processor(self, *_: Any, **__: Any) -> Any:
            return AutoTokenizer.from_pretrained(
                directory, trust_remote_code=self.trust_remote_code
            )

        def _load_model(self, *_: Any, **__: Any) -> Any:
            quantization = self.get_quantization_config()  # None would mean not even packed
            config = read_config(directory, self.trust_remote_code)
            model, found = loader_of(config, self.trust_remote_code).from_pretrained(
                directory,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **({} if quantization is None else {"quantization_config": quantization}),
            )
            if missing := sorted(found["missing_keys"]):
                raise BesaError(f"{directory} lacks {len(missing)} weights, as {missing[0]}")
            return model.to(_device(self.device)).eval()

    for module, part, replacement in (
        (server, "build_server", build),
        (model_manager, "ModelManager", OneModel),
        (completion, "CompletionHandler", CompletionRequests),
        (chat_completion, "ChatCompletionHandler", ChatRequests),
        (utils, "GenerationState", Generation),
        (uvicorn, "Config", partial(uvicorn.Config, timeout_graceful_shutdown=drain_seconds)),
    ):
        if not hasattr(module, part):
            raise BesaError(
                f"{module.__name__}.{part} is gone: install transformers {SERVER_VERSIONS}"
            )
        setattr(module, part, replacement)


def _device(asked: str | int) -> torch.device:
    if asked != "auto":
        return torch.device(asked)
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def _quiet_access_log() -> None:
    """Keeps the lines of single requests out of the log, which is for problems."""
    logging.getLogger("uvicorn.access").addFilter(lambda _: False)
    logging.getLogger("uvicorn.error").addFilter(lambda record: record.levelno > logging.INFO)
