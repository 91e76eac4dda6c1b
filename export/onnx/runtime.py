"""ONNX Runtime: imported quietly, and with besa's operator where a model asks for it.

>>> session = open_session("path/to/onnx/model.onnx")
>>> [output.name for output in session.get_outputs()][0]
'logits'

It sends telemetry on Linux, too, unless its environment says otherwise before it is imported.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import besa.kernels
from besa import telemetry
from besa.errors import BesaError

NAME = "libbesa_ort.so"


class MissingKernelError(BesaError):
    """A graph has an operator that this CPU's ONNX Runtime knows but cannot compute."""


_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "onnxruntime_genai")


def ort_library() -> str:
    """The path of the library with `ai.besa::SparseMatMul`, for sessions to register.

    Raises:
        BesaError: this installation was built without it.
    """
    if override := os.environ.get("BESA_ORT_LIBRARY"):
        return override
    found = (Path(folder, NAME) for folder in besa.kernels.__path__)
    path = next((file for file in found if file.is_file()), None)
    if path is None:
        raise BesaError(
            f"{NAME} was not built with this installation: install ONNX Runtime's C header "
            "(Debian: libonnxruntime-dev), or name its folder in BESA_ORT_INCLUDE, and install "
            "besa again"
        )
    return str(path)


def runtime() -> Any:
    """The module `onnxruntime`.

    Raises:
        BesaError: it, or another of the packages that go with it, is not installed.
    """
    telemetry.turn_off()  # before the import
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise BesaError(
            f"{', '.join(missing)} not installed: pip install 'besa[onnx]', or for NVIDIA GPUs "
            "'besa[onnx-gpu]'"
        )
    import onnxruntime

    return onnxruntime


def distribution(module: str) -> str | None:
    """The package that has brought a module: onnxruntime has builds for CPUs and for GPUs."""
    from importlib.metadata import packages_distributions

    found = packages_distributions().get(module, [])
    return min(found, key=len) if found else None


def genai() -> Any:
    """The module `onnxruntime_genai`.

    Raises:
        BesaError: as `runtime`.
    """
    runtime()
    import onnxruntime_genai

    return onnxruntime_genai


def open_session(path: str | Path, library: str | None = None, threads: int = 0) -> Any:
    """A session on the CPU.

    Args:
        library: of operators; `ort_library()` for sparse models.
        threads: 0 for as many as there are cores.

    Raises:
        MissingKernelError: the CPU has no kernel for one of the model's operators.
        BesaError: ONNX Runtime cannot load the library or the model.
    """
    onnxruntime = runtime()
    from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel

    from besa.export.onnx.check import load_whole

    load_whole(Path(path))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what matters in its log is an error of ours
    if library is not None:
        try:
            options.register_custom_ops_library(library)
        except Exception as error:  # noqa: BLE001 - of many kinds
            version = onnxruntime.__version__
            raise BesaError(
                f"{library} does not fit ONNX Runtime {version}: {reason(error)}"
            ) from None
    try:
        # No second try on the same provider, with a note about that on the standard output.
        return onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], enable_fallback=0
        )
    except NoKernel as error:
        raise MissingKernelError(f"{path} cannot be loaded: {reason(error)}") from None
    except Exception as error:  # noqa: BLE001 - of many kinds
        raise BesaError(f"{path} cannot be loaded: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The last part of ONNX Runtime's message, for people: it names source files first."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    for before in ("] : ", " : FAIL : ", "Status Message: "):
        line = line.rpartition(before)[2]
    return line.strip()
