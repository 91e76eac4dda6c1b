"""Products of many tokens: expand.cu makes the dense matrix, for as long as cuBLAS takes."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.call import TYPES, Call, Needed, Shape, quantization, quantized
from besa.kernels.cuda.records import row_blocks

# Blocks of an expansion to a multiprocessor, warps of a block, and their rings.
_RESIDENT, _WARPS, _STAGES = 2, 8, 3


class _Expansion(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("records", "offsets", "scale", "dense")),
        *((n, c_int) for n in ("rows", "cols", "tiles", "capacity", "groups", "group_size")),
    )


class _Rescaling(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("sums", "x_scale", "scale", "bias", "y")),
        ("rows", c_int),
    )


@dataclass(frozen=True)
class Expand:
    """The dense matrix for as long as cuBLAS takes to multiply by it.

    Attributes:
        int8: whether int8 values stay int8, and cuBLAS multiplies them by quantized activations.
    """

    int8: bool = False

    def __str__(self) -> str:
        return "expand, cuBLAS in int8" if self.int8 else "expand, cuBLAS"

    def kernels(self, shape: Shape, tokens: int) -> list[Needed] | None:
        """What it launches; None if cuBLAS has no such product."""
        quantizes = shape.int8 and shape.int8_input
        quantize = quantization(shape.x)
        if not self.int8:
            dense = Needed("expand.cu", expansion(shape, shape.x))
            return [dense, quantize] if quantizes else [dense]
        if not quantizes or shape.group_size or shape.rows % 8 or tokens <= 16:
            return None
        names = (expansion(shape, torch.int8), f"rescale<{TYPES[shape.x]}>")
        return [quantize, *(Needed("expand.cu", name) for name in names)]

    def run(self, call: Call) -> None:
        """Queues the expansion and the product."""
        shape = call.shape
        if self.int8:
            x8, x_scale = quantized(call)
            sums = torch._int_mm(x8, expand(call, torch.int8).T)
            _rescale(call, sums, x_scale)
        elif shape.int8 and shape.int8_input:
            x8, x_scale = quantized(call)
            dense = expand(call, shape.x)
            product = F.linear(x8.to(shape.x), dense).float() * x_scale.unsqueeze(1)
            if call.bias is not None:
                product += call.bias
            call.y.copy_(product)
        elif call.bias is None:
            torch.mm(call.x, expand(call, shape.x).T, out=call.y)
        else:
            torch.addmm(call.bias, call.x, expand(call, shape.x).T, out=call.y)


def expansion(shape: Shape, dtype: torch.dtype) -> str:
    """The kernel's name."""
    source = "INT8" if shape.int8 else "TWO_FOUR" if shape.two_four else "VALUES"
    name = "int8_t" if dtype == torch.int8 else TYPES[dtype]
    return f"expand<{name}, {source}, {_WARPS}, {_STAGES}>"


def expand(call: Call, dtype: torch.dtype) -> Tensor:
    """The weight [rows, cols], cols a multiple of 64, of the values' type or int8 scaled to x's.

    Args:
        dtype: of the result: the values' own, or for int8 values x's type, too.
    """
    shape, device = call.shape, call.records.device
    dense = torch.empty(shape.rows, shape.cols, dtype=dtype, device=device)
    across = shape.cols // 64
    groups = 1 if call.scale is None else call.scale.shape[1]
    arguments = _Expansion(
        call.records.data_ptr(),
        driver.at(call.offsets),
        driver.at(call.scale),
        dense.data_ptr(),
        shape.rows,
        shape.cols,
        row_blocks(shape.rows) * across,
        shape.capacity,
        groups,
        shape.group_size or shape.cols,
    )
    blocks = _RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count
    shared = 80 + _WARPS * _STAGES * shape.capacity
    driver.kernel("expand.cu", expansion(shape, dtype), device).launch(
        (blocks, 1, 1), _WARPS * 32, shared, arguments, call.stream, early=True
    )
    return dense


def _rescale(call: Call, sums: Tensor, x_scale: Tensor) -> None:
    """y from the int32 sums [tokens, rows] of quantized x and int8 values."""
    assert call.scale is not None
    arguments = _Rescaling(
        sums.data_ptr(),
        x_scale.data_ptr(),
        call.scale.data_ptr(),
        driver.at(call.bias),
        call.y.data_ptr(),
        call.shape.rows,
    )
    grid = (call.tokens, -(-call.shape.rows // 512), 1)
    kernel = driver.kernel("expand.cu", f"rescale<{TYPES[call.shape.x]}>", call.x.device)
    kernel.launch(grid, 256, 0, arguments, call.stream)
