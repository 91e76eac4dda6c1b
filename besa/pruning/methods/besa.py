"""BESA: masks that are learned towards the dense block's output.

Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity
Allocation", ICLR 2024, arXiv 2402.16880. Unstructured: how sparse each row or each linear is is
learned (`besa.pruning.allocate`) and projected, so that the block has exactly the zeros asked for;
within a row the least important weights go, as in Wanda. N:M: the rate of every row is fixed, and
the choice within the groups is learned (`besa.pruning.nm`).

>>> linears = [Linear("q_proj", "q_proj.weight", 1, 4, 8, transposed=False)]
>>> rates = torch.tensor([0.25, 0.5, 0.5, 0.75])  # as they were learned
>>> masks = allocated_masks(linears, {"q_proj": torch.rand(1, 4, 8)}, [rates], zeros=16)
>>> masks["q_proj"].sum(2)  # kept, by row
tensor([[6, 4, 4, 2]])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.allocate import RankedMatrix, RateLearner, rank_buckets
from besa.pruning.block_run import BlockRun, Pruned, Tensors
from besa.pruning.budget import Budget
from besa.pruning.methods import Method
from besa.pruning.nm import ChoiceLearner
from besa.pruning.patterns import counts_for, lowest_pruned


def mask(run: BlockRun, budget: Budget) -> Pruned:
    if not run.linears:
        return Pruned({})
    return _choose_weights(run, budget) if budget.pattern.m else _allocate(run, budget)


def _allocate(run: BlockRun, budget: Budget) -> Pruned:
    """Learned rates, projected to the budget."""
    scores = run.scores()
    matrices = [
        RankedMatrix(weight, rank_buckets(score))
        for weight, score in zip(run.matrices(run.weights), run.matrices(scores), strict=True)
    ]
    learner = RateLearner(matrices, budget.rate, run.config.granularity)
    learned = run.learn(learner, run.config.epochs)
    rates = [torch.cat(parts) for parts in run.by_linear(learned.value)]
    return Pruned(allocated_masks(run.linears, scores, rates, budget.zeros), losses=learned.losses)


def _choose_weights(run: BlockRun, budget: Budget) -> Pruned:
    """Learned choice of N among M neighbours."""
    weights, scores = run.matrices(run.weights), run.matrices(run.scores())
    learner = ChoiceLearner(weights, scores, budget.pattern)
    learned = run.learn(learner, run.config.epochs)
    parts = zip(run.linears, run.by_linear(learned.value), strict=True)
    return Pruned({x.name: torch.stack(masks) for x, masks in parts}, losses=learned.losses)


def allocated_masks(
    linears: Sequence[Linear], scores: Mapping[str, Tensor], rates: Sequence[Tensor], zeros: int
) -> Tensors:
    """Masks whose rows follow `rates`, shifted so that they prune exactly `zeros` in all.

    Args:
        scores: importance float32 [groups, rows, cols] by name.
        rates: float [groups * rows] per linear.
    """
    cols = [torch.full(rate.shape, x.cols) for x, rate in zip(linears, rates, strict=True)]
    counts = counts_for(torch.cat(list(rates)).cpu(), torch.cat(cols), zeros)
    masks = {}
    for linear, part in zip(linears, counts.split([len(rate) for rate in rates]), strict=True):
        flat = scores[linear.name].reshape(-1, linear.cols)
        kept = lowest_pruned(flat, part.to(flat.device))
        masks[linear.name] = kept.view(linear.groups, linear.rows, linear.cols)
    return masks


METHOD = Method(mask, targets=True)
