"""The optimal brain surgeon's update at a fixed mask, column by column, as SparseGPT does it.

Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", NIPS 1992,
in the form of Frantar and Alistarh, arXiv 2301.00774: from left to right, the error of a pruned
weight is spread over the columns still to come. Columns to the left are not touched again, which
is what ADMM does better.

>>> x = torch.randn(64, 16)
>>> mask = torch.rand(4, 16) > 0.5
>>> bool((update(torch.randn(4, 16), mask, x.T @ x)[~mask] == 0).all())
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.pruning.compensate import compensate, inverse_factor

_BLOCK = 128  # columns that are visited before the rest of the matrix is told of their errors


def update(weight: Tensor, mask: Tensor, hessian: Tensor) -> Tensor:
    """The weight [rows, cols], zero where the bool `mask` is False, float32.

    Args:
        weight: [rows, cols], the dense weight.
        mask: bool [rows, cols], True where a weight is kept.
        hessian: float32 [cols, cols], X^T X over the calibration tokens.
    """
    weight = weight.float().clone(memory_format=torch.contiguous_format)
    mask = mask.contiguous()
    factor = inverse_factor(hessian)
    for start in range(0, weight.shape[1], _BLOCK):
        stop = min(start + _BLOCK, weight.shape[1])
        compensate(weight, mask, start, stop, factor)
    return torch.where(mask, weight, 0.0)
