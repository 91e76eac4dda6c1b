"""Runs the operator for NVIDIA GPUs on the CPU: its own C++, beside a driver that emulates kernels.

>>> driver = driver_on_cpu(instances(records, None, torch.float16))
>>> library = operator_library(driver)  # for open_session

CPU tensors stand in for a GPU's. The machine code is real, and looked at; what runs is the same
kernel, compiled for the CPU (tests/kernels/cuda/emulation.py).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterable
from ctypes import c_char, c_int64, c_size_t, c_void_p
from pathlib import Path

import pytest
import torch
from torch import Tensor

from besa.errors import BesaError
from besa.export.onnx.machine_code import Instance
from besa.kernels.cuda.records import Records
from tests.kernels.cuda import emulation

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "besa" / "kernels"
_KINDS = {"VALUES": "0", "TWO_FOUR": "1", "INT8_FLOAT": "4"}


def driver_on_cpu(wanted: Iterable[Instance]) -> Path:
    """A CUDA driver that can launch these kernels."""
    source = emulation.KERNELS / "sparse_linear.cu"
    names = sorted({one.name for one in wanted})
    shown = []
    for i, name in enumerate(names):
        plain = name
        for kind, number in _KINDS.items():
            plain = plain.replace(kind, number)
        shown.append(f'    {{"{plain}", launch_{i}}},\n')
    text = "".join(
        [
            f'#include "{source}"\n',
            *(f"EMULATE(launch_{i}, &{name})\n" for i, name in enumerate(names)),
            "struct EmulatedKernel {\n    const char* name;\n",
            "    int (*launch)(const emulator::Launch*);\n};\n",
            "static const EmulatedKernel emulated[] = {\n",
            *shown,
            "};\n",
            (HERE / "driver_on_cpu.h").read_text(),
        ]
    )
    return emulation.compiled(source, text)


class Weight(ctypes.Structure):
    """besa::cuda::Weight."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "cols", "capacity", "group_size")),
        ("type", c_int64),  # 32 bits and as many of padding
        *((name, c_int64) for name in ("record_bytes", "offsets", "scales")),
    ]


class Operands(ctypes.Structure):
    """besa::cuda::Operands."""

    _fields_ = [(name, c_void_p) for name in ("records", "offsets", "scale", "x", "y")]


def product_library(driver: str | Path) -> ctypes.CDLL:
    """product_on_cpu.cpp for a driver; a library keeps to its first one."""
    return ctypes.CDLL(str(_compiled(HERE / "product_on_cpu.cpp", f'-DDRIVER="{driver}"')))


def multiply(
    library: ctypes.CDLL,
    records: Records,
    scale: Tensor | None,
    group_size: int | None,
    code: bytes,
    x: Tensor,
    y: Tensor,
    stream: int = 0,
    times: int = 1,
    change: Callable[[Weight], None] = lambda weight: None,
) -> None:
    """Queues the product of x [tokens, cols] into y.

    Args:
        change: damages the weight before.

    Raises:
        BesaError: what the operator says.
    """
    held = [records.data, records.offsets, scale]
    operands = Operands(*(None if one is None else one.data_ptr() for one in (*held, x, y)))
    weight = Weight(
        records.rows,
        records.cols,
        records.capacity,
        group_size or 0,
        0 if x.dtype == torch.bfloat16 else 1,
        records.data.numel(),
        0 if records.offsets is None else records.offsets.numel(),
        0 if scale is None else scale.numel(),
    )
    change(weight)
    error = (c_char * 500)()
    failed = library.product(
        ctypes.byref(weight),
        ctypes.byref(operands),
        code,
        c_size_t(len(code)),
        c_int64(len(x)),
        c_void_p(stream),
        times,
        error,
        c_size_t(len(error)),
    )
    if failed:
        raise BesaError(error.value.decode())


def operator_library(driver: Path) -> str:
    """operator_on_cpu.cpp, or the test is skipped: ONNX Runtime's header is missing."""
    header = "onnxruntime_c_api.h"
    usual = Path("/usr/include/onnxruntime")
    folders = (
        *filter(None, [os.environ.get("BESA_ORT_INCLUDE")]),
        Path(sys.prefix) / "ort-header",
        usual,
        usual / "core" / "session",
    )
    found = next((folder for folder in folders if (Path(folder) / header).is_file()), None)
    if found is None:
        pytest.skip(f"no {header}")
    flags = (f'-DDRIVER="{driver}"', "-isystem", str(found), str(KERNELS / "ort_cuda.cpp"))
    return str(_compiled(HERE / "operator_on_cpu.cpp", *flags))


def _compiled(source: Path, *flags: str) -> Path:
    """A library of a source and of besa's product."""
    compiler = emulation.compiler()
    assert compiler is not None
    product = [KERNELS / f"cuda_{part}.cpp" for part in ("product", "code", "driver")]
    command = [
        *compiler,
        *("-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra"),
        f"-I{KERNELS}",
        *map(str, (source, *product)),
        *flags,
        "-ldl",
    ]
    includes = [*KERNELS.glob("*cuda*.cpp"), *KERNELS.glob("*.h")]
    return emulation.library_of(source, command, includes)
