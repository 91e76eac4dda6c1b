"""The methods: from a block's weights and input statistics to masks.

Each gives keep-masks [groups, rows, cols] by the linears' names, exactly `zeros` pruned weights
in all for unstructured patterns; SparseGPT gives new weights too. Experts that saw no token are
pruned by magnitude.

    masks = wanda_masks(linears, scored, zeros=8_000_000, rate=0.5, pattern=Pattern())
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

from besa.errors import BesaError
from besa.model.blocks import Linear
from besa.pruning.allocate import AllocatedLinear, learn_rates, rank_buckets
from besa.pruning.config import Pattern, PruneConfig
from besa.pruning.masked import Make
from besa.pruning.nm import learn_choice
from besa.pruning.patterns import counts_for, lowest_pruned, lowest_pruned_overall, n_of_m
from besa.pruning.scores import Hessians, magnitude
from besa.pruning.sparsegpt import sparsegpt

Masks = dict[str, Tensor]
T = TypeVar("T")


def even_shares(linears: Sequence[Linear], zeros: int, rate: float) -> dict[str, list[int]]:
    """How many of `zeros` each group of each linear gets at one and the same rate."""
    matrices = [x for x in linears for _ in range(x.groups)]
    sizes = torch.tensor([x.rows * x.cols for x in matrices])
    shares = iter(counts_for(torch.full((len(matrices),), rate), sizes, zeros).tolist())
    return {x.name: [next(shares) for _ in range(x.groups)] for x in linears}


def wanda_masks(
    linears: Sequence[Linear],
    scored: Mapping[str, Tensor],
    zeros: int,
    rate: float,
    pattern: Pattern,
) -> Masks:
    """Wanda (arXiv 2306.11695): every row loses its least important weights at the same rate.

    Args:
        scored: importance float32 [groups, rows, cols] by name.
    """
    shares = even_shares(linears, zeros, rate)
    masks = {}
    for linear in linears:
        flat = scored[linear.name].reshape(-1, linear.cols)
        if pattern.m:
            mask = n_of_m(flat, pattern.n, pattern.m)
        else:
            rates = torch.full((linear.rows,), rate)
            counts = torch.cat([counts_for(rates, linear.cols, n) for n in shares[linear.name]])
            mask = lowest_pruned(flat, counts.to(flat.device))
        masks[linear.name] = mask.view(linear.groups, linear.rows, linear.cols)
    return masks


def magnitude_masks(
    linears: Sequence[Linear],
    weights: Mapping[str, Tensor],
    zeros: int,
    rate: float,
    pattern: Pattern,
) -> Masks:
    """Every matrix loses its smallest weights, wherever they are.

    Args:
        weights: [groups, rows, cols] by name.
    """
    shares = even_shares(linears, zeros, rate)
    masks = {}
    for linear in linears:
        masks[linear.name] = torch.stack(
            [
                n_of_m(matrix, pattern.n, pattern.m)
                if pattern.m
                else lowest_pruned_overall(matrix, share)
                for matrix, share in zip(
                    magnitude(weights[linear.name]), shares[linear.name], strict=True
                )
            ]
        )
    return masks


def sparsegpt_weights(
    linears: Sequence[Linear],
    weights: Mapping[str, Tensor],
    hessians: Hessians,
    zeros: int,
    rate: float,
    pattern: Pattern,
) -> tuple[Masks, dict[str, Tensor]]:
    """SparseGPT (arXiv 2301.00774): masks, and new weights float32 [groups, rows, cols]."""
    shares = even_shares(linears, zeros, rate)
    by_magnitude = magnitude_masks(linears, weights, zeros, rate, pattern)
    masks, updated = {}, {}
    for linear in linears:
        kept, matrices = [], []
        for group, matrix in enumerate(weights[linear.name]):
            hessian = hessians.of(linear)[group]
            if not hessian.isfinite().all():
                raise BesaError(
                    f"the inputs of {linear.name} are too large for SparseGPT's statistics: "
                    "choose another method"
                )
            if hessian.any():
                share = shares[linear.name][group]
                matrix, mask = sparsegpt(matrix, hessian, share, pattern)
            else:
                mask = by_magnitude[linear.name][group]
            kept.append(mask)
            matrices.append(matrix.float())
        masks[linear.name], updated[linear.name] = torch.stack(kept), torch.stack(matrices)
    return masks, updated


def besa_masks(
    linears: Sequence[Linear],
    weights: Mapping[str, Tensor],
    scored: Mapping[str, Tensor],
    zeros: int,
    config: PruneConfig,
    forward: Callable[[int, Mapping[str, Sequence[Make]]], Tensor],
    targets: Sequence[Tensor],
    generator: torch.Generator,
    tell: Callable[[float, float], None] = lambda loss, rate: None,
) -> Masks:
    """BESA (arXiv 2402.16880): masks learned towards the dense block's output.

    Unstructured: the rates of rows or linears are learned (`besa.pruning.allocate`) and projected
    to exactly `zeros`. N:M: the choice within the groups is learned (`besa.pruning.nm`).

    Args:
        weights, scored: [groups, rows, cols] by name.
        forward: the block's output for batch i; makes each linear's masked weights [rows, cols],
            one a group, by its name.
        targets: the dense block's outputs.
        tell: is given every step's loss and overall rate.
    """
    pattern = config.pattern
    matrices = [m for x in linears for m in weights[x.name].contiguous().unbind()]
    scores = [m for x in linears for m in scored[x.name].unbind()]
    names, groups = [x.name for x in linears], [x.groups for x in linears]

    def by_name(i: int, masked: Sequence[Make]) -> Tensor:
        return forward(i, dict(zip(names, _gathered(masked, groups), strict=True)))

    chosen: list[Tensor] = []
    rates: list[Tensor] = []
    with torch.enable_grad():
        if pattern.m:
            for loss, chosen in learn_choice(  # noqa: B007 - the last ones count
                by_name,
                targets,
                matrices,
                scores,
                pattern.n,
                pattern.m,
                epochs=config.epochs,
                generator=generator,
            ):
                tell(loss, config.rate)
        else:
            allocated = [
                AllocatedLinear(matrix, rank_buckets(score))
                for matrix, score in zip(matrices, scores, strict=True)
            ]
            for loss, overall, rates in learn_rates(  # noqa: B007 - the last ones count
                by_name,
                targets,
                allocated,
                config.rate,
                granularity=config.granularity,
                epochs=config.epochs,
                generator=generator,
            ):
                tell(loss, overall)
    if not pattern.m:
        joined = [torch.cat(part) for part in _gathered(rates, groups)]
        return allocated_masks(linears, scored, joined, zeros)
    return {
        name: torch.stack(part) for name, part in zip(names, _gathered(chosen, groups), strict=True)
    }


def _gathered(values: Sequence[T], groups: Sequence[int]) -> list[list[T]]:
    """The values of all groups of all linears, linear by linear."""
    rest = iter(values)
    return [list(islice(rest, count)) for count in groups]


def allocated_masks(
    linears: Sequence[Linear], scored: Mapping[str, Tensor], rates: Sequence[Tensor], zeros: int
) -> Masks:
    """Masks whose rows follow `rates`, shifted so that they prune exactly `zeros` in all.

    Args:
        scored: importance float32 [groups, rows, cols] by name.
        rates: float [groups * rows] per linear.
    """
    cols = [torch.full(rate.shape, x.cols) for x, rate in zip(linears, rates, strict=True)]
    counts = counts_for(torch.cat(list(rates)).cpu(), torch.cat(cols), zeros)
    masks = {}
    for linear, part in zip(linears, counts.split([len(rate) for rate in rates]), strict=True):
        flat = scored[linear.name].reshape(-1, linear.cols)
        mask = lowest_pruned(flat, part.to(flat.device))
        masks[linear.name] = mask.view(linear.groups, linear.rows, linear.cols)
    return masks
