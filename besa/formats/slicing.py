"""Parts of packed weights, and several as one: what tensor parallelism and fused linears need.

>>> packed = pack(torch.randn(6, 32))
>>> take_columns(take_rows(packed, torch.tensor([0, 1, 5])), 8, 24).shape
torch.Size([3, 16])
>>> stack_rows([packed, packed, packed]).shape
torch.Size([18, 32])
>>> join_rows([packed], [torch.tensor([5, 4, 3, 2, 1, 0])]).shape
torch.Size([6, 32])

Runs of rows are views of the same memory. All else goes through the dense form of that one weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from besa.formats.packed import FormatError, Packed, pack


def take_rows(packed: Packed, rows: Tensor) -> Packed:
    """The weight of some outputs, in the order given.

    Args:
        rows: int64 [n], each from 0 up to `out`.

    Returns:
        A weight [n, in]; it shares memory with `packed` where the rows follow each other.
    """
    count = len(rows)
    if count == 0 or torch.equal(rows, torch.arange(count) + rows[0]):
        first = int(rows[0]) if count else 0
        begin, end = packed.row_ptr[first], packed.row_ptr[first + count]
        return replace(
            packed,
            values=packed.values[begin:end],
            bitmask=packed.bitmask[first : first + count],
            row_ptr=packed.row_ptr[first : first + count + 1] - begin,
            scale=None if packed.scale is None else packed.scale[first : first + count],
            steps=None if packed.steps is None else packed.steps[first : first + count],
        )
    scale = None if packed.scale is None else packed.scale[rows]
    steps = None if packed.steps is None else packed.steps[rows]
    return pack(packed.unpack_numbers()[rows], scale, packed.group_size, steps)


def take_columns(packed: Packed, start: int, stop: int) -> Packed:
    """The weight of the inputs from `start` up to `stop`: [out, stop - start].

    Raises:
        FormatError: if a group of columns that share a scale would be cut.
    """
    if (start, stop) == (0, packed.in_features):
        return packed
    scale, size, steps = packed.scale, packed.group_size, packed.steps
    if scale is not None and size is not None:
        if start % size or (stop % size and stop != packed.in_features):
            raise FormatError(
                f"columns {start} to {stop} cut a group of {size} that shares a scale: quantize "
                "with one scale a row, or split the model otherwise"
            )
        groups = slice(start // size, -(-stop // size))
        if steps is None:
            scale = scale[:, groups]
        else:
            steps = steps[:, groups]
    return pack(packed.unpack_numbers()[:, start:stop], scale, size, steps)


def stack_rows(parts: Sequence[Packed]) -> Packed:
    """One weight of all parts' rows, one part after the other, in memory of its own.

    Raises:
        FormatError: if they differ in their columns, types or scales.
    """
    first = parts[0]
    for other in parts:
        if (other.in_features, other.group_size) != (first.in_features, first.group_size):
            raise FormatError("parts of one weight differ in their columns or their groups")
        if other.values.dtype != first.values.dtype:
            raise FormatError(
                f"parts of one weight have values of {first.values.dtype} and {other.values.dtype}"
            )
    ends = torch.tensor([part.values.numel() for part in parts]).cumsum(0)
    pointers = [first.row_ptr[:1]]
    for part, end in zip(parts, ends, strict=True):
        pointers.append(part.row_ptr[1:] + (end - part.values.numel()))
    scales = [part.scale for part in parts if part.scale is not None]
    steps = [part.steps for part in parts if part.steps is not None]
    return Packed(
        torch.cat([part.values for part in parts]),
        torch.cat([part.bitmask for part in parts]),
        torch.cat(pointers),
        torch.cat(scales) if scales else None,
        first.in_features,
        first.group_size,
        torch.cat(steps) if steps else None,
    )


def join_rows(parts: Sequence[Packed], rows: Sequence[Tensor]) -> Packed:
    """One weight of all parts' rows, each at its place.

    Args:
        rows: int64 [out] for each part, the rows of the whole that its rows are; each once.

    Returns:
        A weight that shares memory with a part that is all of it, in order.

    Raises:
        FormatError: if the parts differ in their columns, types or scales.
    """
    whole = parts[0] if len(parts) == 1 else stack_rows(parts)
    return take_rows(whole, torch.cat(list(rows)).argsort())
