"""A matrix's zeros out and in again: the bitmask, the row pointers, and the nonzeros in a row.

>>> weight = torch.tensor([[0.0, 5.0, 0.0], [7.0, 0.0, 9.0]])
>>> bitmask, row_ptr = pack_mask(weight)
>>> bitmask.tolist(), row_ptr.tolist()
([[2], [5]], [0, 1, 3])
>>> values = compress(weight, bitmask, row_ptr)
>>> values
tensor([5., 7., 9.])
>>> torch.equal(expand(values, bitmask, row_ptr, cols=3), weight)
True

Column j is bit j % 8 of a row's byte j // 8, and `row_ptr[r]` the index of row r's first value.
Elements go through as bit patterns: what a NaN carries and every denormal come back as they were,
and -0.0 alone, which counts as a zero, comes back as +0.0.

On the CPU the native kernels serve, at the speed of memory; elsewhere, and without them, the torch
references beside each function. `BESA_ISA=portable` or `avx2` in the environment keeps the kernels
off AVX-512.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.kernels import native
from besa.kernels.describe import describe
from besa.kernels.isa import ISAS, chosen_isa

# For each type of element, the one of its bit patterns, and the bits that tell a zero.
_PATTERNS = {
    torch.bfloat16: (torch.int16, 0x7FFF),
    torch.float16: (torch.int16, 0x7FFF),
    torch.float32: (torch.int32, 0x7FFFFFFF),
    torch.int8: (torch.uint8, 0xFF),
}
DTYPES = tuple(_PATTERNS)

# Elements whose int64 index exists at a time in the references: 32 MiB.
_CHUNK = 1 << 22

# Elements that keep a thread busy for about 0.1 ms; with fewer, waking it costs more than it does.
_ELEMENTS_PER_THREAD = 1 << 20


def pack_mask(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Where `weight` is not zero, and where each row's values will begin.

    Args:
        weight: [out, in], one of `DTYPES`, in any layout.

    Returns:
        bitmask, uint8 [out, ceil(in / 8)], and row_ptr, int64 [out + 1], both on its device.

    Raises:
        ValueError: if `weight` is no such matrix.
    """
    _check_matrix(weight)
    library = _library(weight)
    if library is None:
        return pack_mask_reference(weight)
    weight = weight.contiguous()
    rows, cols = weight.shape
    bitmask = torch.empty(rows, -(-cols // 8), dtype=torch.uint8)
    row_ptr = torch.empty(rows + 1, dtype=torch.int64)
    library.besa_pack_mask(
        weight.data_ptr(),
        bitmask.data_ptr(),
        row_ptr.data_ptr(),
        rows,
        cols,
        weight.element_size(),
        _threads(weight.numel()),
        _isa(),
    )
    return bitmask, row_ptr


@torch.no_grad()
def pack_mask_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`pack_mask` in plain torch, for any device."""
    _check_matrix(weight)
    pattern, magnitude = _PATTERNS[weight.dtype]
    rows, cols = weight.shape
    bitmask = torch.empty(rows, -(-cols // 8), dtype=torch.uint8, device=weight.device)
    step = _step(cols)
    for row in range(0, rows, step):
        keep = (weight[row : row + step].view(pattern) & magnitude) != 0
        bitmask[row : row + step] = to_bits(keep)
    return bitmask, row_pointers_reference(bitmask)


def row_pointers(bitmask: Tensor) -> Tensor:
    """The bits set in the rows before each row, and in all of them: what no file needs to hold.

    Args:
        bitmask: uint8 [out, bytes], in any layout; all of its bits count.

    Returns:
        int64 [out + 1], on its device.

    Raises:
        ValueError: if `bitmask` is no such matrix.
    """
    _check_bitmask(bitmask)
    library = _library(bitmask)
    if library is None:
        return row_pointers_reference(bitmask)
    bitmask = bitmask.contiguous()
    rows, width = bitmask.shape
    row_ptr = torch.empty(rows + 1, dtype=torch.int64)
    library.besa_row_pointers(
        bitmask.data_ptr(), row_ptr.data_ptr(), rows, width, _threads(bitmask.numel()), _isa()
    )
    return row_ptr


def row_pointers_reference(bitmask: Tensor) -> Tensor:
    """`row_pointers` in plain torch, for any device."""
    _check_bitmask(bitmask)
    low, high = bits_of_fours(bitmask)
    return F.pad((low + high).sum(1, dtype=torch.int64).cumsum(0), (1, 0))


def compress(weight: Tensor, bitmask: Tensor, row_ptr: Tensor) -> Tensor:
    """The elements of `weight` at the bits set in `bitmask`, row by row.

    Args:
        weight: [out, in], one of `DTYPES`, in any layout.
        bitmask: uint8 [out, ceil(in / 8)], no bit set past `in`.
        row_ptr: int64 [out + 1], the bitmask's `row_pointers`.

    Returns:
        [row_ptr[-1]], of the type and on the device of `weight`.

    Raises:
        ValueError: if shapes, types, devices, bits or pointers are not as above.
    """
    _check_matrix(weight)
    _check_layout(weight, bitmask, row_ptr, weight.shape[1])
    library = _library(weight)
    if library is None:
        return compress_reference(weight, bitmask, row_ptr)
    count = int(row_ptr[-1])
    if not 0 <= count <= weight.numel():
        raise _unsound()
    weight, bitmask, row_ptr = weight.contiguous(), bitmask.contiguous(), row_ptr.contiguous()
    values = torch.empty(count, dtype=weight.dtype)
    status = library.besa_compress(
        weight.data_ptr(),
        bitmask.data_ptr(),
        row_ptr.data_ptr(),
        values.data_ptr(),
        *weight.shape,
        weight.element_size(),
        count,
        _threads(weight.numel()),
        _isa(),
    )
    if status != 0:
        raise _unsound()
    return values


@torch.no_grad()
def compress_reference(weight: Tensor, bitmask: Tensor, row_ptr: Tensor) -> Tensor:
    """`compress` in plain torch, for any device."""
    _check_matrix(weight)
    _check_layout(weight, bitmask, row_ptr, weight.shape[1])
    _check_sound(bitmask, row_ptr)
    pattern, _ = _PATTERNS[weight.dtype]
    values = torch.empty(int(row_ptr[-1]), dtype=weight.dtype, device=weight.device)
    for rows, keep, part in _chunks(bitmask, row_ptr, weight.shape[1]):
        values.view(pattern)[part] = weight[rows].view(pattern)[keep]
    return values


def expand(values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int) -> Tensor:
    """The matrix with `values` at the bits set in `bitmask`, and zeros elsewhere.

    Args:
        values: [row_ptr[-1]], one of `DTYPES`.
        bitmask: uint8 [out, ceil(cols / 8)], no bit set past `cols`.
        row_ptr: int64 [out + 1], the bitmask's `row_pointers`.
        cols: the matrix's width.

    Returns:
        [out, cols], of the type and on the device of `values`.

    Raises:
        ValueError: if shapes, types, devices, bits or pointers are not as above.
    """
    _check_values(values)
    _check_layout(values, bitmask, row_ptr, cols)
    library = _library(values)
    if library is None:
        return expand_reference(values, bitmask, row_ptr, cols)
    values, bitmask, row_ptr = values.contiguous(), bitmask.contiguous(), row_ptr.contiguous()
    dense = torch.empty(bitmask.shape[0], cols, dtype=values.dtype)
    status = library.besa_expand(
        values.data_ptr(),
        bitmask.data_ptr(),
        row_ptr.data_ptr(),
        dense.data_ptr(),
        *dense.shape,
        dense.element_size(),
        values.numel(),
        _threads(dense.numel()),
        _isa(),
    )
    if status != 0:
        raise _unsound()
    return dense


@torch.no_grad()
def expand_reference(values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int) -> Tensor:
    """`expand` in plain torch, for any device."""
    _check_values(values)
    _check_layout(values, bitmask, row_ptr, cols)
    _check_sound(bitmask, row_ptr)
    if int(row_ptr[-1]) != values.numel():
        raise _unsound()
    pattern, _ = _PATTERNS[values.dtype]
    dense = torch.zeros(bitmask.shape[0], cols, dtype=values.dtype, device=values.device)
    for rows, keep, part in _chunks(bitmask, row_ptr, cols):
        dense[rows].view(pattern).masked_scatter_(keep, values[part].view(pattern))
    return dense


def has_stray_bits(bitmask: Tensor, cols: int) -> bool:
    """Whether bits past column `cols` are set in a uint8 [out, ceil(cols / 8)] bitmask."""
    return cols % 8 != 0 and bool((bitmask[:, -1] >> cols % 8).any())


def to_bits(keep: Tensor) -> Tensor:
    """bool [rows, cols] as a bitmask, uint8 [rows, ceil(cols / 8)]."""
    width = -(-keep.shape[1] // 8)
    eights = F.pad(keep, (0, 8 * width - keep.shape[1])).unflatten(1, (width, 8))
    return (eights.to(torch.uint8) << _shifts(keep)).sum(2, dtype=torch.uint8)


def from_bits(bitmask: Tensor, cols: int) -> Tensor:
    """A bitmask, uint8 [rows, ceil(cols / 8)], as bool [rows, cols]."""
    bits = (bitmask[:, :, None] >> _shifts(bitmask)) & 1
    return bits.flatten(1)[:, :cols].bool()


def bits_of_fours(bitmask: Tensor) -> tuple[Tensor, Tensor]:
    """How many bits are set in the low and in the high half of each byte: uint8, 0 to 4."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return fours & 0x0F, fours >> 4


def _shifts(beside: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=beside.device)


def _chunks(bitmask: Tensor, row_ptr: Tensor, cols: int) -> Iterator[tuple[slice, Tensor, slice]]:
    """Some rows at a time, with their bits as bool [rows, cols] and their part of the values."""
    step = _step(cols)
    bounds = [*row_ptr[:-1:step].tolist(), int(row_ptr[-1])]
    for row, part in zip(range(0, bitmask.shape[0], step), pairwise(bounds), strict=True):
        rows = slice(row, row + step)
        yield rows, from_bits(bitmask[rows], cols), slice(*part)


def _step(cols: int) -> int:
    return max(1, _CHUNK // max(1, cols))


def _library(tensor: Tensor) -> ctypes.CDLL | None:
    return native.library() if tensor.device.type == "cpu" else None


def _threads(elements: int) -> int:
    return min(torch.get_num_threads(), 1 + elements // _ELEMENTS_PER_THREAD)


def _isa() -> int:
    return ISAS.index(chosen_isa()[0])


def _check_matrix(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.dtype not in _PATTERNS or weight.layout != torch.strided:
        raise ValueError(f"weight must be a matrix of {_known()}, not {describe(weight)}")


def _check_values(values: Tensor) -> None:
    if values.ndim != 1 or values.dtype not in _PATTERNS:
        raise ValueError(f"values must be a vector of {_known()}, not {describe(values)}")


def _check_bitmask(bitmask: Tensor) -> None:
    if bitmask.ndim != 2 or bitmask.dtype != torch.uint8:
        raise ValueError(f"bitmask must be a uint8 matrix, not {describe(bitmask)}")


def _check_layout(values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int) -> None:
    """All but the pointers' content, before Python lets go of any; `values` may be a matrix."""
    _check_bitmask(bitmask)
    rows = values.shape[0] if values.ndim == 2 else bitmask.shape[0]
    if cols < 0 or bitmask.shape != (rows, -(-cols // 8)):
        raise ValueError(f"bitmask is {describe(bitmask)}, but the matrix [{rows}, {cols}]")
    if row_ptr.dtype != torch.int64 or row_ptr.shape != (rows + 1,):
        raise ValueError(f"row_ptr must be int64 [{rows + 1}], not {describe(row_ptr)}")
    if not values.device == bitmask.device == row_ptr.device:
        devices = f"{values.device}, {bitmask.device} and {row_ptr.device}"
        raise ValueError(f"values, bitmask and row_ptr must be on one device, not {devices}")
    if has_stray_bits(bitmask, cols):
        raise ValueError(f"bitmask has bits set past its {cols} columns")


def _check_sound(bitmask: Tensor, row_ptr: Tensor) -> None:
    if not torch.equal(row_ptr, row_pointers_reference(bitmask)):
        raise _unsound()


def _unsound() -> ValueError:
    return ValueError("values, bitmask and row_ptr disagree on the number of values")


def _known() -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
