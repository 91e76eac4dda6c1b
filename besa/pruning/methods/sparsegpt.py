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

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.processes.ranks import ALONE, Ranks
from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.budget import Budget
from besa.pruning.compensate import GroupChoice, compensate, importance, inverse_factor
from besa.pruning.config import UNSTRUCTURED, Pattern
from besa.pruning.methods import Method
from besa.pruning.methods.magnitude import magnitude_masks
from besa.pruning.scores import Hessians, check_hessian


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
    weight = weight.float().clone(memory_format=torch.contiguous_format)
    cols = weight.shape[1]
    factor = inverse_factor(hessian)
    dead = hessian.diagonal() == 0  # no output needs them
    mask = torch.ones(weight.shape, dtype=torch.bool, device=weight.device)
    choice = GroupChoice(pattern.n, pattern.m, dead) if pattern.m else None
    if pattern.m:
        blocksize = max(pattern.m, blocksize - blocksize % pattern.m)
    done = 0

    for start in range(0, cols, blocksize):
        stop = min(start + blocksize, cols)
        if choice is None:
            share = zeros * stop // cols - done
            done += share
            block = weight[:, start:stop]
            found = importance(block, factor.diagonal()[start:stop], dead[start:stop])
            lowest = found.flatten().argsort(stable=True)[:share]
            keep = torch.ones(block.numel(), dtype=torch.bool, device=weight.device)
            mask[:, start:stop] = keep.index_fill_(0, lowest, False).reshape(block.shape)

        compensate(weight, mask, start, stop, factor, choice)
    return torch.where(mask, weight, 0.0), mask


def sparsegpt_weights(
    linears: Sequence[Linear],
    weights: Mapping[str, Tensor],
    hessians: Hessians,
    budget: Budget,
    ranks: Ranks = ALONE,
) -> Pruned:
    """Masks of the linears, which all lose the same share, and new weights in float32.

    Args:
        weights: [groups, rows, cols] by name.
        ranks: the processes that share the matrices; all of them get all.

    Raises:
        BesaError: a linear's statistics overflowed.
    """
    matrices = [(x, group) for x in linears for group in range(x.groups)]
    for linear, group in matrices:
        check_hessian(hessians.of(linear)[group], linear, "SparseGPT", "choose another method")
    shares = budget.shares(linears)
    masks = magnitude_masks(linears, weights, budget)
    updated = {
        x.name: torch.empty_like(
            weights[x.name], dtype=torch.float32, memory_format=torch.contiguous_format
        )
        for x in linears
    }
    owners = ranks.deal([x.cols**2 * (x.cols + x.rows) for x, _ in matrices])
    for (linear, group), owner in zip(matrices, owners, strict=True):
        if owner != ranks.rank:
            continue
        hessian = hessians.of(linear)[group]
        matrix, place = weights[linear.name][group], updated[linear.name][group]
        if hessian.any():
            share = shares[linear.name][group]
            matrix, masks[linear.name][group] = sparsegpt(matrix, hessian, share, budget.pattern)
        place.copy_(matrix)
    for found in (masks, updated):
        places = [found[linear.name][group] for linear, group in matrices]
        ranks.exchange_(zip(places, owners, strict=True))
    return Pruned(masks, updated)


def mask_and_update(run: BlockRun, budget: Budget) -> Pruned:
    assert run.hessians is not None
    return sparsegpt_weights(run.linears, run.weights, run.hessians, budget, run.ranks)


METHOD = Method(mask_and_update, hessians=True)
