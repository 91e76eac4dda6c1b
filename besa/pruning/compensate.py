"""What a pruned weight's columns to the right do to make up for it: the step of SparseGPT and OBS.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, Algorithm 1. With H^-1 = U^T U of the inputs' damped Gram matrix H = X^T X, the
error of a pruned weight w_j is w_j / U_jj, and each column k from j on changes by -error * U_jk.

>>> x = torch.randn(64, 16)
>>> weight, mask = torch.randn(4, 16), torch.rand(4, 16) > 0.5
>>> compensate(weight, mask, 0, 8, inverse_factor(x.T @ x))  # the first eight columns
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from besa.kernels.cuda import compensate as on_gpu
from besa.pruning.patterns import n_of_m


@dataclass(frozen=True)
class GroupChoice:
    """N:M: the mask of a group is chosen when its first column is reached.

    Attributes:
        n, m: n of every m neighbours stay.
        dead: bool [cols], True for inputs that never fire.
    """

    n: int
    m: int
    dead: Tensor


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> Tensor:
    """Upper Cholesky factor U of the damped inverse Hessian, H^-1 = U^T U.

    Args:
        hessian: float32 [cols, cols], X^T X.
        damping: what is added to the diagonal, as a fraction of its mean; tenfold more is tried
            where the matrix is not positive definite.

    Returns:
        float32 [cols, cols], upper triangular.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = mean  # an input that never fires
    while True:
        damped = hessian + torch.eye(len(hessian), device=hessian.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return factor
        damping *= 10


def importance(columns: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """What the output loses with each weight, w^2 / U_jj^2; zero where the input never fires.

    Args:
        columns: [rows, n] of the weight.
        diagonal, dead: [n], of U and of the columns.
    """
    return (columns / diagonal).square().masked_fill(dead, 0.0)


def compensate(
    weight: Tensor,
    mask: Tensor,
    start: int,
    stop: int,
    factor: Tensor,
    choice: GroupChoice | None = None,
) -> None:
    """Visits the columns [start, stop): what each loses is made up for by those to its right.

    Args:
        weight: float32 [rows, cols], changed in place. Pruned weights are not set to zero.
        mask: bool [rows, cols], True where a weight is kept; written where there is a `choice`.
        factor: of `inverse_factor`.
        choice: of the mask, as the columns are reached; None if it is given. [start, stop) has
            whole groups.
    """
    block, kept = weight[:, start:stop], mask[:, start:stop]
    square = factor[start:stop, start:stop]
    dead = None if choice is None else choice.dead[start:stop]
    n, m = (choice.n, choice.m) if choice else (0, 0)
    errors_of = on_gpu.block_errors if on_gpu.serves(block) else block_errors_reference
    weight[:, stop:] -= errors_of(block, kept, square, n, m, dead) @ factor[start:stop, stop:]


def block_errors_reference(
    block: Tensor, mask: Tensor, factor: Tensor, n: int = 0, m: int = 0, dead: Tensor | None = None
) -> Tensor:
    """Visits the columns of a block from left to right, and changes those to their right in it.

    Args:
        block: float32 [rows, width], changed in place.
        mask: bool [rows, width]; written where there is an `m`.
        factor: the square of U on its diagonal, [width, width].
        n, m: choose n of every m neighbours; 0: the mask is given.
        dead: bool [width], with `m`: the inputs that never fire.

    Returns:
        The columns' errors, float32 [rows, width].
    """
    errors = torch.zeros_like(block)
    for j in range(block.shape[1]):
        if dead is not None and j % m == 0:
            group = slice(j, j + m)
            found = importance(block[:, group], factor.diagonal()[group], dead[group])
            mask[:, group] = n_of_m(found, n, m)
        error = torch.where(mask[:, j], 0.0, block[:, j]) / factor[j, j]
        block[:, j:] -= error.unsqueeze(1) * factor[j, j:].unsqueeze(0)
        errors[:, j] = error
    return errors
