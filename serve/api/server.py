"""The HTTP server of an engine's process: its flags, its log, and how it ends.

>>> args = parser("onnx").parse_args(["sparse", "--served-model-name", "tiny", "--enable-cors"])
>>> args.port, args.enable_cors, variables(args)
(8000, True, {})
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import uvicorn
from transformers import AutoTokenizer

from besa.errors import BesaError
from besa.model.json_files import read_object
from besa.serve.api.app import application
from besa.serve.api.backend import Backend
from besa.serve.api.chat import Chat
from besa.serve.api.metrics import Metrics
from besa.serve.api.service import Service, defaults_of

_LEVELS = ("critical", "error", "warning", "info", "debug")


def parser(engine: str) -> argparse.ArgumentParser:
    """The flags that every engine's server has."""
    made = argparse.ArgumentParser(prog=f"besa serve --engine {engine}", allow_abbrev=False)
    made.add_argument("directory", type=Path)
    made.add_argument("--served-model-name", required=True)
    made.add_argument("--host", default="127.0.0.1")
    made.add_argument("--port", type=int, default=8000)
    made.add_argument("--log-level", choices=_LEVELS, default="info")
    made.add_argument(
        "--enable-cors", action="store_true", help="let pages of other origins ask, in a browser"
    )
    made.add_argument(
        "--chat-template-kwargs", metavar="JSON", help="variables of the chat template"
    )
    made.add_argument(
        "--reasoning",
        choices=("on", "off", "auto"),
        default="auto",
        help="the chat template's enable_thinking (default: its own)",
    )
    made.add_argument("--trust-remote-code", action="store_true")
    return made


def variables(args: argparse.Namespace) -> dict[str, Any]:
    """What the chat template is given where a request does not say it.

    Raises:
        BesaError: --chat-template-kwargs is no JSON object.
    """
    try:
        found = json.loads(args.chat_template_kwargs or "{}")
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BesaError("--chat-template-kwargs is no JSON object")
    if args.reasoning != "auto":
        found["enable_thinking"] = args.reasoning == "on"
    return found


def run(backend: Backend, args: argparse.Namespace) -> None:
    """Serves until a signal comes, and what has begun has ended."""
    tokenizer = AutoTokenizer.from_pretrained(
        args.directory, trust_remote_code=args.trust_remote_code
    )
    config = args.directory / "config.json"
    described = read_object(config) if config.exists() else {}
    chat = Chat(tokenizer, described.get("model_type") or "", variables(args))
    name: str = args.served_model_name
    service = Service(backend, chat, name, defaults_of(args.directory), Metrics(name))
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    access = logging.getLogger("besa.serve.access")
    access.addHandler(handler)
    access.setLevel(args.log_level.upper())
    uvicorn.run(
        application(service, os.environ.get("BESA_API_KEY") or None, args.enable_cors),
        host=args.host,
        port=args.port,
        log_level=args.log_level,
        access_log=False,
        timeout_graceful_shutdown=int(os.environ.get("BESA_SHUTDOWN_TIMEOUT", "30")),
    )
