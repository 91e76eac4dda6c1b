"""The updates: what makes the weights that a mask keeps make up for those that it takes.

An update solves one least-squares problem for each matrix: with the inputs' Gram matrix H = X^T X,
the kept weights are to minimise ||X (W - V)^T||^2 = trace((W - V) H (W - V)^T) over the V that are
zero where the mask is. It changes no mask, so that it can follow any method that leaves the weights
as they were.

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
from besa.pruning.scores import check_hessian

# weight [rows, cols], mask bool [rows, cols], hessian float32 [cols, cols] -> float32 [rows, cols]
Update = Callable[[Tensor, Tensor, Tensor], Tensor]


def load(name: str) -> Update:
    """The update that `besa.methods.UPDATES` lists under this name."""
    update: Update = import_module(f"{__name__}.{name}").update
    return update


def updated(run: BlockRun, pruned: Pruned, update: Update) -> Pruned:
    """The same masks, with the weights that they keep updated, float32.

    Experts that saw no token keep their weights.

    Raises:
        BesaError: a linear's statistics overflowed.
    """
    assert run.hessians is not None
    weights = {}
    for linear in run.linears:
        matrices = []
        parts = zip(
            run.weights[linear.name],
            pruned.masks[linear.name],
            run.hessians.of(linear),
            strict=True,
        )
        for weight, mask, hessian in parts:
            check_hessian(hessian, linear, "an update", "leave --update out")
            seen = bool(hessian.any())
            matrices.append(update(weight, mask, hessian) if seen else weight.float())
        weights[linear.name] = torch.stack(matrices)
    return replace(pruned, weights=weights)


def squared_error(weight: Tensor, other: Tensor, hessian: Tensor) -> Tensor:
    """||X (weight - other)^T||^2 of each row, float32 [rows]."""
    difference = weight.float() - other.float()
    return ((difference @ hessian) * difference).sum(1)
