"""Runs the kernels of primitives.cu, which do one thing each, emulated or on a GPU."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from functools import cache

import pytest
import torch
from torch import Tensor

from besa.kernels.cuda import driver
from tests.kernels.cuda.emulation import HERE, Emulated, compiler, guarded

SOURCE = HERE / "primitives.cu"
NAMES = [
    "words",
    "halves<Bf16>",
    "halves<Fp16>",
    "warps",
    "products<Bf16>",
    "products<Fp16>",
    "products_int8",
    "copies",
    "atomics",
    "neighbours",
    "mistakes",
]
POISON = -1  # as int32


class Arrays(ctypes.Structure):
    _fields_ = [
        ("input", c_void_p),
        ("output", c_void_p),
        ("n", c_int),
        ("mode", c_int),
    ]


@cache
def primitives() -> Emulated:
    if compiler() is None:
        pytest.skip("no C++ compiler, which kernels are emulated with")
    return Emulated(SOURCE, NAMES)


class Gpu:
    """The same kernels on the machine's GPU."""

    device = torch.device("cuda")

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: ctypes.Structure,
    ) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        kernel = driver.kernel(str(SOURCE), name, self.device)
        kernel.launch(grid, threads, shared, arguments, stream)


def run(
    machine: Emulated | Gpu,
    name: str,
    values: Tensor,
    outputs: int | Tensor,
    *,
    n: int = 0,
    mode: int = 0,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
) -> Tensor:
    """The kernel's output, int32; its input is any tensor of 4-byte elements."""
    start = torch.zeros(outputs, dtype=torch.int32) if isinstance(outputs, int) else outputs
    put = guarded if isinstance(machine, Emulated) else Tensor.cuda
    values, out = put(values), put(start)
    arguments = Arrays(values.data_ptr(), out.data_ptr(), n, mode)
    machine.launch(name, (blocks, 1, 1), threads, shared, arguments)
    return out.cpu()


def random_words(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).int()
