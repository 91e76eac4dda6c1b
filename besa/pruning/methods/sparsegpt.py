"""SparseGPT: masks weights and updates what is left to make up for what is gone.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv 2301.00774, Algorithm 1. Columns are visited from left to right; a pruned weight's error is
spread over the columns still to come by the inverse Hessian's Cholesky factor. The mask of a
block of columns is chosen when the block is reached, from the weights as updated so far, by
w^2 / [H^-1]_jj^2. Experts that saw no token are pruned by magnitude, and not updated.

>>> x = torch.randn(64, 16)
>>> pruned, mask = sparsegpt(torch.randn(4, 16), x.T @ x, zeros=32)
>>> int((pruned == 0).sum())
32
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.budget import Budget
from besa.pruning.config import UNSTRUCTURED, Pattern
from besa.pruning.methods import Method
from besa.pruning.methods.magnitude import magnitude_masks
from besa.pruning.patterns import n_of_m
from besa.pruning.scores import Hessians, check_hessian


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


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    zeros: int,
    pattern: Pattern = UNSTRUCTURED,
    blocksize: int = 128,
) -> tuple[Tensor, Tensor]:
    """Prunes one matrix to exactly `zeros` zeros (ignored for N:M) and updates the rest.

    Args:
        weight: [rows, cols].
        hessian: float32 [cols, cols], X^T X over the calibration tokens.
        zeros: weights to prune.
        pattern: unstructured or N:M along the columns.
        blocksize: columns whose mask is chosen at once; a multiple of M for N:M.

    Returns:
        The new weight, float32 [rows, cols], and the bool keep-mask.
    """
    weight = weight.float().clone()
    cols = weight.shape[1]
    factor = inverse_factor(hessian)
    dead = hessian.diagonal() == 0
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    if pattern.m:
        blocksize = max(pattern.m, blocksize - blocksize % pattern.m)
    done = 0

    def scores(columns: Tensor, start: int, stop: int) -> Tensor:
        found = (columns / factor.diagonal()[start:stop]).square()
        return found.masked_fill(dead[start:stop], 0.0)  # no output needs them

    def kept(column: int) -> Tensor:
        if pattern.m and column % pattern.m == 0:
            last = column + pattern.m
            found = scores(weight[:, column:last], column, last)
            mask[:, column:last] = n_of_m(found, pattern.n, pattern.m)
        return mask[:, column]

    for start in range(0, cols, blocksize):
        stop = min(start + blocksize, cols)
        if not pattern.m:
            share = zeros * stop // cols - done
            done += share
            block = weight[:, start:stop]
            order = scores(block, start, stop).flatten().argsort(stable=True)
            keep = torch.ones(block.numel(), dtype=torch.bool, device=weight.device)
            keep[order[:share]] = False
            mask[:, start:stop] = keep.reshape(block.shape)

        compensate(weight, start, stop, factor, kept)
    return torch.where(mask, weight, 0.0), mask


def compensate(
    weight: Tensor, start: int, stop: int, factor: Tensor, kept: Callable[[int], Tensor]
) -> None:
    """Visits the columns [start, stop): what each loses is made up for by those to its right.

    Args:
        weight: float32 [rows, cols], changed in place. Pruned weights are not set to zero.
        factor: of `inverse_factor`.
        kept: the bool keep-mask [rows] of a column, asked for when the column is reached.
    """
    block, local = weight[:, start:stop], factor[start:stop, start:stop]
    errors = torch.zeros_like(block)
    for j in range(stop - start):
        error = torch.where(kept(start + j), 0.0, block[:, j]) / local[j, j]
        block[:, j:] -= error.unsqueeze(1) * local[j, j:].unsqueeze(0)
        errors[:, j] = error
    weight[:, stop:] -= errors @ factor[start:stop, stop:]


def sparsegpt_weights(
    linears: Sequence[Linear], weights: Mapping[str, Tensor], hessians: Hessians, budget: Budget
) -> Pruned:
    """Masks of the linears, which all lose the same share, and new weights in float32.

    Args:
        weights: [groups, rows, cols] by name.

    Raises:
        BesaError: a linear's statistics overflowed.
    """
    shares = budget.shares(linears)
    by_magnitude = magnitude_masks(linears, weights, budget)
    masks, updated = {}, {}
    for linear in linears:
        kept, matrices = [], []
        for group, matrix in enumerate(weights[linear.name]):
            hessian = hessians.of(linear)[group]
            check_hessian(hessian, linear, "SparseGPT", "choose another method")
            if hessian.any():
                share = shares[linear.name][group]
                matrix, mask = sparsegpt(matrix, hessian, share, budget.pattern)
            else:
                mask = by_magnitude[linear.name][group]
            kept.append(mask)
            matrices.append(matrix.float())
        masks[linear.name], updated[linear.name] = torch.stack(kept), torch.stack(matrices)
    return Pruned(masks, updated)


def mask_and_update(run: BlockRun, budget: Budget) -> Pruned:
    assert run.hessians is not None
    return sparsegpt_weights(run.linears, run.weights, run.hessians, budget)


METHOD = Method(mask_and_update, hessians=True)
