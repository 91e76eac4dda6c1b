"""Masks by bucket and the sums that are their gradient, on a GPU: the launches of buckets.cu.

`besa.kernels.mask_buckets` and `besa.kernels.segment_sum` check arguments, say what the functions
do, and call these where they serve.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_void_p

import torch
from torch import Tensor

from besa.kernels.cuda import driver
from besa.kernels.cuda.usable import usable

_SOURCE = "buckets.cu"
_TYPES = {torch.bfloat16: "Bf16", torch.float16: "Fp16", torch.float32: "float"}
_BITS = {2: "uint16_t", 4: "uint32_t"}

# Of buckets.cu.
_EIGHT = 8
_SUM_THREADS = 64
_MASK_THREADS = 256


class _SegmentSum(ctypes.Structure):
    _fields_ = [
        ("values", c_void_p),
        ("weight", c_void_p),
        ("buckets", c_void_p),
        ("out", c_void_p),
        ("cols", c_int32),
        ("n_buckets", c_int32),
    ]


class _MaskBuckets(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("buckets", c_void_p),
        ("first_kept", c_void_p),
        ("out", c_void_p),
        ("cols", c_int32),
        ("pieces", c_int32),
    ]


def serves(matrix: Tensor, other: Tensor | None = None) -> bool:
    """Whether the kernels take matrices of this type, one for both of them, on this device."""
    same = other is None or other.dtype == matrix.dtype
    return same and matrix.dtype in _TYPES and usable(matrix.device)


def segment_sum(
    values: Tensor, buckets: Tensor, n_buckets: int, weight: Tensor | None = None
) -> Tensor:
    """`besa.kernels.segment_sum.segment_sum`; the same bits in every run."""
    values, buckets = values.contiguous(), buckets.contiguous()
    weight = None if weight is None else weight.contiguous()
    rows, cols = values.shape
    out = torch.empty(rows, n_buckets, dtype=torch.float32, device=values.device)
    if rows == 0:
        return out
    vector = _vector(cols, values, buckets, weight)
    name = f"segment_sum<{_TYPES[values.dtype]}, {vector}>"
    arguments = _SegmentSum(
        values.data_ptr(),
        driver.at(weight),
        buckets.data_ptr(),
        out.data_ptr(),
        cols,
        n_buckets,
    )
    shared = _SUM_THREADS * (n_buckets + 1) * 4
    driver.kernel(_SOURCE, name, values.device).launch(
        (rows, 1, 1), _SUM_THREADS, shared, arguments, driver.stream(values.device)
    )
    return out


def mask_buckets(weight: Tensor, buckets: Tensor, first_kept: Tensor) -> Tensor:
    """`besa.kernels.mask_buckets.mask_buckets`."""
    weight, buckets, first_kept = weight.contiguous(), buckets.contiguous(), first_kept.contiguous()
    rows, cols = weight.shape
    out = torch.empty_like(weight)
    if weight.numel() == 0:
        return out
    vector = _vector(cols, weight, buckets, out)
    piece = _MASK_THREADS * (_EIGHT if vector == "true" else 1)
    pieces = -(-cols // piece)
    arguments = _MaskBuckets(
        weight.data_ptr(), buckets.data_ptr(), first_kept.data_ptr(), out.data_ptr(), cols, pieces
    )
    name = f"mask_buckets<{_BITS[weight.element_size()]}, {vector}>"
    driver.kernel(_SOURCE, name, weight.device).launch(
        (rows * pieces, 1, 1), _MASK_THREADS, 0, arguments, driver.stream(weight.device)
    )
    return out


def _vector(cols: int, *matrices: Tensor | None) -> str:
    """Whether eight neighbours can be taken at a time, as C++ writes it."""
    if cols % _EIGHT:
        return "false"
    for matrix in matrices:
        if matrix is not None and matrix.data_ptr() % 16:
            return "false"
    return "true"
