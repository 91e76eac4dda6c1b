"""Magnitude pruning: every matrix loses its smallest weights, wherever they are.

Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv
1506.02626. It looks at no text: the least that a method must beat.

>>> linears = [Linear("q_proj", "q_proj.weight", 1, 4, 8, transposed=False)]
>>> masks = magnitude_masks(linears, {"q_proj": torch.randn(1, 4, 8)}, Budget(zeros=10, rate=0.3))
>>> int((~masks["q_proj"]).sum())
10
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.block_run import BlockRun, Pruned, Tensors
from besa.pruning.budget import Budget
from besa.pruning.methods import Method
from besa.pruning.patterns import lowest_pruned_overall, n_of_m
from besa.pruning.scores import magnitude


def magnitude_masks(
    linears: Sequence[Linear], weights: Mapping[str, Tensor], budget: Budget
) -> Tensors:
    """Masks of the linears, which all lose the same share.

    Args:
        weights: [groups, rows, cols] by name.
    """
    pattern, shares = budget.pattern, budget.shares(linears)
    masks = {}
    for linear in linears:
        scores = magnitude(weights[linear.name])
        masks[linear.name] = torch.stack(
            [
                n_of_m(matrix, pattern.n, pattern.m)
                if pattern.m
                else lowest_pruned_overall(matrix, share)
                for matrix, share in zip(scores, shares[linear.name], strict=True)
            ]
        )
    return masks


def mask(run: BlockRun, budget: Budget) -> Pruned:
    return Pruned(magnitude_masks(run.linears, run.weights, budget))


METHOD = Method(mask)
