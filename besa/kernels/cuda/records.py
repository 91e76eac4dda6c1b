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
from functools import cache
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from besa.errors import BesaError
from besa.kernels.packing import row_pointers_reference

if TYPE_CHECKING:
    from besa.kernels.linear import PackedWeight

ROWS, COLS = 16, 64  # of a tile
_GROUP = 4  # row blocks are made a multiple of
_MASK_BYTES, _TWO_FOUR_BYTES, _UNIT = 128, 1152, 16

# Elements that are dense at a time: their temporaries take some 30 bytes each.
_CHUNK = 1 << 22

# Bytes that it takes to lay a weight out and to time products with it, besides both of its forms
# and a dense copy.
_WORKSPACE = 128 << 20

_MINUS_ZERO = -0x8000  # as int16


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
        return Records(empty, nothing, rows, cols, _MASK_BYTES, values.dtype)
    if _fits_two_four(values, bitmask):
        data = torch.empty(
            row_blocks(rows) * padded_cols(cols) // COLS * _TWO_FOUR_BYTES,
            dtype=torch.uint8,
            device=values.device,
        )
        done = 0
        for dense, keep in _dense_chunks(values, bitmask, row_ptr, cols):
            part = _two_four(dense, keep)
            data[done : done + part.numel()] = part.flatten()
            done += part.numel()
        return Records(data, None, rows, cols, _TWO_FOUR_BYTES, values.dtype)

    units = _units(values, bitmask, cols)
    offsets = F.pad(units.flatten().cumsum(0), (1, 0))
    data = torch.zeros(int(offsets[-1]) * _UNIT, dtype=torch.uint8, device=values.device)
    done = 0
    for dense, keep in _dense_chunks(values, bitmask, row_ptr, cols):
        count = dense.numel() // (ROWS * COLS)
        _fill(data, offsets[done : done + count], dense, keep)
        done += count
    return Records(data, offsets.int(), rows, cols, int(units.max()) * _UNIT, values.dtype)


@torch.no_grad()
def to_packed(records: Records) -> tuple[Tensor, Tensor, Tensor]:
    """values, bitmask and row_ptr, as `to_records` got them."""
    width = -(-records.cols // 8)
    if not records.rows * records.cols:
        device = records.data.device
        empty = torch.empty(records.rows, width, dtype=torch.uint8, device=device)
        none = torch.empty(0, dtype=records.dtype, device=device)
        return none, empty, row_pointers_reference(empty)
    values, bitmask = [], []
    across = padded_cols(records.cols) // COLS
    step = max(1, _CHUNK // (ROWS * _GROUP * across * COLS)) * _GROUP
    for block in range(0, row_blocks(records.rows), step):
        tiles = slice(block * across, min(block + step, row_blocks(records.rows)) * across)
        decoded = _from_two_four if records.two_four else _from_tiles
        dense, keep = (
            _untiled(part, across)[: records.rows - block * ROWS, : records.cols]
            for part in decoded(records, tiles)
        )
        if not len(dense):
            continue
        values.append(dense[keep])
        eights = F.pad(keep, (0, 8 * width - records.cols)).unflatten(1, (width, 8))
        bitmask.append(
            (eights.to(torch.uint8) << _shifts(8, keep.device)).sum(2, dtype=torch.uint8)
        )
    together = torch.cat(bitmask)
    return torch.cat(values), together, row_pointers_reference(together)


def _fits_two_four(values: Tensor, bitmask: Tensor) -> bool:
    """Whether no four neighbours keep more than two, of 16-bit values without a -0.0."""
    if values.dtype == torch.int8:
        return False
    for part in bitmask.split(max(1, _CHUNK // max(1, bitmask.shape[1]))):
        pairs = (part & 0x55) + (part >> 1 & 0x55)  # bits set in each two
        fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
        if ((fours & 0x0F) > 2).any() or (fours >> 4 > 2).any():
            return False
    return not any(
        bool((part == _MINUS_ZERO).any()) for part in values.view(torch.int16).split(_CHUNK)
    )


def _units(values: Tensor, bitmask: Tensor, cols: int) -> Tensor:
    """How long each record is, in units of 16 bytes: int64 [row blocks, tiles]."""
    rows, across = len(bitmask), padded_cols(cols) // COLS
    counts = torch.zeros(row_blocks(rows), across, dtype=torch.int64, device=values.device)
    step = max(1, _CHUNK // (ROWS * max(1, cols))) * ROWS
    for row in range(0, rows, step):
        part = bitmask[row : row + step]
        part = F.pad(part, (0, across * 8 - part.shape[1], 0, -len(part) % ROWS))
        bits = part - (part >> 1 & 0x55)
        bits = (bits & 0x33) + (bits >> 2 & 0x33)
        bits = (bits + (bits >> 4)) & 0x0F
        tiles = bits.view(-1, ROWS, across, 8).sum((1, 3), dtype=torch.int64)
        counts[row // ROWS : row // ROWS + len(tiles)] = tiles
    return (_MASK_BYTES + counts * values.element_size() + _UNIT - 1) // _UNIT


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
        part = bitmask[row : row + step]
        bits = (part[:, :, None] >> _shifts(8, part.device)) & 1
        keep = F.pad(bits.flatten(1)[:, :cols].bool(), (0, padded - cols))
        dense = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
        dense.masked_scatter_(keep, values[bounds[i] : bounds[i + 1]])
        below = -len(keep) % (ROWS * _GROUP)
        yield _tiled(F.pad(dense, (0, 0, 0, below))), _tiled(F.pad(keep, (0, 0, 0, below)))


def _tiled(matrix: Tensor) -> Tensor:
    """[rows, cols] as [tiles, h, g, t, s, j]."""
    across = matrix.shape[1] // COLS
    blocks = matrix.view(-1, 2, 8, across, 4, 4, 4)
    return blocks.permute(0, 3, 1, 2, 4, 5, 6).reshape(-1, 2, 8, 4, 4, 4)


def _untiled(tiles: Tensor, across: int) -> Tensor:
    """[tiles, h, g, t, s, j] as [rows, cols]."""
    blocks = tiles.reshape(-1, across, 2, 8, 4, 4, 4).permute(0, 2, 3, 1, 4, 5, 6)
    return blocks.reshape(-1, across * COLS)


def _fill(data: Tensor, offsets: Tensor, dense: Tensor, keep: Tensor) -> None:
    """Writes masks and values of some tiles to where their records begin."""
    words = _word(keep.permute(*_bit_order(dense.dtype)).reshape(-1, 32, 32))
    lanes = torch.arange(32, device=data.device)
    data.view(torch.int32)[(offsets[:, None] * 4 + lanes).flatten()] = words.flatten()
    there, ordered = _in_order(keep, dense.dtype), _in_order(dense, dense.dtype)
    first = (offsets[:, None] * _UNIT + _MASK_BYTES) // dense.element_size()
    places = first + there.cumsum(1) - 1
    data.view(dense.dtype)[places[there]] = ordered[there]


def _from_tiles(records: Records, tiles: slice) -> tuple[Tensor, Tensor]:
    """The weights of some tiles and which there are, [tiles, h, g, t, s, j]."""
    assert records.offsets is not None
    offsets = records.offsets[tiles].long()
    device, size = records.data.device, records.dtype.itemsize
    lanes = torch.arange(32, device=device)
    words = records.data.view(torch.int32)[offsets[:, None] * 4 + lanes].long()
    bits = ((words[:, :, None] >> _shifts(32, device)) & 1).bool()
    if records.dtype == torch.int8:
        keep = bits.view(-1, 8, 4, 2, 4, 4).permute(0, 3, 1, 2, 4, 5)  # from g, t, h, s, j
    else:
        keep = bits.view(-1, 8, 4, 4, 2, 4).permute(0, 4, 1, 2, 3, 5)  # from g, t, s, h, j
    there = _in_order(keep, records.dtype)
    places = (offsets[:, None] * _UNIT + _MASK_BYTES) // size + there.cumsum(1) - 1
    ordered = torch.zeros(there.shape, dtype=records.dtype, device=device)
    ordered[there] = records.data.view(records.dtype)[places[there]]
    if records.dtype == torch.int8:
        dense = ordered.view(-1, 2, 2, 8, 4, 2, 4).permute(0, 1, 3, 4, 2, 5, 6)
    else:
        dense = ordered.view(-1, 2, 4, 8, 4, 4).permute(0, 1, 3, 4, 2, 5)
    return dense.reshape(-1, 2, 8, 4, 4, 4), keep


def _bit_order(dtype: torch.dtype) -> tuple[int, ...]:
    """The dimensions of [tiles, h, g, t, s, j] as the bits of the words come."""
    return (0, 2, 3, 1, 4, 5) if dtype == torch.int8 else (0, 2, 3, 4, 1, 5)


def _in_order(tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """[tiles, h, g, t, s, j] as [tiles, 1024] in the order of the values: h, slot, g, t, column."""
    if dtype == torch.int8:  # slots of 8 columns
        tiles = tiles.reshape(-1, 2, 8, 4, 2, 2, 4).permute(0, 1, 4, 2, 3, 5, 6)
    else:
        tiles = tiles.permute(0, 1, 4, 2, 3, 5)
    return tiles.reshape(-1, ROWS * COLS)


def _two_four(dense: Tensor, keep: Tensor) -> Tensor:
    """2:4 records of some tiles, uint8 [tiles, 1152]; -0.0 where a four keeps fewer than two."""
    keep = _to_mma(keep)  # tile, h, g, four of its row, column
    pattern = (keep.to(torch.uint8) << _shifts(4, keep.device)).sum(4, dtype=torch.int64)
    index = _pairs(str(keep.device))[pattern]  # low and high column
    zero = torch.tensor(-0.0, dtype=dense.dtype, device=dense.device)
    kept = torch.where(keep, _to_mma(dense), zero).gather(4, index)
    # A registers: of mma j, four q = 4 half + t of row g + 8 h is register 2 half + h of lane
    # 4 g + t.
    registers = kept.view(-1, 2, 8, 2, 2, 4, 2).permute(0, 3, 2, 5, 4, 1, 6)
    registers = registers.reshape(len(kept), 1024 // 2).contiguous()
    # Metadata: mma j, half u, of lane 4 g + 2 j + u: bit 16 h + 4 t.
    nibbles = (index[..., 0] | index[..., 1] << 2).view(-1, 2, 8, 2, 2, 4)
    bits = nibbles.permute(0, 2, 3, 4, 1, 5).reshape(len(kept), 32, 8)
    words = (bits << 4 * _shifts(8, keep.device).long()).sum(2)
    return torch.cat([_int32(words).view(torch.uint8), registers.view(torch.uint8)], 1)


def _from_two_four(records: Records, tiles: slice) -> tuple[Tensor, Tensor]:
    """As `_from_tiles`."""
    data = records.data.view(-1, _TWO_FOUR_BYTES)[tiles]
    words = data[:, :_MASK_BYTES].contiguous().view(torch.int32).long()
    nibbles = (words[:, :, None] >> 4 * _shifts(8, data.device).long()) & 0x0F
    nibbles = nibbles.view(-1, 8, 2, 2, 2, 4).permute(0, 4, 1, 2, 3, 5).reshape(-1, 2, 8, 16)
    index = torch.stack([nibbles & 3, nibbles >> 2], 4)
    registers = data[:, _MASK_BYTES:].contiguous().view(torch.int16)
    kept = registers.view(-1, 2, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    kept = kept.reshape(-1, 2, 8, 16, 2)
    fours = torch.full((*kept.shape[:4], 4), _MINUS_ZERO, dtype=torch.int16, device=data.device)
    fours = _from_mma(fours.scatter_(4, index, kept))
    keep = fours != _MINUS_ZERO
    return fours.masked_fill(~keep, 0).view(records.dtype), keep


def _to_mma(tiles: Tensor) -> Tensor:
    """[tiles, h, g, t, s, j] as [tiles, h, g, 8 j + q, column] of the sparse tensor cores."""
    fours = tiles.reshape(-1, 2, 8, 2, 2, 4, 4)  # q % 2, j, q // 2
    fours = torch.stack([fours[:, :, :, :, 0], fours[:, :, :, :, 1].roll(-2, 5)], 3)
    return fours.transpose(4, 5).reshape(-1, 2, 8, 16, 4)


def _from_mma(fours: Tensor) -> Tensor:
    """The inverse of `_to_mma`."""
    fours = fours.view(-1, 2, 8, 2, 4, 2, 4).transpose(4, 5)  # j, q % 2, q // 2
    tiles = torch.stack([fours[:, :, :, 0], fours[:, :, :, 1].roll(2, 5)], 4)
    return tiles.reshape(-1, 2, 8, 4, 4, 4)


def _word(bits: Tensor) -> Tensor:
    """bool [..., 32] as int32 [...], the first bit lowest."""
    return _int32((bits.long() << _shifts(32, bits.device).long()).sum(-1))


def _int32(words: Tensor) -> Tensor:
    """Numbers below 2^32 as int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _shifts(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=torch.uint8 if count <= 8 else torch.int64, device=device)


@cache
def _pairs(device: str) -> Tensor:
    """Of four columns, the two that stand for a mask of them: int64 [16, 2], ascending."""
    pairs = []
    for mask in range(16):
        kept = [column for column in range(4) if mask >> column & 1][:2]
        others = [column for column in range(4) if column not in kept]
        pairs.append(sorted([*kept, *others[: 2 - len(kept)]]))
    return torch.tensor(pairs, device=device)
