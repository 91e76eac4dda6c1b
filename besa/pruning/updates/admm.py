"""ADMM at a fixed mask.

Boža, "Fast and Effective Weight Update for Pruned Large Language Models", TMLR 2024, arXiv
2401.02938, algorithm 1. Columns are scaled to inputs of norm 1. V is free and close to the dense
weight's outputs, Z keeps to the mask, and the scaled dual variable U pulls them together:

    V = (W H + Z - U) (H + I)^-1        Z = mask(V + U)        U = U + V - Z

All iterations share one inverse, which all rows share, too. A row that is no better off than with
its weights left as they were keeps them: 20 iterations of ADMM promise nothing.

>>> generator = torch.Generator().manual_seed(0)
>>> x = torch.randn(64, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
>>> weight = torch.randn(4, 8, generator=generator)
>>> mask = weight.abs() > 0.5
>>> before = squared_error(weight, weight * mask, x.T @ x)
>>> after = squared_error(weight, update(weight, mask, x.T @ x), x.T @ x)
>>> bool((after <= before).all())
True
"""

from __future__ import annotations

import torch
from torch import Tensor

from besa.pruning.updates import squared_error

_ITERATIONS = 20
_DAMPING = 0.01  # added to the scaled H, whose diagonal is 1
_PENALTY = 1.0  # of V's distance from Z, on the same scale


def update(weight: Tensor, mask: Tensor, hessian: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """The weight [rows, cols], zero where the bool `mask` is False, float32.

    Args:
        weight: [rows, cols], the dense weight.
        mask: bool [rows, cols], True where a weight is kept.
        hessian: float32 [cols, cols], X^T X over the calibration tokens.
    """
    weight = weight.float()
    sizes = hessian.diagonal().sqrt()
    sizes = torch.where(sizes > 0, sizes, 1.0)  # an input that never fires
    identity = torch.eye(len(hessian), device=hessian.device)
    scaled = hessian / sizes / sizes.unsqueeze(1) + _DAMPING * identity
    lower = torch.linalg.cholesky(scaled + _PENALTY * identity)
    inverse = torch.cholesky_inverse(lower)

    free = weight * sizes
    target = free @ scaled
    kept = torch.where(mask, free, 0.0)
    dual = torch.zeros_like(free)
    for _ in range(iterations):
        dual += free - kept
        free = (target + _PENALTY * (kept - dual)) @ inverse
        kept = torch.where(mask, free + dual, 0.0)

    found, as_it_was = kept / sizes, torch.where(mask, weight, 0.0)
    better = squared_error(weight, found, hessian) < squared_error(weight, as_it_was, hessian)
    return torch.where(better.unsqueeze(1), found, as_it_was)
