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
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from besa.model.blocks import Linear
from besa.pruning.allocate import RankedMatrix, RateLearner, rank_buckets
from besa.pruning.block_run import BlockRun, Pruned, Tensors
from besa.pruning.budget import Budget
from besa.pruning.learn import Learned, Learner, learn
from besa.pruning.masked import WeightFactory
from besa.pruning.methods import Method
from besa.pruning.nm import ChoiceLearner
from besa.pruning.patterns import counts_for, lowest_pruned

T = TypeVar("T")


def mask(run: BlockRun, budget: Budget) -> Pruned:
    if not run.linears:
        return Pruned({})
    return _choose_weights(run, budget) if budget.pattern.m else _allocate(run, budget)


def _allocate(run: BlockRun, budget: Budget) -> Pruned:
    """Learned rates, projected to the budget."""
    scores = run.scores()
    matrices = [
        RankedMatrix(weight, rank_buckets(score))
        for weight, score in zip(_matrices(run, run.weights), _matrices(run, scores), strict=True)
    ]
    learned = _learn(run, RateLearner(matrices, budget.rate, run.config.granularity))
    rates = [torch.cat(parts) for parts in _by_linear(run, learned.value)]
    return Pruned(allocated_masks(run.linears, scores, rates, budget.zeros), losses=learned.losses)


def _choose_weights(run: BlockRun, budget: Budget) -> Pruned:
    """Learned choice of N among M neighbours."""
    weights, scores = _matrices(run, run.weights), _matrices(run, run.scores())
    learned = _learn(run, ChoiceLearner(weights, scores, budget.pattern))
    parts = zip(run.linears, _by_linear(run, learned.value), strict=True)
    return Pruned({x.name: torch.stack(masks) for x, masks in parts}, losses=learned.losses)


def _learn(run: BlockRun, learner: Learner[T]) -> Learned[T]:
    def forward(i: int, weights: Sequence[WeightFactory]) -> Tensor:
        parts = zip(run.linears, _by_linear(run, weights), strict=True)
        return run.output(i, {x.name: factories for x, factories in parts})

    return learn(
        learner,
        forward,
        run.targets,
        epochs=run.config.epochs,
        generator=run.generator,
        on_step=run.on_step,
        on_order=run.expect,
    )


def _matrices(run: BlockRun, tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The matrices [rows, cols] of all groups of all linears, linear by linear."""
    return [matrix for x in run.linears for matrix in tensors[x.name].contiguous().unbind()]


def _by_linear(run: BlockRun, values: Sequence[T]) -> list[list[T]]:
    """One value for each matrix, gathered by linear."""
    rest = iter(values)
    return [list(islice(rest, linear.groups)) for linear in run.linears]


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
