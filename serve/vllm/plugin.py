"""vLLM serves packed checkpoints: what its entry point `vllm.general_plugins` calls.

    pip install besa[vllm]
    vllm serve SPARSE          # nothing to import, no flag

vLLM calls `register` once or more in each of its processes, whatever the model. It makes the
quantization method "besa" known (see besa.serve.vllm.config for the rest). On CPUs it asks Linux
for AMX, which vLLM 0.32 computes attention with but does not ask for, and has vLLM's processes
sleep while they wait for each other.
"""

from __future__ import annotations

import warnings

from besa.errors import BesaWarning
from besa.serve.vllm.cpu import allow_amx
from besa.serve.vllm.engine import VERSIONS, on_cpu, version_warning
from besa.serve.vllm.waiting import wait_asleep


def register() -> None:
    """Makes vLLM know packed checkpoints; a warning where this vLLM is not one that besa knows."""
    allow_amx()
    if on_cpu():
        wait_asleep()
    found = _version()
    if (message := version_warning(found)) is not None:
        warnings.warn(message, BesaWarning, stacklevel=2)
    try:
        import besa.serve.vllm.config  # noqa: F401 - registers itself
    except (ImportError, AttributeError) as error:
        message = f"packed models cannot be loaded into vLLM {found} ({error})"
        remedy = f"install vllm>={VERSIONS[0]},<{VERSIONS[1]}, or a besa that knows this one"
        warnings.warn(f"{message}: {remedy}", BesaWarning, stacklevel=2)


def _version() -> str:
    import vllm

    return str(vllm.__version__)
