"""One product by records: what the ways to compute it are given."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_void_p
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.records import Records, padded_cols

# The types of activations that the kernels take.
TYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16"}


@dataclass(frozen=True)
class Needed:
    """A kernel that a way launches, and whether it is compiled for one architecture alone."""

    source: str
    name: str
    specific: bool = False

    def on(self, device: torch.device) -> driver.Kernel:
        """Loaded, and compiled if it must be."""
        return driver.kernel(self.source, self.name, device, specific=self.specific)


class Way(Protocol):
    """A way to compute a product."""

    def kernels(self, shape: Shape, tokens: int) -> list[Needed] | None:
        """What it launches for so many tokens; None if it cannot compute them."""

    def run(self, call: Call) -> None:
        """Queues the product on torch's current stream."""


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

    @classmethod
    def of(cls, records: Records, group_size: int, x: torch.dtype, int8_input: bool) -> Shape:
        """That of a weight and of such activations."""
        return cls(
            rows=records.rows,
            cols=padded_cols(records.cols),
            values=records.dtype,
            x=x,
            two_four=records.two_four,
            capacity=records.capacity,
            group_size=group_size,
            int8_input=int8_input and records.dtype == torch.int8,
        )

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
        return driver.stream(self.x.device)


class _Quantization(ctypes.Structure):
    _fields_ = (*((name, c_void_p) for name in ("x", "x8", "x_scale")), ("cols", c_int))


def quantization(x: torch.dtype) -> Needed:
    """What `quantized` launches for x of this type."""
    return Needed("sparse_linear.cu", f"quantize<{TYPES[x]}>")


def quantized(call: Call) -> tuple[Tensor, Tensor]:
    """x as int8 [tokens, cols], and its scales, float32 [tokens]."""
    x8 = torch.empty(call.x.shape, dtype=torch.int8, device=call.x.device)
    x_scale = torch.empty(call.tokens, dtype=torch.float32, device=call.x.device)
    arguments = _Quantization(call.x.data_ptr(), x8.data_ptr(), x_scale.data_ptr(), call.shape.cols)
    kernel = quantization(call.x.dtype).on(call.x.device)
    kernel.launch((call.tokens, 1, 1), 256, 32, arguments, call.stream, early=True)
    return x8, x_scale
