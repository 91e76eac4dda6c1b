"""Wanda: every row loses its least important weights, at the same rate.

Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, arXiv
2306.11695. A weight's importance is |W_ij| * ||X_j||_2 over the calibration tokens
(`besa.pruning.scores`). Experts that saw no token are pruned by magnitude.

>>> linears = [Linear("q_proj", "q_proj.weight", 1, 4, 8, transposed=False)]
>>> masks = wanda_masks(linears, {"q_proj": torch.rand(1, 4, 8)}, Budget(zeros=16, rate=0.5))
>>> masks["q_proj"].sum(2)  # kept, by row
tensor([[4, 4, 4, 4]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.block_run import BlockRun, Pruned, Tensors
from besa.pruning.budget import Budget
from besa.pruning.methods import Method
from besa.pruning.patterns import counts_for, lowest_pruned, n_of_m


def wanda_masks(linears: Sequence[Linear], scores: Mapping[str, Tensor], budget: Budget) -> Tensors:
    """Masks of the linears, which all lose the same share.

    Args:
        scores: importance float32 [groups, rows, cols] by name.
    """
    pattern, shares = budget.pattern, budget.shares(linears)
    masks = {}
    for linear in linears:
        flat = scores[linear.name].reshape(-1, linear.cols)
        if pattern.m:
            kept = n_of_m(flat, pattern.n, pattern.m)
        else:
            rates = torch.full((linear.rows,), budget.rate)
            counts = torch.cat([counts_for(rates, linear.cols, n) for n in shares[linear.name]])
            kept = lowest_pruned(flat, counts.to(flat.device))
        masks[linear.name] = kept.view(linear.groups, linear.rows, linear.cols)
    return masks


def mask(run: BlockRun, budget: Budget) -> Pruned:
    return Pruned(wanda_masks(run.linears, run.scores(), budget))


METHOD = Method(mask)
