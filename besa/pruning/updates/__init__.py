"""The updates: what makes the weights that a mask keeps make up for those that it takes.

An update solves one least-squares problem for each matrix: with the inputs' Gram matrix H = X^T X,
the kept weights are to minimise ||X (W - V)^T||^2 = trace((W - V) H (W - V)^T) over the V that are
zero where the mask is. W is the dense weight, or what would serve best in its place now that the
inputs have changed (`besa.pruning.grams`). An update changes no mask, so that it can follow any
method that leaves the weights as they were.

To add one, write `besa/pruning/updates/NAME.py` with a function `update(weight, mask, hessian)`,
and name it in `besa/methods.py`.

>>> load("admm").__module__
'besa.pruning.updates.admm'
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import torch
from torch import Tensor

from besa.pruning.block_run import BlockRun, Pruned
from besa.pruning.rounding import compensated

# weight [rows, cols], mask bool [rows, cols], hessian float32 [cols, cols] -> float32 [rows, cols]
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> Update:
    """The update that `besa.methods.UPDATES` lists under this name."""
    update: Update = import_module(f"{__name__}.{name}").update
    return update


def updated(run: BlockRun, pruned: Pruned, update: Update) -> Pruned:
    """The same masks, with the weights that they keep updated, float32.

    Linears are updated in the order in which the block uses them, each for what it reads in the
    block as updated so far, and towards what it gives in the dense model: it makes up for its own
    zeros and for what the ones before it could not. Experts that saw no token keep their weights.
    Where the settings ask for rounded weights, each linear is rounded before the next one's turn.

    Raises:
        BesaError: a linear's statistics overflowed.
    """
    weights = run.kept(pruned)
    grid = run.config.quantize
    for level in run.levels():
        grams = run.grams(level, weights)
        for linear in level.linears:
            parts = zip(
                run.weights[linear.name],
                pruned.masks[linear.name],
                grams.of(linear),
                strict=True,
            )
            matrices = []
            for weight, mask, gram in parts:
                if gram is not None:
                    gram.check(linear)
                    weight = update(gram.aim(weight), mask, gram.own)
                    if grid is not None:
                        stored = run.stored_dtype(linear)
                        weight = compensated(weight, mask, gram.own, grid, stored)
                matrices.append(torch.where(mask, weight.float(), 0.0))
            weights[linear.name] = torch.stack(matrices)
    return replace(pruned, weights=weights)


def squared_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """||X (weight - other)^T||^2 of each row, float32 [rows]."""
    difference = weight.float() - other.float()
    return ((difference @ hessian) * difference).sum(1)
