"""What `besa serve` was asked for: `ServeConfig`, checked once.

>>> config = ServeConfig("path/to/sparse", port=8001, engine_args=("--max-model-len", "2048"))
>>> config.url
'http://127.0.0.1:8001'
>>> flag_value(config.engine_args, "--max-model-len")
'2048'
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path

from besa.errors import BesaError
from besa.serve.engines import ENGINES
from besa.settings import described, either, setting

# Where an API key may be given, the first that is set; see `Engine.key_variable`, too.
KEY_VARIABLES = ("BESA_API_KEY", "VLLM_API_KEY")


@dataclass(frozen=True)
class ServeConfig:
    """A server to start.

    Attributes:
        model: directory, or id of a model on the hub.
        engine_args: further flags, for the engine, as they are.

    Raises:
        BesaError: a value that cannot be.
    """

    model: str
    engine: str | None = setting(
        None,
        f"{either(tuple(ENGINES))} (default: onnx for an ONNX model, else vllm where it is "
        "installed)",
    )
    host: str = setting(
        "127.0.0.1",
        "address to listen on; 0.0.0.0 for all (default: %(default)s, this machine only)",
    )
    port: int = setting(8000, "0 for any that is free (default: %(default)s)")
    api_key: str | None = field(
        default=None,
        repr=False,
        metadata=described(
            "what clients have to show (default: BESA_API_KEY or VLLM_API_KEY of the environment, "
            "which others on this machine do not see)",
            metavar="KEY",
        ),
    )
    served_model_name: str | None = setting(
        None, "what clients call the model (default: the name of its directory)", metavar="NAME"
    )
    shutdown_timeout: int = setting(
        30,
        "for requests to end after Ctrl-C or SIGTERM (default: %(default)s)",
        metavar="SECONDS",
    )
    verify: bool = setting(
        False, "first compare every file with the digests of besa.json, which reads all of it"
    )
    verbose: bool = setting(False, "show the engine's log, and what besa sets")
    engine_args: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in (None, *ENGINES):
            raise BesaError(f"--engine {self.engine} is none of {', '.join(ENGINES)}")
        if not 0 <= self.port <= 65535:
            raise BesaError(f"--port {self.port} is not from 0 to 65535")
        if not self.host:
            raise BesaError("--host is empty: 127.0.0.1 is this machine, 0.0.0.0 all addresses")
        if self.shutdown_timeout < 0:
            raise BesaError(f"--shutdown-timeout {self.shutdown_timeout} is negative")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise BesaError("--served-model-name is empty")
        # Anything else could not be sent in a header.
        if self.api_key is not None and not (
            self.api_key.isascii() and self.api_key.isprintable() and self.api_key.split()
        ):
            raise BesaError("the API key is empty, or has characters that no header can carry")

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or Path(self.model).resolve().name or self.model

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> str:
        """Where a client on this machine finds it."""
        everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
        return everywhere.get(self.host, self.host)

    @property
    def url(self) -> str:
        """The same as a URL, without a path."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{'https' if self.encrypted else 'http'}://{host}:{self.port}"

    @property
    def encrypted(self) -> bool:
        """Whether the engine was given a certificate."""
        return flag_value(self.engine_args, "--ssl-certfile") is not None


def key_from_environment() -> str | None:
    """The API key that the environment holds, besa's own before vLLM's."""
    return next(filter(None, map(os.environ.get, KEY_VARIABLES)), None)


def flag_value(arguments: tuple[str, ...], *names: str) -> str | None:
    """What follows one of the flags `names`, or its `=`; "" where nothing does, None without it.

    As in vLLM, `--max_model_len` is `--max-model-len`, and the last one counts.
    """
    found = None
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("-") and name.replace("_", "-") in names:
            following = arguments[position + 1 : position + 2]
            found = value if equals else (following[0] if following else "")
    return found
