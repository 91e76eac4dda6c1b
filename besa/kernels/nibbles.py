"""int4 values, two a byte: how a row's nonzeros lie in nibbles. nibbles.h says the same in C++.

>>> weight = torch.tensor([[1, 0, -7, 3]], dtype=torch.int8)
>>> values, bitmask, row_ptr = pack(weight)
>>> values      # all in low nibbles, as the row is shorter than 64
tensor([1, 9, 3], dtype=torch.uint8)
>>> torch.equal(unpack(values, bitmask, row_ptr, 4), weight)
True

The columns of a row are taken 64 at a time: the first 64's values lie in the low nibbles of the
row's bytes, the next 64's in the high nibbles, and so on in turn, each kind in the order of its
columns. A row has as many bytes as the more numerous kind has values. A nibble is a number in two's
complement.
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.kernels.abi import GROUP_SIZES
from besa.kernels.packing import from_bits, pack_mask

COLUMNS = 64
MOST = 7  # the largest number; the least is its negative
MOST_STEP = 18  # what is times it is at most 126

# Elements that are worked on at a time.
_CHUNK = 1 << 24

_BITS_SET = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8)


def row_pointers(bitmask: Tensor) -> Tensor:
    """Where the bytes of each row begin.

    Args:
        bitmask: uint8 [out, ceil(in / 8)].

    Returns:
        int64 [out + 1]; row r has the bytes from the r-th up to the one after it.
    """
    lengths = _counts(bitmask).amax(1) if bitmask.numel() else bitmask.new_zeros(len(bitmask))
    pointers = torch.zeros(len(bitmask) + 1, dtype=torch.int64, device=bitmask.device)
    torch.cumsum(lengths, 0, out=pointers[1:])
    return pointers


def count(bitmask: Tensor) -> int:
    """How many bits are set."""
    return int(_counts(bitmask).sum()) if bitmask.numel() else 0


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packs whole numbers from -7 to 7 without their zeros.

    Args:
        weight: int8 [out, in].

    Returns:
        The nibbles, uint8 [bytes]; the bitmask, uint8 [out, ceil(in / 8)]; `row_pointers` of it.

    Raises:
        ValueError: a number is larger.
    """
    if weight.numel() and int(weight.abs().max()) > MOST:
        raise ValueError(f"four bits hold whole numbers from -{MOST} to {MOST}")
    bitmask, _ = pack_mask(weight)
    pointers = row_pointers(bitmask)
    values = torch.zeros(int(pointers[-1]), dtype=torch.uint8, device=weight.device)
    for rows in _chunks(weight.shape):
        parts = _by_nibble(weight[rows])
        for shift, part in zip((0, 4), parts.unbind(1), strict=True):
            kept = part != 0
            values[_places(kept, pointers[rows])] |= (part[kept].view(torch.uint8) & 15) << shift
    return values, bitmask, pointers


def unpack(values: Tensor, bitmask: Tensor, row_ptr: Tensor, cols: int) -> Tensor:
    """The numbers in their places, int8 [out, in]; the inverse of `pack`.

    Raises:
        ValueError: the tensors disagree.
    """
    if row_ptr[-1] != values.numel() or not torch.equal(row_ptr, row_pointers(bitmask)):
        raise ValueError("values, bitmask and row_ptr do not belong together")
    weight = torch.zeros(len(bitmask), cols, dtype=torch.int8, device=values.device)
    for rows in _chunks(weight.shape):
        kept = _by_nibble(from_bits(bitmask[rows], cols))
        parts = torch.zeros(kept.shape, dtype=torch.int8, device=values.device)
        for shift, part, mask in zip((0, 4), parts.unbind(1), kept.unbind(1), strict=True):
            nibbles = values[_places(mask, row_ptr[rows])] >> shift & 15
            part[mask] = (nibbles ^ 8).view(torch.int8) - 8
        weight[rows] = parts.transpose(1, 2).flatten(1)[:, :cols]
    return weight


def expand(values: Tensor, bitmask: Tensor, row_ptr: Tensor, steps: Tensor, cols: int) -> Tensor:
    """The numbers in their places, each times the step of its group of columns: int8 [out, in].

    Args:
        steps: uint8 [out, groups], from 1 to `MOST_STEP`.
    """
    weight = unpack(values, bitmask, row_ptr, cols)
    if steps.shape[1] > 1:
        size = next(size for size in GROUP_SIZES if -(-cols // size) == steps.shape[1])
        steps = steps.repeat_interleave(size, 1)[:, :cols]
    return weight * steps.view(torch.int8)


def _counts(bitmask: Tensor) -> Tensor:
    """How many values of each row lie in low and in high nibbles: int64 [out, 2]."""
    counts = _BITS_SET.to(bitmask.device)[bitmask.int()]
    step = COLUMNS // 8
    counts = torch.nn.functional.pad(counts, (0, -counts.shape[1] % (2 * step)))
    return counts.view(len(bitmask), -1, 2, step).sum((1, 3))


def _chunks(shape: torch.Size) -> list[slice]:
    step = max(1, _CHUNK // max(1, shape[1]))
    return [slice(row, row + step) for row in range(0, shape[0], step)]


def _by_nibble(matrix: Tensor) -> Tensor:
    """[out, in] by where its columns go: [out, low and high, chunks, 64], with zeros behind."""
    padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % (2 * COLUMNS)))
    return padded.view(len(matrix), -1, 2, COLUMNS).transpose(1, 2)


def _places(kept: Tensor, row_ptr: Tensor) -> Tensor:
    """The bytes that the values of one kind lie in, row by row: int64 [values]."""
    kept = kept.flatten(1)
    within = kept.cumsum(1) - 1
    return (within + row_ptr[: len(kept), None])[kept]
