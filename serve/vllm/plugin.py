"""vLLM serves packed checkpoints: what its entry point `vllm.general_plugins` calls.

    pip install besa[vllm]
    vllm serve SPARSE          # nothing to import, no flag

vLLM calls `register` once or more in each of its processes, whatever the model; all that it does is
to make the quantization method "besa" known. See besa.serve.vllm.linear for the rest.
"""

from __future__ import annotations

import warnings
from typing import Any

from besa.errors import BesaWarning

# The versions of vLLM whose quantization interface this is: from the first, below the second.
# vLLM 0.31 wants transformers below 5.18, and besa one from 5.19 on.
VERSIONS = ("0.32", "0.34")


def register() -> None:
    """Makes vLLM know packed checkpoints; a warning where this vLLM is not one that besa knows."""
    found = _version()
    if (words := misfit(found)) is not None:
        warnings.warn(words, BesaWarning, stacklevel=2)
    try:
        import besa.serve.vllm.linear  # noqa: F401 - registers itself
    except (ImportError, AttributeError) as error:
        words = f"packed models cannot be loaded into vLLM {found} ({error})"
        todo = f"install vllm>={VERSIONS[0]},<{VERSIONS[1]}, or a besa that knows this one"
        warnings.warn(f"{words}: {todo}", BesaWarning, stacklevel=2)


def misfit(version: str) -> str | None:
    """What there is to say of a vLLM that besa does not know; None of one that it does."""
    if _fits(version):
        return None
    words = f"besa knows vLLM from {VERSIONS[0]} and below {VERSIONS[1]}, and this is {version}"
    return f"{words}: packed models may not load"


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def _fits(version: str) -> bool:
    def number(text: str) -> Any:
        return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())

    return bool(number(VERSIONS[0]) <= number(version) < number(VERSIONS[1]))
