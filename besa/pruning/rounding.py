"""Rounds weights to few values, so that what is left makes up for the errors.

A group of columns shares a step, and a weight becomes a whole number of steps. The largest weight
of a group becomes the largest whole number, always: from its values alone anybody finds the step
again, as `besa export` does, and packs these very values.

Of four bits, the steps of a row are whole numbers times a scale (see besa.formats.int4).

`fit` clips: a smaller step is finer for most weights and cuts the largest, and that with the least
error stays. `compensated` is GPTQ (Frantar et al., arXiv 2210.17323): from left to right, the error
of a rounded weight is spread over the columns still to come, in the way of `compensate`.

>>> generator = torch.Generator().manual_seed(0)
>>> x = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
>>> weight, grid = torch.randn(4, 16, generator=generator), Grid.parse("int4")
>>> mask, hessian = weight.abs() > 0.5, x.T @ x
>>> def error(rounded):
...     difference = rounded - weight * mask
...     return float(((difference @ hessian) * difference).sum())
>>> nearest = rounded(weight * mask, hessian.diagonal(), grid, torch.float32)
>>> error(compensated(weight * mask, mask, hessian, grid, torch.float32)) < error(nearest)
True
>>> torch.equal(rounded(nearest, hessian.diagonal(), grid, torch.float32), nearest)
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.formats.int4 import clipped_steps, whole_steps
from besa.formats.packed import groups_of
from besa.pruning.compensate import inverse_factor
from besa.pruning.grid import Grid

# Columns that are visited before the rest of the matrix is told of their errors.
_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Steps:
    """The steps of one matrix.

    Attributes:
        size: float32 [rows, cols], the step of each weight's group.
        peaks: int8 [rows, cols], the whole number of each group's largest weight; 0 elsewhere.
        levels: the largest whole number.
    """

    size: Tensor
    peaks: Tensor
    levels: int

    def round(self, weight: Tensor, columns: slice = slice(None)) -> Tensor:
        """The nearest values of a weight [rows, cols], or of some columns of one."""
        size, peaks = self.size[:, columns], self.peaks[:, columns]
        whole = (weight / size).round_().clamp_(-self.levels, self.levels)
        return torch.where(peaks == 0, whole, peaks.float()) * size


def fit(weight: Tensor, importance: Tensor, grid: Grid, dtype: torch.dtype) -> Steps:
    """The steps with the least squared error, among those of a few clips.

    Args:
        weight: float32 [rows, cols].
        importance: [cols], what the square of a column's error counts.
        grid: bits and groups.
        dtype: that the weights are stored in; it holds the largest value of a group as it is.
    """
    peaks = torch.zeros_like(weight, dtype=torch.int8)
    parts = groups_of(weight, grid.group_size)
    counts = [part[0] for part in groups_of(importance.expand(1, -1), grid.group_size)]
    sizes = [
        clipped_steps(part, count, grid.levels, dtype)
        for part, count in zip(parts, counts, strict=True)
    ]
    if grid.bits == 4:
        scale, steps = whole_steps(parts, counts, sizes, dtype)
        sizes = list((steps * scale).split([size.shape[1] for size in sizes], 1))
    for part, tops in zip(parts, groups_of(peaks, grid.group_size), strict=True):
        if part.numel():
            place = part.abs().argmax(2, keepdim=True)
            tops.scatter_(2, place, (grid.levels * part.gather(2, place).sign()).to(tops.dtype))
    spread = [
        size.unsqueeze(2).expand(part.shape).flatten(1)
        for size, part in zip(sizes, parts, strict=True)
    ]
    size = torch.cat(spread, 1)
    return Steps(torch.where(size > 0, size, 1.0), peaks, grid.levels)


def rounded(weight: Tensor, importance: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """The nearest values of a weight [rows, cols], float32; those of a rounded one are its own.

    Args:
        weight: zeros stay.
        importance, grid, dtype: as in `fit`.
    """
    weight = weight.float()
    return fit(weight, importance, grid, dtype).round(weight).to(dtype).float()


def compensated(
    weight: Tensor, mask: Tensor, hessian: Tensor, grid: Grid, dtype: torch.dtype
) -> Tensor:
    """The weight rounded, column by column, float32 [rows, cols]; zero where the mask is False.

    Args:
        weight: [rows, cols], zero where the mask is False.
        mask: bool [rows, cols].
        hessian: float32 [cols, cols], X^T X over the calibration tokens.
        grid, dtype: as in `fit`.
    """
    weight = weight.float().clone(memory_format=torch.contiguous_format)
    steps = fit(weight, hessian.diagonal(), grid, dtype)
    factor = inverse_factor(hessian)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        block, square = weight[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(block)
        for j in range(stop - start):
            column = slice(start + j, start + j + 1)
            value = torch.where(mask[:, column], steps.round(block[:, j : j + 1], column), 0.0)
            error = (block[:, j : j + 1] - value) / square[j, j]
            block[:, j + 1 :] -= error * square[j, j + 1 :]
            block[:, j : j + 1] = value
            errors[:, j : j + 1] = error
        weight[:, stop:] -= errors @ factor[start:stop, stop:]
    return weight.to(dtype).float()
