"""Packed weights laid out for the GPU kernels, and back: `records.cuh` says what a record is.

>>> from besa.formats import pack
>>> weight = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.bfloat16)
>>> records = to_records(*parts(pack(weight)), cols=3)
>>> records.rows, records.cols, records.two_four
(2, 3, True)
>>> [torch.equal(a, b) for a, b in zip(to_packed(records), parts(pack(weight)))]
[True, True, True]

Plain torch on whatever device the weight is on, some rows at a time: no dense copy ever exists. A
weight of which no four neighbours keep more than two becomes records for the sparse tensor cores,
which need no decoding; all others become tiles with a mask. Both ways are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.errors import BesaError
from besa.kernels.cuda.tiles import (
    COLS,
    MASK_BYTES,
    MINUS_ZERO,
    ROWS,
    TWO_FOUR_BYTES,
    UNIT,
    fill,
    from_tiles,
    from_two_four,
    tiled,
    two_four,
    untiled,
)
from besa.kernels.packing import bits_of_fours, from_bits, row_pointers_reference, to_bits

if TYPE_CHECKING:
    from besa.kernels.linear import PackedWeight

_GROUP = 4  # row blocks are made a multiple of

# Elements that are dense at a time: their temporaries take some 30 bytes each.
_CHUNK = 1 << 22

# Bytes that it takes to lay a weight out and to time products with it, besides both of its forms
# and a dense copy.
_WORKSPACE = 128 << 20


@dataclass(frozen=True)
class Records:
    """A weight [rows, cols] as records.

    Attributes:
        data: uint8 [bytes].
        offsets: int32 [records + 1], in units of 16 bytes; None for 2:4.
        rows, cols: of the weight.
        capacity: bytes of the largest record.
        dtype: of the values.
    """

    data: Tensor
    offsets: Tensor | None
    rows: int
    cols: int
    capacity: int
    dtype: torch.dtype

    @property
    def two_four(self) -> bool:
        """Whether they are for the sparse tensor cores."""
        return self.offsets is None

    @property
    def nbytes(self) -> int:
        """Bytes of data and offsets."""
        return self.data.nbytes + (0 if self.offsets is None else self.offsets.nbytes)


def padded_cols(cols: int) -> int:
    """The columns that records have: whole tiles."""
    return -(-cols // COLS) * COLS


def row_blocks(rows: int) -> int:
    """The blocks of 16 rows that records have."""
    return -(-rows // (ROWS * _GROUP)) * _GROUP


def parts(packed: PackedWeight) -> tuple[Tensor, Tensor, Tensor]:
    """values, bitmask and row_ptr of a packed weight."""
    return packed.values, packed.bitmask, packed.row_ptr


@contextmanager
def fitting(packed: PackedWeight, cols: int, device: torch.device) -> Iterator[None]:
    """Turns an out-of-memory error, while a weight becomes records on a GPU, into one line.

    Args:
        packed: the weight, on this or on another device.
        device: the GPU.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        rows, size = len(packed.bitmask), sum(part.nbytes for part in parts(packed))
        needed = 2 * size + 2 * rows * padded_cols(cols) + _WORKSPACE
        raise BesaError(
            f"{device} has no room for a packed weight of {rows} x {cols}: it takes "
            f"{size / 2**20:.0f} MiB, and {needed / 2**20:.0f} MiB while it is laid out for the "
            f"GPU{_left(device)}; spread the model over more GPUs, end what else uses this one, or "
            "export the model with int8 values"
        ) from None


def _left(device: torch.device) -> str:
    """How much memory a GPU has left, what torch keeps for itself included; in words."""
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return f", where {free / 2**20:.0f} MiB of {total / 2**20:.0f} are left"


@torch.no_grad()
def to_records(values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int) -> Records:
    """The records of a packed weight.

    Args:
        values: [nonzeros] bfloat16, float16 or int8.
        bitmask: uint8 [rows, ceil(cols / 8)].
        row_ptr: int64 [rows + 1].
        cols: the weight's columns.

    Returns:
        Records on the same device, with no memory in common with the arguments.

    Raises:
        ValueError: if the values are of another type.
    """
    if values.dtype not in (torch.bfloat16, torch.float16, torch.int8):
        raise ValueError(f"values are bfloat16, float16 or int8 on a GPU, not {values.dtype}")
    rows = len(bitmask)
    if not rows * cols:
        nothing = torch.zeros(1, dtype=torch.int32, device=values.device)
        empty = torch.empty(0, dtype=torch.uint8, device=values.device)
        return Records(empty, nothing, rows, cols, MASK_BYTES, values.dtype)
    if _fits_two_four(values, bitmask):
        data = torch.empty(
            row_blocks(rows) * padded_cols(cols) // COLS * TWO_FOUR_BYTES,
            dtype=torch.uint8,
            device=values.device,
        )
        done = 0
        for dense, keep in _dense_chunks(values, bitmask, row_ptr, cols):
            part = two_four(dense, keep)
            data[done : done + part.numel()] = part.flatten()
            done += part.numel()
        return Records(data, None, rows, cols, TWO_FOUR_BYTES, values.dtype)

    units = _units(values, bitmask, cols)
    offsets = F.pad(units.flatten().cumsum(0), (1, 0))
    data = torch.zeros(int(offsets[-1]) * UNIT, dtype=torch.uint8, device=values.device)
    done = 0
    for dense, keep in _dense_chunks(values, bitmask, row_ptr, cols):
        count = dense.numel() // (ROWS * COLS)
        fill(data, offsets[done : done + count], dense, keep)
        done += count
    return Records(data, offsets.int(), rows, cols, int(units.max()) * UNIT, values.dtype)


@torch.no_grad()
def to_packed(records: Records) -> tuple[Tensor, Tensor, Tensor]:
    """values, bitmask and row_ptr, as `to_records` got them."""
    if not records.rows * records.cols:
        device, width = records.data.device, -(-records.cols // 8)
        empty = torch.empty(records.rows, width, dtype=torch.uint8, device=device)
        none = torch.empty(0, dtype=records.dtype, device=device)
        return none, empty, row_pointers_reference(empty)
    values, bitmask = [], []
    across = padded_cols(records.cols) // COLS
    step = max(1, _CHUNK // (ROWS * _GROUP * across * COLS)) * _GROUP
    for block in range(0, row_blocks(records.rows), step):
        tiles = slice(block * across, min(block + step, row_blocks(records.rows)) * across)
        decoded = from_two_four if records.two_four else from_tiles
        dense, keep = (
            untiled(part, across)[: records.rows - block * ROWS, : records.cols]
            for part in decoded(records, tiles)
        )
        if not len(dense):
            continue
        values.append(dense[keep])
        bitmask.append(to_bits(keep))
    together = torch.cat(bitmask)
    return torch.cat(values), together, row_pointers_reference(together)


def _fits_two_four(values: Tensor, bitmask: Tensor) -> bool:
    """Whether no four neighbours keep more than two, of 16-bit values without a -0.0."""
    if values.dtype == torch.int8:
        return False
    for part in bitmask.split(max(1, _CHUNK // max(1, bitmask.shape[1]))):
        if any(bool((count > 2).any()) for count in bits_of_fours(part)):
            return False
    return not any(
        bool((part == MINUS_ZERO).any()) for part in values.view(torch.int16).split(_CHUNK)
    )


def _units(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    """How long each record is, in units of 16 bytes: int64 [row blocks, tiles]."""
    rows, across = len(bitmask), padded_cols(cols) // COLS
    counts = torch.zeros(row_blocks(rows), across, dtype=torch.int64, device=values.device)
    step = max(1, _CHUNK // (ROWS * max(1, cols))) * ROWS
    for row in range(0, rows, step):
        part = bitmask[row : row + step]
        part = F.pad(part, (0, across * 8 - part.shape[1], 0, -len(part) % ROWS))
        low, high = bits_of_fours(part)
        tiles = (low + high).view(-1, ROWS, across, 8).sum((1, 3), dtype=torch.int64)
        counts[row // ROWS : row // ROWS + len(tiles)] = tiles
    return (MASK_BYTES + counts * values.element_size() + UNIT - 1) // UNIT


def _dense_chunks(
    values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Some row blocks at a time, as [tiles, 2, 8, 4, 4, 4]: the weights, and which there are.

    The dimensions of a tile are h, g, t, s, j of records.cuh.
    """
    rows, padded = len(bitmask), padded_cols(cols)
    step = max(1, _CHUNK // (ROWS * _GROUP * max(1, padded))) * ROWS * _GROUP
    bounds = [*row_ptr[:-1:step].tolist(), int(row_ptr[-1])] if rows else []
    for i, row in enumerate(range(0, rows, step)):
        keep = F.pad(from_bits(bitmask[row : row + step], cols), (0, padded - cols))
        dense = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
        dense.masked_scatter_(keep, values[bounds[i] : bounds[i + 1]])
        below = -len(keep) % (ROWS * _GROUP)
        yield tiled(F.pad(dense, (0, 0, 0, below))), tiled(F.pad(keep, (0, 0, 0, below)))
