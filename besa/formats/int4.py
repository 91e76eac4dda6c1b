"""Weights of four bits: a number from -7 to 7, times the step of its group, times the row's scale.

>>> weight = torch.tensor([[0.7, -0.1, 0.0, 0.2] * 8 + [0.07, 0.01, 0.0, -0.02] * 8])
>>> numbers, scale, steps = quantize_int4(weight, group_size=32)
>>> numbers[0, :4], steps
(tensor([ 7, -1,  0,  2], dtype=torch.int8), tensor([[18,  2]], dtype=torch.uint8))
>>> packed = pack(numbers, scale, 32, steps)
>>> packed.values.dtype, bool((packed.unpack() - weight).abs().max() < 0.01)
(torch.uint8, True)

A step is a whole number from 1 to 18. So number times step fits eight bits, and products are those
of int8 weights with a scale a row: a kernel adds up whole numbers, whatever the groups. On a real
model's weights, half of them zero, such steps cost 1 to 4% of squared error against steps of any
size, and a byte takes the place of a 16-bit float (LOG.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.formats.packed import Packed, check_float, groups_of, pack
from besa.kernels.nibbles import MOST, MOST_STEP

# How much of a group's largest weight may be the largest value; the first that is best stays.
_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@torch.no_grad()
def quantize_int4(weight: Tensor, group_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Rounds a weight to four bits, with the clips that leave the least squared error.

    Weights that are such values already, as `besa prune --quantize int4` leaves them, keep them.
    What rounds to 0 is a zero from then on.

    Args:
        weight: [out, in], floating point, in any layout.
        group_size: how many columns share a step, one of `GROUP_SIZES`; None: the whole row.

    Returns:
        What `pack` takes: numbers, int8 [out, in]; scale, float32 [out, 1]; and steps, uint8
        [out, groups].

    Raises:
        ValueError: if `weight` is no such matrix, has a NaN or infinity, or for another group size.
    """
    check_float(weight, group_size)
    dtype, weight = weight.dtype, weight.float()
    if not weight.isfinite().all():
        raise ValueError("weight has a NaN or an infinity, which int4 cannot hold")
    parts = groups_of(weight, group_size)
    counts = [torch.ones(part.shape[1:], device=weight.device) for part in parts]
    sizes = [
        clipped_steps(part, count, MOST, dtype) for part, count in zip(parts, counts, strict=True)
    ]
    scale, steps = whole_steps(parts, counts, sizes, dtype)
    numbers = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    targets, own = groups_of(numbers, group_size), _split(steps, weight, group_size)
    for part, target, step in zip(parts, targets, own, strict=True):
        size = (step * scale).unsqueeze(2)
        target.copy_((part / size).round_().clamp_(-MOST, MOST))
    return numbers, scale, steps


def in_eight_bits(packed: Packed) -> Packed:
    """An int4 weight as int8 with a scale a row, which is the same weight."""
    return pack(packed.unpack_values(), packed.scale)


def in_four_bits(packed: Packed, steps: Tensor, group_size: int | None) -> Packed:
    """The inverse of `in_eight_bits`."""
    numbers = packed.unpack_values()
    for part, own in zip(
        groups_of(numbers, group_size), _split(steps, numbers, group_size), strict=True
    ):
        part.div_(own.unsqueeze(2), rounding_mode="trunc")
    return pack(numbers, packed.scale, group_size, steps)


def clipped_steps(weight: Tensor, importance: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """The step of each group with the least squared error, among those of a few clips.

    Args:
        weight: float32 [out, groups, columns].
        importance: [groups, columns], what the square of an error counts.
        levels: the largest whole number.
        dtype: that the weights are stored in; it holds the largest value of a group as it is.

    Returns:
        float32 [out, groups]; 0 for a group of zeros.
    """
    if not weight.numel():
        return weight.new_zeros(weight.shape[:2])
    most = weight.abs().amax(2, keepdim=True)
    best, size = torch.full_like(most, torch.inf), torch.zeros_like(most)
    for clip in _CLIPS:
        tried = (clip * most).to(dtype).float() / levels
        error = _error(weight, importance, tried, levels)
        better = error < best
        best, size = torch.where(better, error, best), torch.where(better, tried, size)
    return size.squeeze(2)


def whole_steps(
    weights: list[Tensor], importance: list[Tensor], sizes: list[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Steps as whole numbers times a scale a row: the ones beside `sizes` with the lesser error.

    Args:
        weights, importance: of several lists of groups, as in `clipped_steps`.
        sizes: of each list what `clipped_steps` gave.
        dtype: it holds the largest value of a row as it is.

    Returns:
        The scale, float32 [out, 1], 1 for a row of zeros, and the steps of all lists, uint8
        [out, groups].
    """
    rows = sizes[0].new_zeros(len(sizes[0]), 1)
    largest = torch.cat([rows, *sizes], 1).amax(1, keepdim=True) * MOST
    scale = largest.to(dtype).float() / (MOST * MOST_STEP)
    scale[scale == 0] = 1  # also where the quotient underflows
    steps = []
    for weight, counts, size in zip(weights, importance, sizes, strict=True):
        wanted = size / scale  # of the largest in a row `MOST_STEP`, but for its last bits
        less = (wanted + 0.01).floor_().clamp_(1, MOST_STEP)
        more = (wanted - 0.01).ceil_().clamp_(1, MOST_STEP)
        errors = [
            _error(weight, counts, (step * scale).unsqueeze(2), MOST).squeeze(2)
            for step in (more, less)
        ]
        steps.append(torch.where(errors[1] < errors[0], less, more).to(torch.uint8))
    return scale, torch.cat(steps, 1)


def _split(steps: Tensor, matrix: Tensor, group_size: int | None) -> tuple[Tensor, ...]:
    """The steps of each of `groups_of(matrix, group_size)`."""
    return steps.split([part.shape[1] for part in groups_of(matrix, group_size)], 1)


def _error(weight: Tensor, importance: Tensor, size: Tensor, levels: int) -> Tensor:
    """The squared error of each group, [out, groups, 1], if it is rounded to steps of that size."""
    size = torch.where(size > 0, size, 1.0)
    whole = (weight / size).round_().clamp_(-levels, levels)
    return ((whole * size - weight).square_() * importance).sum(2, keepdim=True)
