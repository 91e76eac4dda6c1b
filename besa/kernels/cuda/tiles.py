"""The tiles that records hold, as tensors: `records.cuh` says what the bytes of a record are.

A tile is 16 rows by 64 columns of a weight, here [h, g, t, s, j] = [2, 8, 4, 4, 4]: row g + 8 h,
column 16 t + 4 s + j.

>>> matrix = torch.arange(16 * 128).view(16, 128)
>>> tiles = tiled(matrix)
>>> tiles.shape, bool((untiled(tiles, across=2) == matrix).all())
(torch.Size([2, 2, 8, 4, 4, 4]), True)
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from besa.kernels.cuda.records import Records

ROWS, COLS = 16, 64  # of a tile
MASK_BYTES, TWO_FOUR_BYTES, UNIT = 128, 1152, 16
MINUS_ZERO = -0x8000  # as int16


def tiled(matrix: Tensor) -> Tensor:
    """[rows, cols] as [tiles, h, g, t, s, j]."""
    across = matrix.shape[1] // COLS
    blocks = matrix.view(-1, 2, 8, across, 4, 4, 4)
    return blocks.permute(0, 3, 1, 2, 4, 5, 6).reshape(-1, 2, 8, 4, 4, 4)


def untiled(tiles: Tensor, across: int) -> Tensor:
    """[tiles, h, g, t, s, j] as [rows, cols]."""
    blocks = tiles.reshape(-1, across, 2, 8, 4, 4, 4).permute(0, 2, 3, 1, 4, 5, 6)
    return blocks.reshape(-1, across * COLS)


def fill(data: Tensor, offsets: Tensor, dense: Tensor, keep: Tensor) -> None:
    """Writes masks and values of some tiles to where their records begin."""
    words = _word(keep.permute(*_bit_order(dense.dtype)).reshape(-1, 32, 32))
    lanes = torch.arange(32, device=data.device)
    data.view(torch.int32)[(offsets[:, None] * 4 + lanes).flatten()] = words.flatten()
    there, ordered = _in_order(keep, dense.dtype), _in_order(dense, dense.dtype)
    first = (offsets[:, None] * UNIT + MASK_BYTES) // dense.element_size()
    places = first + there.cumsum(1) - 1
    data.view(dense.dtype)[places[there]] = ordered[there]


def from_tiles(records: Records, tiles: slice) -> tuple[Tensor, Tensor]:
    """The weights of some tiles and which there are, [tiles, h, g, t, s, j]."""
    assert records.offsets is not None
    offsets = records.offsets[tiles].long()
    device, size = records.data.device, records.dtype.itemsize
    lanes = torch.arange(32, device=device)
    words = records.data.view(torch.int32)[offsets[:, None] * 4 + lanes].long()
    bits = ((words[:, :, None] >> shifts(32, device)) & 1).bool()
    if records.dtype == torch.int8:
        keep = bits.view(-1, 8, 4, 2, 4, 4).permute(0, 3, 1, 2, 4, 5)  # from g, t, h, s, j
    else:
        keep = bits.view(-1, 8, 4, 4, 2, 4).permute(0, 4, 1, 2, 3, 5)  # from g, t, s, h, j
    there = _in_order(keep, records.dtype)
    places = (offsets[:, None] * UNIT + MASK_BYTES) // size + there.cumsum(1) - 1
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


def two_four(dense: Tensor, keep: Tensor) -> Tensor:
    """2:4 records of some tiles, uint8 [tiles, 1152]; -0.0 where a four keeps fewer than two."""
    keep = _to_mma(keep)  # tile, h, g, four of its row, column
    pattern = (keep.to(torch.uint8) << shifts(4, keep.device)).sum(4, dtype=torch.int64)
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
    words = (bits << 4 * shifts(8, keep.device).long()).sum(2)
    return torch.cat([_int32(words).view(torch.uint8), registers.view(torch.uint8)], 1)


def from_two_four(records: Records, tiles: slice) -> tuple[Tensor, Tensor]:
    """As `from_tiles`."""
    data = records.data.view(-1, TWO_FOUR_BYTES)[tiles]
    words = data[:, :MASK_BYTES].contiguous().view(torch.int32).long()
    nibbles = (words[:, :, None] >> 4 * shifts(8, data.device).long()) & 0x0F
    nibbles = nibbles.view(-1, 8, 2, 2, 2, 4).permute(0, 4, 1, 2, 3, 5).reshape(-1, 2, 8, 16)
    index = torch.stack([nibbles & 3, nibbles >> 2], 4)
    registers = data[:, MASK_BYTES:].contiguous().view(torch.int16)
    kept = registers.view(-1, 2, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6)
    kept = kept.reshape(-1, 2, 8, 16, 2)
    fours = torch.full((*kept.shape[:4], 4), MINUS_ZERO, dtype=torch.int16, device=data.device)
    fours = _from_mma(fours.scatter_(4, index, kept))
    keep = fours != MINUS_ZERO
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
    return _int32((bits.long() << shifts(32, bits.device).long()).sum(-1))


def _int32(words: Tensor) -> Tensor:
    """Numbers below 2^32 as int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def shifts(count: int, device: torch.device) -> Tensor:
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
