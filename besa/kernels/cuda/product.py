"""The ways to multiply by records, each of which is the fastest for some numbers of tokens.

- `Multiply`: the kernel of sparse_linear.cu, from the records, for 1 to 64 tokens.
- `Expand`: the dense matrix in memory that is given back at once, and cuBLAS.

A `Call` is one product. `tuning.py` says which way it goes.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.records import row_blocks

TYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}

# Tokens that each block of `Multiply` quantizes for itself, and how many bytes they may have.
_OWN_TOKENS, _OWN_X = 2, 32 * 1024
_MULTIPROCESSOR_SHARED = 227 * 1024


@dataclass(frozen=True)
class Shape:
    """What the choice of a way depends on, besides the number of tokens.

    Attributes:
        rows, cols: of the weight; cols a multiple of 64.
        values: the type of its values.
        x: the type of the activations and of the result, bfloat16 or float16.
        two_four: whether the records are for the sparse tensor cores.
        capacity: bytes of the largest record.
        group_size: columns that share a scale; 0 where a row does.
        int8_input: whether int8 values multiply activations that are quantized to int8.
    """

    rows: int
    cols: int
    values: torch.dtype
    x: torch.dtype
    two_four: bool
    capacity: int
    group_size: int
    int8_input: bool

    @property
    def int8(self) -> bool:
        return self.values == torch.int8


@dataclass(frozen=True)
class Call:
    """One product.

    Attributes:
        shape: of the weight.
        records, offsets: as `besa.kernels.cuda.records.Records` has them.
        scale: float32 [rows, groups] of int8 values.
        bias: [rows] of x's type, or None.
        x: [tokens, cols], contiguous, 16-byte aligned.
        y: [tokens, rows], written.
    """

    shape: Shape
    records: Tensor
    offsets: Tensor | None
    scale: Tensor | None
    bias: Tensor | None
    x: Tensor
    y: Tensor

    @property
    def tokens(self) -> int:
        return len(self.x)

    @property
    def stream(self) -> int:
        return torch.cuda.current_stream(self.x.device).cuda_stream


class _Problem(ctypes.Structure):
    _fields_ = (
        *(
            (name, c_void_p)
            for name in ("records", "offsets", "x", "x_scale", "scale", "bias", "y")
        ),
        *((name, c_int) for name in ("rows", "cols", "tokens", "capacity", "groups", "group_log")),
    )


class _Quantization(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("x", "x8", "x_scale")), ("cols", c_int))


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


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass(frozen=True)
class Multiply:
    """The kernel that multiplies from the records.

    Attributes:
        blocks: of 16 rows, for each thread block.
        warps: of a thread block.
        stages: steps of a warp whose bytes are under way or in use.
        resident: thread blocks that shall fit a multiprocessor.
    """

    blocks: int
    warps: int
    stages: int
    resident: int

    source = "sparse_linear.cu"

    def __str__(self) -> str:
        return f"multiply {self.blocks}/{self.warps}/{self.stages}/{self.resident}"

    def instance(self, shape: Shape, tokens: int) -> str | None:
        """The kernel's name; None if a block would need more memory than it shall."""
        if tokens > 64:
            return None
        shared = self.shared(shape, tokens)
        if shared > _MULTIPROCESSOR_SHARED // self.resident - 1024:
            return None
        kind = self._kind(shape, tokens)
        group = min(shape.group_size, 64)  # groups of 128 are two tiles with the same scale
        pieces = 3 if shape.two_four else next(n for n in (2, 3, 5) if shape.capacity <= 512 * n)
        numbers = (group, self.blocks, _eights(tokens), self.warps, self.stages, pieces)
        arguments = ", ".join(map(str, (TYPES[shape.x], kind, *numbers, self.resident)))
        return f"multiply<{arguments}>"

    def _kind(self, shape: Shape, tokens: int) -> str:
        if not shape.int8:
            return "TWO_FOUR" if shape.two_four else "VALUES"
        if not shape.int8_input:
            return "INT8_FLOAT"
        own = tokens <= _OWN_TOKENS and tokens * shape.cols <= _OWN_X
        return "INT8" if own else "INT8_READY"

    def shared(self, shape: Shape, tokens: int) -> int:
        """Bytes of shared memory of a block, as sparse_linear.cu lays it out."""
        rings = 80 + self.warps * self.stages * self.blocks * shape.capacity
        sums = self.warps * self.blocks * _eights(tokens) * 512
        bytes_ = max(rings, sums)
        if self._kind(shape, tokens) == "INT8":
            bytes_ += tokens * shape.cols + 4 * (8 * _eights(tokens) + tokens * self.warps)
        return bytes_

    def run(self, call: Call) -> None:
        """Queues the product."""
        shape, tokens, stream = call.shape, call.tokens, call.stream
        device = call.x.device
        name = self.instance(shape, tokens)
        assert name is not None
        x, x_scale = call.x, None
        if self._kind(shape, tokens) == "INT8_READY":
            x, x_scale = quantized(call)
        problem = _Problem(
            call.records.data_ptr(),
            _at(call.offsets),
            x.data_ptr(),
            _at(x_scale),
            _at(call.scale),
            _at(call.bias),
            call.y.data_ptr(),
            shape.rows,
            shape.cols,
            tokens,
            shape.capacity,
            0 if call.scale is None else call.scale.shape[1],
            1 if shape.group_size == 128 else 0,
        )
        grid = (-(-shape.rows // (16 * self.blocks)), 1, 1)
        driver.kernel("sparse_linear.cu", name, device).launch(
            grid, self.warps * 32, self.shared(shape, tokens), problem, stream, early=True
        )


def _eights(tokens: int) -> int:
    """Groups of 8 tokens, rounded up to a power of two."""
    return next(n for n in (1, 2, 4, 8) if tokens <= 8 * n)


def quantized(call: Call) -> tuple[Tensor, Tensor]:
    """x as int8 [tokens, cols], and its scales, float32 [tokens]."""
    x8 = torch.empty(call.x.shape, dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty(call.tokens, dtype=torch.float32, device=call.x.device)
    arguments = _Quantization(call.x.data_ptr(), x8.data_ptr(), x_scale.data_ptr(), call.shape.cols)
    kernel = driver.kernel("sparse_linear.cu", f"quantize<{TYPES[call.x.dtype]}>", call.x.device)
    kernel.launch((call.tokens, 1, 1), 256, 32, arguments, call.stream, early=True)
    return x8, x_scale


@dataclass(frozen=True)
class Expand:
    """The dense matrix for as long as cuBLAS takes to multiply by it."""

    source = "expand.cu"

    def __str__(self) -> str:
        return "expand"

    def instance(self, shape: Shape, tokens: int) -> str | None:  # noqa: ARG002 - as others have it
        """The kernel's name."""
        return expansion(shape, shape.x)

    def run(self, call: Call) -> None:
        """Queues the expansion and the product."""
        shape = call.shape
        if not shape.int8 or not shape.int8_input:
            dense = expand(call, shape.x)
            if call.bias is None:
                torch.mm(call.x, dense.T, out=call.y)
            else:
                torch.addmm(call.bias, call.x, dense.T, out=call.y)
            return
        x8, x_scale = quantized(call)
        if shape.group_size == 0 and shape.rows % 8 == 0 and call.tokens > 16:
            sums = torch._int_mm(x8, expand(call, torch.int8).T)
            _rescale(call, sums, x_scale)
            return
        product = F.linear(x8.to(shape.x), expand(call, shape.x)).float() * x_scale.unsqueeze(1)
        if call.bias is not None:
            product += call.bias
        call.y.copy_(product)


Way = Multiply | Expand

# Blocks of an expansion to a multiprocessor, warps of a block, and their rings.
_EXPAND_RESIDENT, _EXPAND_WARPS, _EXPAND_STAGES = 2, 8, 3


def expansion(shape: Shape, dtype: torch.dtype) -> str:
    """The kernel's name."""
    source = "INT8" if shape.int8 else "TWO_FOUR" if shape.two_four else "VALUES"
    name = "int8_t" if dtype == torch.int8 else TYPES[dtype]
    return f"expand<{name}, {source}, {_EXPAND_WARPS}, {_EXPAND_STAGES}>"


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
        _at(call.offsets),
        _at(call.scale),
        dense.data_ptr(),
        shape.rows,
        shape.cols,
        row_blocks(shape.rows) * across,
        shape.capacity,
        groups,
        shape.group_size or shape.cols,
    )
    blocks = _EXPAND_RESIDENT * torch.cuda.get_device_properties(device).multi_processor_count
    shared = 80 + _EXPAND_WARPS * _EXPAND_STAGES * shape.capacity
    driver.kernel("expand.cu", expansion(shape, dtype), device).launch(
        (blocks, 1, 1), _EXPAND_WARPS * 32, shared, arguments, call.stream, early=True
    )
    return dense


def _rescale(call: Call, sums: Tensor, x_scale: Tensor) -> None:
    """y from the int32 sums [tokens, rows] of quantized x and int8 values."""
    assert call.scale is not None
    arguments = _Rescaling(
        sums.data_ptr(),
        x_scale.data_ptr(),
        call.scale.data_ptr(),
        _at(call.bias),
        call.y.data_ptr(),
        call.shape.rows,
    )
    grid = (call.tokens, -(-call.shape.rows // 512), 1)
    kernel = driver.kernel("expand.cu", f"rescale<{TYPES[call.shape.x]}>", call.x.device)
    kernel.launch(grid, 256, 0, arguments, call.stream)
